"""Files that ask for far more than they hold. Run as a script, it reads files made before under limits of memory and time:

    python tests/bombs.py READER FILE:MEGABYTES ...

prints a line of JSON for each: the exception's name or "decoded", seconds, megabytes above what the imports took. READER is
"compiled" (`tq.load` and `state_dict`) or "numpy". Each file is read in a child process of its own, whose address space may
grow by MEGABYTES; anything undocumented, running out of memory included, is reported as what it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tqfile import FIXED, deflate, made

STEP = [2048, 10]
LOW = (1 << 16).to_bytes(4, "little")  # the state of a lane that has coded nothing


def header(*tensors: dict[str, Any], table: list[list[Any]] | None = None, **more: Any) -> dict[str, Any]:
    coded = sum(e.get("k", "c") in "cb" for e in tensors)
    exact = sum(e.get("k") == "r" for e in tensors)
    rows = ([["s", coded, 1, 0, 0]] if coded else []) + ([["r", exact, 0, 0, 0]] if exact else [])
    return {"step": STEP, "tensors": list(tensors), "sections": rows if table is None else table, **more}


def constant(value: int, count: int, rows: int = 1, lanes: int = 1, coder: Any = "s", **entry: Any) -> bytes:
    """A file of one matrix that is `value` everywhere: the fewest bytes a symbol."""
    from transquant.entropy import streams
    from transquant.entropy.lanes import encode_planes
    from transquant.records import Plane

    symbols = np.full((rows, count // rows), value, np.int32)
    one = {"n": "a", "s": [rows, count // rows], "q": 0, **entry}
    planes = [Plane(symbols, 0)]
    if "g" in one:  # exponents a row and a column
        exponent = value if value > 1 else 0
        planes = [*(Plane(np.full((1, n), exponent, np.int32), 1) for n in symbols.shape), *planes]
    count = streams.num_streams(coder, sum(p.symbols.size for p in planes))
    parts = [
        [
            replace(p, symbols=p.symbols[r.start : r.stop])
            for p in planes
            for r in [streams.rows_of(k, count, len(p.symbols), p.kind)]
        ]
        for k in range(count)
    ]
    data = streams.join([encode_planes(part, lanes, coder)[0] for part in parts])
    return made(header(one, table=[[coder, 1, lanes, 0, 0]]), data)


FREE = (16 << 20) // 12  # float32 values that any file may ask for: 4 bytes and 8 of working memory each


def largest_exact(dtype: str = "float32", size: int = 4) -> bytes:
    """Zeros for as many bytes as deflate makes of 64 KB."""
    count = (64 << 20) // size
    return made(header({"k": "r", "n": "a", "s": [count], "t": dtype}), deflate(bytes(count * size)))


def many(entry: Callable[[int], dict[str, Any]], count: int, *sections: bytes, **more: Any) -> bytes:
    return made(header(*(entry(k) for k in range(count)), **more), *sections)


def wide(head: bytes, unit: bytes, tail: bytes) -> bytes:
    """A header of the largest length, one small JSON value after the other, in a file just large enough not to be refused for it."""
    number = ((16 << 20) - len(head) - len(tail)) // len(unit)
    return made(head + unit * number + tail, np.random.default_rng(0).bytes(140_000))


def nothing(k: int) -> dict[str, Any]:
    return {"n": f"{k}", "s": [0], "q": 0}


def lying(data: bytes) -> bytes:
    """The file with a header that claims to inflate to 1,000 bytes."""
    lengths = data[4:6] + (1000).to_bytes(4, "little") + data[10:14]
    return data[:4] + lengths + zlib.crc32(lengths + data[FIXED.size :]).to_bytes(4, "little") + data[FIXED.size :]


TENSORS = b'{"step":[2048,0],"sections":[],"tensors":['
ALIASES = [
    {"n": "a", "s": [1 << 16, 1], "q": 0},
    *({"k": "a", "n": f"b{k}", "o": f"b{k - 1}" if k else "a"} for k in range(60_000)),
]
HUGE = (1 << 31) - 1


def pruned(steps: int, digits: int, places: int) -> bytes:
    """A file of incompressible bytes with a list of kept channels: of each step one of 4 · `digits`, at so many places."""
    entry, data = {"k": "r", "n": "a", "s": [140_000], "t": "uint8"}, np.random.default_rng(0).bytes(140_000)
    step = [4 * digits, "8" + "0" * (digits - 1), [[0]] * places]
    return made(header(entry, kept=[step] * steps), deflate(data))


# name: how it is made, and by how many megabytes the process may grow: 64, or 32 times a legal header, or 64 and three times
# what the limits count

REFUSED: dict[str, tuple[Callable[[], bytes], int]] = {
    "2^40 weights in a stream without bits": (lambda: made(header({"n": "a", "s": [1 << 20, 1 << 20], "q": 0}), LOW), 64),
    "2^31 weights in a stream without bits": (lambda: made(header({"n": "a", "s": [HUGE], "q": 0}), LOW), 64),
    "nothing, 2^31 times": (lambda: made(header({"n": "a", "s": [0, HUGE], "q": 0, "g": "rc"}), LOW), 64),
    "2^31 rows of nothing": (lambda: made(header({"n": "a", "s": [HUGE, 0], "q": 0, "g": "r", "f": 1024}), LOW), 64),
    "exact, 2^62 times nothing": (lambda: made(header({"k": "r", "n": "a", "s": [0, HUGE, HUGE]}), deflate(b"")), 64),
    "a BatchNorm of 2^31 channels": (lambda: made(header({"k": "b", "n": "a", "s": [HUGE], "q": [0, 0], "e": 0}), LOW), 64),
    "10^6 tensors": (lambda: made(TENSORS + b'{"k":"r","n":"x","s":[0]},' * 1_000_000 + b"0]}"), 64),
    "100,001 tensors": (lambda: made(TENSORS + b'{"k":"r","n":"x","s":[0]},' * 100_000 + b"0]}", bytes(30_000)), 96),
    "50,000 tensors of 4 MiB each": (lambda: many(lambda k: {**nothing(k), "s": [1 << 20]}, 50_000, LOW), 96),
    "60,000 aliases of a tensor": (lambda: made(header(*ALIASES), LOW), 64),
    "a header that inflates to 128 MiB": (lambda: made(b" " * (128 << 20)), 64),
    "a header that inflates to 128 MiB and does not say so": (lambda: lying(made(b" " * (128 << 20))), 64),
    "a header of 15 MiB in a small file": (lambda: made(TENSORS + b"[]," * 5_000_000 + b"0]}"), 64),
    "16 MiB of small objects": (lambda: wide(TENSORS, b'{"":0},', b"0]}"), 512),
    "200,000 keys": (lambda: made(b"{" + b",".join(b'"%x":0' % k for k in range(200_000)) + b"}"), 96),
    "JSON 2 million deep": (lambda: made(b"[" * 2_000_000 + b"]" * 2_000_000), 64),
    "JSON 2,000 deep": (lambda: made(b"[" * 2_000 + b"]" * 2_000), 64),
    "metadata of 15 MiB": (lambda: made(header(metadata={f"{k}": "x" * (1 << 20) for k in range(15)})), 64),
    "an exact tensor that inflates to 128 MiB": (
        lambda: made(header({"k": "r", "n": "a", "s": [9]}), deflate(bytes(128 << 20))),
        64,
    ),
    "a channel that was one of 60 million, 65,536 times": (lambda: pruned(1, 15_000_000, 65_536), 512),
    "100,000 steps of kept channels": (lambda: pruned(100_000, 1, 1), 96),
    "values that overflow": (lambda: constant(1000, 500, q=400), 64),
    "exponents that overflow": (lambda: constant(64, 500, 10, g="rc", q=300), 64),
}

ALLOWED: dict[str, tuple[Callable[[], bytes], int]] = {
    "16 MiB of zeros, 1,024 lanes": (lambda: constant(0, FREE, 1024, 1024), 112),
    "16 MiB of sevens in bfloat16": (lambda: constant(7, FREE, 1024, 1024, t="bfloat16"), 112),
    "16 MiB of ones in float64": (lambda: constant(1, (16 << 20) // 16, 1024, 1024, t="float64"), 112),
    "16 MiB of small exponents": (lambda: constant(1, FREE, 1024, 1024, g="rc"), 112),
    "16 MiB of zeros, adaptive tables": (lambda: constant(0, FREE, 1024, 1024, "m"), 112),
    "16 MiB of sevens, adaptive tables": (lambda: constant(7, FREE, 1024, 256, "m"), 112),
    "16 MiB of zeros, static tables": (lambda: constant(0, FREE, 1024, 64, "t"), 112),
    "16 MiB of zeros, tables in the file": (lambda: constant(0, FREE, 1024, 64, "l"), 112),
    "64 MiB of exact zeros": (largest_exact, 256),
    "64 MiB of exact bfloat16": (lambda: largest_exact("bfloat16", 2), 256),
    "64 MiB of exact booleans": (lambda: largest_exact("bool", 1), 256),
    "10,000 tensors of nothing": (lambda: many(lambda k: {"k": "r", "n": f"{k}", "s": [0]}, 10_000, deflate(b"")), 64),
    "10,000 coded tensors of nothing": (lambda: many(nothing, 10_000, LOW), 64),
    "a channel that was one of 60 million": (lambda: pruned(1, 15_000_000, 1), 512),
    "65,536 steps of kept channels": (lambda: pruned(65_536, 1, 1), 96),
    "65,536 places of 32,000 channels": (lambda: pruned(1, 8_000, 65_536), 96),
    "2,000 sections": (lambda: many(nothing, 2_000, *[LOW] * 2_000, table=[["s", 1, 1, 4, 0] for _ in range(2_000)]), 64),
}

# the longest that small files take, or are refused after; minutes with the numpy reader, so tools/hostile.py --bombs runs them
LONGEST: dict[str, tuple[Callable[[], bytes], int]] = {
    "16 MiB of zeros, one lane": (lambda: constant(0, FREE), 112),
    "16 MiB of sevens, one lane": (lambda: constant(7, FREE), 112),
    "16 MiB of zeros, adaptive tables, one lane": (lambda: constant(0, FREE, coder="m"), 112),
    "16 MiB of zeros, static tables, one lane": (lambda: constant(0, FREE, coder="t"), 112),
    "16 MiB of empty lists": (lambda: wide(TENSORS, b"[],", b"0]}"), 512),
    "16 MiB of numbers": (lambda: wide(TENSORS, b"9999,", b"0]}"), 512),
    "16 MiB of long numbers": (lambda: wide(TENSORS, b"9" * 4200 + b",", b"0]}"), 512),
    "16 MiB of texts": (lambda: wide(TENSORS, b'"\\ud83d\\ude00",', b"0]}"), 512),
    "100,000 tensors of nothing": (lambda: many(lambda k: {"k": "r", "n": f"{k}", "s": [0]}, 100_000, deflate(b"")), 512),
    "100,000 coded tensors of nothing": (lambda: many(nothing, 100_000, LOW), 512),
    "20,000 sections": (lambda: many(nothing, 20_000, *[LOW] * 20_000, table=[["s", 1, 1, 4, 0] for _ in range(20_000)]), 128),
}


def explode(folder: Path, reader: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """Outcome, seconds, megabytes and bytes of the file of each bomb, by name; in a process of its own."""
    jobs, by_file = [], {}
    for number, name in enumerate(names):
        make, megabytes = (REFUSED | ALLOWED | LONGEST)[name]
        path = folder / f"{number}.tq"
        path.write_bytes(make())
        by_file[str(path)] = name
        jobs.append(f"{path}:{megabytes}")
    done = subprocess.run([sys.executable, __file__, reader, *jobs], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {by_file[path := row.pop("file")]: {**row, "bytes": os.path.getsize(path)} for row in rows}


def read_limited(read: Callable[[str], object], path: str, megabytes: int) -> dict[str, Any]:
    """In a process that has imported everything: read one file under the limits."""
    import resource

    from transquant.errors import FileError

    pages, resident = (int(n) for n in Path("/proc/self/statm").read_text().split()[:2])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (megabytes << 20),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (900, 900))
    start = time.perf_counter()
    try:
        read(path)
        found = "decoded"
    except FileError as error:
        found = type(error).__name__
    except BaseException as error:  # also MemoryError: what the test is about
        found = f"violation: {error!r:.200}"
    seconds = time.perf_counter() - start
    high = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    taken = int(high.split()[1]) / 1024 - resident * resource.getpagesize() / (1 << 20)
    return {"outcome": found, "seconds": round(seconds, 3), "megabytes": round(max(taken, 0.0), 1)}


def main() -> None:
    reader_name, *jobs = sys.argv[1:]
    if reader_name == "numpy":
        from transquant.reader import load as read
    else:
        import transquant as tq

        def read(path: str) -> Any:
            return tq.load(path).state_dict()

    for name in ("version1", "version1_tokens", "version1_static", "version1_laws"):
        read(str(Path(__file__).parent / "golden" / f"{name}.tq"))  # imports and compiles
    for job in jobs:
        path, _, megabytes = job.rpartition(":")
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            print(json.dumps({"file": path, **read_limited(read, path, int(megabytes))}), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps({"file": path, "outcome": f"violation: ended with status {status}", "seconds": 0, "megabytes": 0}))


if __name__ == "__main__":
    main()
