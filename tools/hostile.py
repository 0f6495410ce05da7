"""Reads hostile files, made from every golden file and some freshly compressed networks, with both readers.

    python tools/hostile.py --count 10000 --seed 0 [-o benchmarks/hostile.json]

Prints counts by exception, the longest time and the memory taken; exits with 1 where a reader raised anything undocumented,
the readers disagreed, or memory ran out under the limit. `--only NUMBER` repeats one file, and leaves it beside for a look.
`--bombs` reads the bombs of tests/bombs.py too, the slow ones included, each in a process of its own (ten minutes).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from bombs import ALLOWED, LONGEST, REFUSED, explode  # noqa: E402
from hostile_check import Violation, check  # noqa: E402
from mutators import mutant  # noqa: E402
from tqfile import split  # noqa: E402

MEMORY = 512 << 20  # bytes above what the process has once everything is imported and compiled


def golden_files() -> list[bytes]:
    return [p.read_bytes() for p in sorted((ROOT / "tests" / "golden").glob("*.tq"))]


def fresh_files() -> list[bytes]:
    """Small networks, so that the numpy reader is quick: kernels, BatchNorm, matrices, aliases, transforms, few values and none."""
    import torch
    from torch import nn

    import transquant as tq

    torch.manual_seed(0)
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    tied[1].weight = tied[0].weight
    kernels = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, (1, 2), groups=3, bias=False)).eval()
    odd = {"half": torch.randn(4, 6).half(), "none": torch.zeros(0, 4), "scalar": torch.tensor(3), "ten": torch.randn(10)}
    exact = {"0.weight": "exact"}
    files = [tq.compress(tied, step=0.05), tq.compress(kernels, step=0.1), tq.compress(odd, step=0.02, trellis=False)]
    files += [tq.compress(kernels, step=0.1, transform="klt"), tq.compress(kernels, step=0.1, coding="fixed")]
    return [f.data for f in [*files, tq.compress(kernels, step=1.0, overrides=exact)]]


def limit_memory(extra: int) -> None:
    """No more address space than now and `extra` bytes, where the system can say what now is."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return
    pages = int(statm.read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra,) * 2)


def peak() -> int:
    """Largest resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(count: int, seed: int, first: int = 0, portable_every: int = 1) -> dict:
    """The figures; `violations` is a list of what went wrong."""
    files = golden_files() + fresh_files()
    parts = [split(f) for f in files]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "hostile.tq"
        for data in files:  # compiles, and shows that they are good
            assert check(data, scratch).error == "decoded"
        limit_memory(MEMORY)
        before = peak()
        errors: Counter[str] = Counter()
        slowest = {"compiled": (0.0, -1), "numpy": (0.0, -1)}
        violations = []
        start = time.perf_counter()
        for number in range(first, first + count):
            what, data = mutant(parts, seed, number)
            try:
                found = check(data, scratch, portable=number % portable_every == 0)
            except Violation as error:
                violations.append(f"file {number} ({what}): {error}")
                errors["violation"] += 1
                continue
            errors[found.error] += 1
            slowest["compiled"] = max(slowest["compiled"], (found.compiled, number))
            slowest["numpy"] = max(slowest["numpy"], (found.portable, number))
    return {
        "files": count,
        "made from": len(files),
        "outcomes": dict(errors.most_common()),
        "longest, compiled reader and report, s": round(slowest["compiled"][0], 3),
        "longest, numpy reader, s": round(slowest["numpy"][0], 3),
        "which": [number for _, number in slowest.values()],
        "memory above the start, MB": round((peak() - before) / 1e6, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "violations": violations,
    }


def run_bombs() -> dict:
    """What became of every bomb with either reader, and how long it took; a violation says so."""
    rows = {}
    for reader in ("compiled", "numpy"):
        with tempfile.TemporaryDirectory() as folder:
            rows[reader] = explode(Path(folder), reader, [*REFUSED, *ALLOWED, *LONGEST])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one file, which is written to hostile-NUMBER.tq")
    parser.add_argument("--numpy-every", type=int, default=1, help="give the numpy reader every so many files only")
    parser.add_argument("--bombs", action="store_true", help="the bombs too")
    parser.add_argument("-o", "--output", type=Path, help="JSON with the figures")
    given = parser.parse_args()
    if given.only is not None:
        what, data = mutant([split(f) for f in golden_files() + fresh_files()], given.seed, given.only)
        Path(f"hostile-{given.only}.tq").write_bytes(data)
        print(what)
        figures = run(1, given.seed, given.only)
    else:
        bombs = run_bombs() if given.bombs else {}  # first: the other limits this process for good
        figures = run(given.count, given.seed, portable_every=given.numpy_every)
        figures["bombs"] = bombs
        figures["violations"] += [
            f"{n}: {r['outcome']}" for b in bombs.values() for n, r in b.items() if "violation" in r["outcome"]
        ]
    print(json.dumps(figures, indent=1))
    if given.output:
        command = f"python tools/hostile.py --count {given.count} --seed {given.seed}" + " --bombs" * given.bombs
        machine = {"processor": platform.machine(), "python": platform.python_version(), "cores": os.cpu_count()}
        machine["load"] = [round(x, 1) for x in os.getloadavg()]  # above the cores: times are long
        given.output.write_text(json.dumps({"command": command, "machine": machine, "figures": figures}, indent=1) + "\n")
    sys.exit(bool(figures["violations"]))


if __name__ == "__main__":
    main()
