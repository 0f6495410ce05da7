"""Fixed-length codes of band groups (FORMAT.md section 7): a bit depth and a step for each, packed without gaps.

pack:   symbols, depths, indices ─ codes ─ bits ─ bytes        unpack: the mirror. numpy only.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from math import ceil

import numpy as np
from numpy.typing import NDArray

from transquant.errors import CorruptFile
from transquant.records import MAX_DEPTH, BandCodes, CodedEntry, CodedTensor, IntArray, TensorBits
from transquant.transforms.layout import Layout

MAX_INDEX = 1000

Bits = NDArray[np.uint8]
Reader = Callable[[bytes, int, int, int], IntArray]


def pack(tensors: Sequence[CodedTensor]) -> bytes:
    """The bytes of a packed section."""
    return b"".join(_pack(tensor) for tensor in tensors)


def unpack(data: bytes, entries: Sequence[CodedEntry]) -> dict[str, CodedTensor]:
    """The tensors of a packed section, by name. Raises CorruptFile."""
    tensors: dict[str, CodedTensor] = {}
    start = 0
    for entry in entries:
        tensors[entry.name], start = unpack_tensor(data, start, entry)
    if start != len(data):
        raise CorruptFile(f"a packed section has {len(data)} bytes, its tensors take {start}")
    return tensors


def read_codes(data: bytes, bit: int, depth: int, count: int) -> IntArray:
    """`count` codes of `depth` bits from a bit on, highest bit first, int32 (count,)."""
    first, last = bit // 8, ceil((bit + depth * count) / 8)
    bits = np.unpackbits(np.frombuffer(data, np.uint8, last - first, first))[bit - 8 * first :]
    codes = np.zeros(count, np.int32)
    for k in range(depth):
        codes = 2 * codes + bits[k : depth * count : depth]
    return codes


def indices(entry: CodedEntry, codes: BandCodes) -> NDArray[np.int64]:
    """The step index t of every coefficient, int64, broadcastable to (rows, columns)."""
    by_band = np.repeat(codes.indices.astype(np.int64), entry.bands_a_group)[: entry.bands]
    return Layout.of(entry).per_band(by_band)


def tensor_bits(tensor: CodedTensor) -> TensorBits:
    """Bits of a packed tensor's coefficients, and of its side information: basis, depths, steps, padding."""
    assert tensor.codes is not None
    values = tensor.symbols.size // max(tensor.entry.bands, 1)
    payload = sum(size * values * int(b) for size, b in zip(group_sizes(tensor.entry), tensor.codes.depths, strict=True))
    basis = 0.0
    if tensor.codes.basis_depths is not None:
        pairs = zip(group_sizes(tensor.entry), tensor.codes.basis_depths, strict=True)
        basis = float(sum(size * tensor.entry.bands * int(b) + 8 for size, b in pairs))
    return TensorBits(float(payload), 8.0 * len(_pack(tensor)) - payload, basis)


def group_sizes(entry: CodedEntry) -> list[int]:
    """Bands of each group."""
    size = entry.bands_a_group
    return [min(size, entry.bands - first) for first in range(0, entry.bands, size)]


def _pack(tensor: CodedTensor) -> bytes:
    entry, codes = tensor.entry, tensor.codes
    assert codes is not None
    head = b"" if codes.basis_depths is None else bytes(codes.basis_depths.astype(np.uint8))
    head += b"".join(struct.pack("<Bh", b, t) for b, t in zip(codes.depths.tolist(), codes.indices.tolist(), strict=True))
    pieces: list[Bits] = []
    if tensor.basis is not None and codes.basis_depths is not None:
        pieces += [_bits(part, depth) for part, depth in _groups(entry, tensor.basis.T, codes.basis_depths)]
    bands = Layout.of(entry).coded_bands(tensor.symbols)
    pieces += [_bits(part, depth) for part, depth in _groups(entry, bands, codes.depths)]
    return head + np.packbits(np.concatenate(pieces)).tobytes() if pieces else head


def unpack_tensor(data: bytes, start: int, entry: CodedEntry, read: Reader = read_codes) -> tuple[CodedTensor, int]:
    """The tensor whose bytes begin at `start`, and where they end; `read` as `read_codes`. Raises CorruptFile."""
    sizes = group_sizes(entry)
    end = start + len(sizes) * (4 if entry.basis_side else 3)
    if end > len(data):
        raise CorruptFile("a packed section ends early")
    basis_depths = None
    if entry.basis_side:
        basis_depths = np.frombuffer(data, np.uint8, len(sizes), start).astype(np.int32)
        start += len(sizes)
    pairs = list(struct.iter_unpack("<Bh", data[start:end]))
    depths = np.array([b for b, _ in pairs], np.int32)
    steps = np.array([t for _, t in pairs], np.int32)
    largest = max([*depths.tolist(), *([] if basis_depths is None else basis_depths.tolist())], default=0)
    if largest > MAX_DEPTH:
        raise CorruptFile(f"tensor {entry.name!r} has a bit depth of {largest}, allowed are 0 to {MAX_DEPTH}")
    if np.abs(steps).max(initial=0) > MAX_INDEX:
        raise CorruptFile(f"a step index of tensor {entry.name!r} is out of range, allowed is ±{MAX_INDEX}")
    values = entry.rows * entry.columns // max(entry.bands, 1)
    parts = [(size, entry.bands, int(b)) for size, b in zip(sizes, [] if basis_depths is None else basis_depths, strict=False)]
    parts += [(size, values, int(b)) for size, b in zip(sizes, depths, strict=True)]
    stop = end + ceil(sum(rows * columns * b for rows, columns, b in parts) / 8)
    if stop > len(data):
        raise CorruptFile("a packed section ends early")
    arrays: list[IntArray] = []
    at = 8 * end
    for rows, columns, depth in parts:
        codes = read(data, at, depth, rows * columns) if depth else np.zeros(rows * columns, np.int32)
        arrays.append(_symbols(codes, depth).reshape(rows, columns))
        at += rows * columns * depth
    if stop > end and data[stop - 1] & ((1 << (8 * stop - at)) - 1):
        raise CorruptFile(f"the codes of tensor {entry.name!r} are not followed by zero bits")
    basis = None
    if basis_depths is not None:
        basis = np.ascontiguousarray(np.concatenate(arrays[: len(sizes)]).T)
        arrays = arrays[len(sizes) :]
    stacked = np.concatenate(arrays) if arrays else np.zeros((0, values), np.int32)
    symbols = Layout.of(entry).coded(stacked).reshape(entry.rows, entry.columns)
    return CodedTensor(entry, symbols, None, None, basis, BandCodes(depths, steps, basis_depths)), stop


def _groups(entry: CodedEntry, bands: IntArray, depths: IntArray) -> Iterator[tuple[IntArray, int]]:
    first = 0
    for size, depth in zip(group_sizes(entry), depths.tolist(), strict=True):
        yield bands[first : first + size], depth
        first += size


def _bits(symbols: IntArray, depth: int) -> Bits:
    """Codes of symbols, one bit an element, highest first."""
    if depth == 0:
        return np.zeros(0, np.uint8)
    values = symbols.reshape(-1).astype(np.int64)
    codes = (values + 1) // 2 if depth == 1 else values + (1 << (depth - 1))
    return ((codes[:, None] >> np.arange(depth - 1, -1, -1)) & 1).astype(np.uint8).reshape(-1)


def _symbols(codes: IntArray, depth: int) -> IntArray:
    """What codes of a depth stand for."""
    if depth == 0:
        return codes
    return 2 * codes - 1 if depth == 1 else codes - (1 << (depth - 1))
