"""What the fuzzer calls with any bytes (tools/fuzz.py), without the fuzzer: kept findings are replayed by test_hostile.py."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from bombs import constant
from hostile_check import Violation
from tqfile import Parts, deflate, made, repaired_frame, split
from transquant import bitstream
from transquant.bitstream import plane_shapes
from transquant.container import read_container
from transquant.entropy import lanes, portable
from transquant.errors import FileError
from transquant.records import BatchNormEntry, CodedEntry, Limits, is_packed

HERE = Path(__file__).resolve().parent
LIMITS = Limits(max_decoded_bytes=1 << 20, max_expansion=1, free_expansion_bytes=1 << 16)  # enough for the seeds, and quick

QUICK = 200  # values up to which the numpy reader, at a tenth of a millisecond each, is asked too


def sections(decode: Any) -> Any:
    """A decoder of sections from one of streams."""
    return lambda groups: [[decode(*job) for job in group] for group in groups]


def tiny(coder: Any = "s") -> bytes:
    """Every kind of entry and transform in a few values, which the numpy reader has soon."""
    tensors = [
        {"n": "w", "s": [2, 2, 1, 2], "q": 3, "g": "rc", "d": [3, -3]}, {"n": "v", "s": [3], "q": 0, "t": "float16"},
        {"k": "b", "n": "b", "s": [2], "q": [1, 2], "e": 0.5, "b": 1}, {"n": "f", "s": [1, 4], "q": 0, "f": 2, "t": "bfloat16"},
        {"n": "d", "s": [2, 2, 1, 2], "q": -3, "x": "d", "y": "k"}, {"n": "k", "s": [2, 3], "q": 1, "x": "k", "y": "r", "g": "c"},
        {"n": "t", "s": [2, 4], "q": 0, "z": "t", "v": 3, "f": 2},
        {"n": "p", "s": [2, 2], "q": 0, "z": "f", "x": "e", "y": "j"}, {"n": "i", "s": [2, 3], "q": 0, "z": "f", "y": "c"},
        {"k": "r", "n": "r", "s": [3], "t": "bool"}, {"k": "a", "n": "a", "o": "w"}, {"k": "a", "n": "c", "o": "a"},
    ]  # fmt: skip
    table = [[coder, 7, 2, 0, 0], ["p", 2, 0, 0, 0], ["r", 1, 0, 0, 0]]
    header = {"step": [2048, -5], "tensors": tensors, "sections": table}
    # depths of the basis' columns, (depth, step index) of the bands, codes
    packed = bytes([3, 2]) + struct.pack("<BhBh", 2, 5, 1, -5) + b"\x96\x5a"
    packed += struct.pack("<BhBhBh", 2, 0, 0, 9, 3, 1) + b"\x6d\x40"
    empty = read_container(made(header, b"", packed, b""))
    shapes = [s for e in empty.entries if isinstance(e, CodedEntry | BatchNormEntry) and not is_packed(e) for s in plane_shapes(e)]
    rng = np.random.default_rng(0)
    planes = [bitstream.Plane(rng.integers(-9, 10, s[:2]).astype(np.int32), *s[2:]) for s in shapes]
    return made(header, lanes.encode_planes(planes, 2, coder)[0], packed, deflate(b"\1\0\1"))


SOURCES: list[Parts] = [
    split(f) for f in (*map(tiny, "smtl"), constant(1, 20, 5), *(p.read_bytes() for p in sorted((HERE / "golden").glob("*.tq"))))
]


def seeds() -> Iterator[tuple[str, bytes]]:
    """(name, input): each source as a file, as a header and as each of its sections; then what was found before."""
    for number, source in enumerate(SOURCES):
        yield f"file{number}", b"\0" + source.join()
        yield f"header{number}", bytes([1 + 4 * number]) + source.header
        yield f"repaired{number}", bytes([2 + 4 * number]) + source.header
        for index, section in enumerate(source.sections):
            yield f"section{number}-{index}", bytes([3 + 4 * number, index]) + section
    for path in sorted((HERE / "hostile_seeds").glob("*")):
        yield path.name, path.read_bytes()


def file_of(data: bytes, repair: bool = True) -> bytes:
    """The file that an input stands for."""
    kind, which, rest = data[0] % 4, data[0] // 4 % len(SOURCES), data[1:]
    if kind == 0:
        return repaired_frame(rest) if repair else rest
    source = SOURCES[which]
    if kind == 3:
        return source.with_section((rest[0] if rest else 0) % len(source.sections), rest[1:]).join()
    parts = Parts(source.start, rest, source.sections)
    if kind == 2:
        with suppress(ValueError, RecursionError):
            parts = parts.repaired()
    return parts.join()


def consume(data: bytes, repair: bool = True) -> None:
    """Read the file of an input with both readers. Raises Violation, or whatever a reader should not have raised."""
    if not data:
        return
    try:
        container = read_container(file := file_of(data, repair), LIMITS)
    except FileError:
        return
    shapes = [s for e in container.entries if isinstance(e, CodedEntry | BatchNormEntry) for s in plane_shapes(e)]
    quick = sum(rows * columns for rows, columns, *_ in shapes) <= QUICK
    results = []
    for decode in (lambda *job: lanes.decode_planes(*job)[0], portable.decode_planes)[: 1 + quick]:
        try:
            arrays = bitstream.values(container, bitstream.decode(container, sections(decode)))
            results.append({k: (v.shape, str(v.dtype), v.tobytes()) for k, v in arrays.items()})
        except FileError as error:
            results.append({"error": type(error).__name__})
    if results[0] != results[-1]:
        raise Violation(f"the readers disagree on a file of {len(file)} bytes")
