"""Records to a file and back: planes, sections, container. Decode mirrors encode.

    encode:  coded tensors, raw bytes ─ planes_of ─ streams ─ entropy.encode_planes ─ Section ─ write_container ─ file
    decode:  file ─ read_container ─ Section ─ streams ─ decode_planes ─ coded tensors ─ dequantize ─ arrays

`encode` is the one way into a file, for `compress` and for any caller that has symbols ready. Decoding takes the decoder of
sections as an argument, so the numpy reader and the compiled one share everything else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from transquant import packing
from transquant.channels import KeptChannels
from transquant.container import pack_raw, unpack_raw, write_container
from transquant.container.dtypes import DTYPES
from transquant.entropy import lanes_for, streams
from transquant.errors import CorruptFile
from transquant.grid import MAX_EXPONENT, dequantize, tensor_index, total_index
from transquant.records import (
    MAX_BASIS,
    AliasEntry,
    BatchNormEntry,
    Coded,
    CodedBatchNorm,
    CodedEntry,
    CodedTensor,
    Coder,
    Container,
    Entry,
    IntArray,
    Plane,
    RawEntry,
    Section,
    TensorBits,
    is_packed,
)
from transquant.transforms.exact import synthesize

SECTION_VALUES = 1 << 20  # a symbol section is closed once it has this many values

PlaneShape = tuple[int, int, int, int, int, int]  # rows, columns, kind, width, taps, state bits
T = TypeVar("T")
Part = tuple[Entry, Coded | None]  # an entry, and its symbols where it has any
# of a stream: its bytes, the shapes of its parts of the planes, lanes, section kind, and zeros int32 to put the symbols into
StreamJob = tuple[bytes, Sequence[PlaneShape], int, Coder, Sequence[IntArray]]
SectionDecoder = Callable[[Sequence[Sequence[StreamJob]]], object]  # does the jobs of each section
Job = tuple[Sequence[Plane], int, Coder]  # of a stream: its part of each plane, number of lanes, section kind
Dequantizer = Callable[[IntArray, tuple[int, int], NDArray[np.int64], tuple[int, int], int, int], NDArray[np.float32]]
StreamEncoder = Callable[[Iterable[Job]], Iterable[tuple[bytes, list[float]]]]

WEIGHTS, SIDE, VECTORS, BASIS = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class EncodedFile:
    """A file and where its bits went: by coded tensor;
    `section_bytes` of the symbol sections together, `raw_bytes` of the raw section."""

    data: bytes
    bits: Mapping[str, TensorBits]
    section_bytes: int
    raw_bytes: int


def encode(
    step: tuple[int, int],
    parts: Iterable[Part],
    raw: Mapping[str, bytes],
    encode_streams: StreamEncoder,
    coder: Coder,
    metadata: Callable[[], Mapping[str, str]] = dict,
    kept: Sequence[KeptChannels] = (),
) -> EncodedFile:
    """Write a file: entries in state-dict order, those that are coded or a BatchNorm with their symbols, and raw bytes by name.

    `parts` are taken one after the other, and their symbols are dropped once their section is encoded. `encode_streams` gives
    bytes and the planes' information contents of each job, in order; streams are independent. `coder` is the kind of the symbol
    sections. `metadata` is asked at the end. `kept`: what was removed from the network before."""
    sections: list[Section] = []
    tensor_bits: dict[str, TensorBits] = {}
    entries: list[Entry] = []
    packed: list[bytes] = []
    closed: deque[tuple[list[CodedEntry | BatchNormEntry], list[int]]] = deque()  # being encoded, lanes by stream

    def in_symbols() -> Iterator[Coded]:
        for entry, tensor in parts:
            entries.append(entry)
            if is_packed(entry):
                assert isinstance(tensor, CodedTensor)
                packed.append(packing.pack([tensor]))
                tensor_bits[entry.name] = packing.tensor_bits(tensor)
            elif tensor is not None:
                yield tensor

    def jobs() -> Iterator[Job]:
        for group in runs(in_symbols(), _num_values, SECTION_VALUES):
            streams_of = _jobs([plane for tensor in group for plane in planes_of(tensor)], coder)
            closed.append(([tensor.entry for tensor in group], [lanes for _, lanes, _ in streams_of]))
            yield from streams_of

    done = iter(encode_streams(jobs()))
    for first in done:
        group, lanes = closed.popleft()
        pieces = [first, *islice(done, len(lanes) - 1)]
        sections.append(Section(coder, len(group), lanes[0], streams.join([data for data, _ in pieces])))
        tensor_bits |= split_bits(group, [sum(each) for each in zip(*(bits for _, bits in pieces), strict=True)])
    if packed:
        sections.append(Section("p", len(packed), 0, b"".join(packed)))
    section_bytes = sum(len(s.data) for s in sections)
    raw_entries = [e for e in entries if isinstance(e, RawEntry)]
    exact = pack_raw([raw[e.name] for e in raw_entries]) if raw_entries else b""
    if raw_entries:
        sections.append(Section("r", len(raw_entries), 0, exact))
    container = Container(step, tuple(entries), tuple(sections), metadata(), tuple(kept))
    return EncodedFile(write_container(container), tensor_bits, section_bytes, len(exact))


def decode(container: Container, decode_sections: SectionDecoder) -> dict[str, Coded]:
    """Symbols of all coded and BatchNorm entries, by name. Raises CorruptFile."""
    entries = iter(e for e in container.entries if isinstance(e, CodedEntry | BatchNormEntry) and not is_packed(e))
    packed = iter([e for e in container.entries if isinstance(e, CodedEntry) and is_packed(e)])
    coded: dict[str, Coded] = {}
    groups, jobs = [], []
    for section in container.sections:
        if section.kind == "p":
            coded |= packing.unpack(section.data, [next(packed) for _ in range(section.count)])
        elif section.kind != "r":
            group = [next(entries) for _ in range(section.count)]
            shapes = [shape for entry in group for shape in plane_shapes(entry)]
            planes = [np.zeros(shape[:2], np.int32) for shape in shapes]
            groups.append((group, planes))
            jobs.append(_stream_jobs(section.data, shapes, section.lanes, section.kind, planes))
    decode_sections(jobs)
    for group, planes in groups:
        rest = iter(planes)
        for entry in group:
            coded[entry.name] = _coded(entry, [next(rest) for _ in plane_shapes(entry)])
    return coded


def pieces(container: Container) -> list[Container]:
    """The sections of a file as containers of their own, with their entries, in file order; no aliases."""
    packed: list[Entry] = []
    exact: list[Entry] = []
    symbols: list[Entry] = []
    for entry in container.entries:
        if is_packed(entry):
            packed.append(entry)
        elif isinstance(entry, RawEntry):
            exact.append(entry)
        elif not isinstance(entry, AliasEntry):
            symbols.append(entry)
    waiting = {"p": iter(packed), "r": iter(exact)}
    rest: Iterator[Entry] = iter(symbols)
    groups = [tuple(islice(waiting.get(s.kind, rest), s.count)) for s in container.sections]
    return [Container(container.step, group, (section,)) for group, section in zip(groups, container.sections, strict=True)]


def values(
    container: Container, coded: Mapping[str, Coded], dequantizer: Dequantizer = dequantize
) -> dict[str, NDArray[np.generic]]:
    """All tensors by state-dict key, in order, in their shapes; `dequantizer` as `grid.dequantize`.

    The arrays have the entry's dtype, bfloat16 as float32 with the same values. Raises CorruptFile."""
    raw_entries = [e for e in container.entries if isinstance(e, RawEntry)]
    lengths = [_num_bytes(e) for e in raw_entries]
    packed = next((s.data for s in container.sections if s.kind == "r"), None)
    raw = dict(zip((e.name for e in raw_entries), unpack_raw(packed, lengths) if packed is not None else [], strict=True))
    result: dict[str, NDArray[np.generic]] = {}
    for entry in container.entries:
        if isinstance(entry, CodedEntry):
            tensor = coded[entry.name]
            assert isinstance(tensor, CodedTensor)
            result[entry.name] = to_dtype(tensor_values(tensor, container.step, dequantizer), entry.dtype).reshape(entry.shape)
        elif isinstance(entry, BatchNormEntry):
            norm = coded[entry.name]
            assert isinstance(norm, CodedBatchNorm)
            result |= _batchnorm_values(norm, container.step)
        elif isinstance(entry, RawEntry):
            result[entry.name] = _raw_values(raw[entry.name], entry)
        else:
            result[entry.name] = result[entry.of]
    return result


def tensor_values(tensor: CodedTensor, step: tuple[int, int], dequantizer: Dequantizer = dequantize) -> NDArray[np.float32]:
    """The matrix float32 (rows, columns) of a coded tensor."""
    decoded = coefficients(tensor, step, dequantizer)
    return decoded if tensor.entry.transform == "i" else synthesize(decoded, tensor.basis, tensor.entry)


def coefficients(tensor: CodedTensor, step: tuple[int, int], dequantizer: Dequantizer = dequantize) -> NDArray[np.float32]:
    """Dequantized float32 (rows, columns): of the weight or, where there is a transform, of its coefficients."""
    entry = tensor.entry
    t = tensor_index(tensor) if tensor.codes is None else packing.indices(entry, tensor.codes)
    return dequantizer(tensor.symbols, step, t, entry.recon_offsets, entry.state_bits, entry.fold)


def to_dtype(array: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    """float32 rounded to `dtype`; bfloat16 comes back as float32."""
    if dtype == "bfloat16":
        bits = array.view(np.uint32)  # of finite values: the sum fits
        cast: NDArray[np.generic] = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)
    else:
        with np.errstate(over="ignore"):
            cast = array.astype(DTYPES[dtype].numpy, copy=False)
    if not np.isfinite(cast).all():
        raise CorruptFile(f"a decoded value does not fit {dtype}")
    return cast


def plane_shapes(entry: CodedEntry | BatchNormEntry) -> list[PlaneShape]:
    """(rows, columns, kind, width, taps, state bits) of the planes of an entry, in file order."""
    if isinstance(entry, BatchNormEntry):
        return [(1, entry.channels, VECTORS, 1, 1, 0)] * 2
    if len(entry.shape) < 2:
        return [(1, entry.columns, VECTORS, 1, 1, 0)]
    shapes: list[PlaneShape] = []
    if "r" in entry.groups:
        shapes.append((1, entry.rows, SIDE, 1, 1, 0))
    if "c" in entry.groups:
        shapes.append((1, entry.columns // max(entry.group_columns, 1), SIDE, 1, 1, 0))
    if entry.span:
        shapes.append((entry.rows, entry.spans, SIDE, 1, 1, 0))
    if entry.basis_side:
        shapes.append((entry.basis_side, entry.basis_side, BASIS, 1, 1, 0))
    width, taps = (entry.shape[-1], entry.taps) if len(entry.shape) > 2 and entry.axis not in ("k", "j") else (1, 1)
    rows, columns = entry.rows * entry.fold, entry.columns // entry.fold
    return [*shapes, (rows, columns, WEIGHTS, max(width, 1), max(taps, 1), entry.state_bits)]


def planes_of(coded: Coded) -> list[Plane]:
    """The planes of a tensor, in file order."""
    if isinstance(coded, CodedBatchNorm):
        given = [coded.scale, coded.shift]
    else:
        spans = None if coded.span_exponents is None else np.diff(coded.span_exponents, axis=1, prepend=np.int32(0))
        side = coded.row_exponents, coded.column_exponents, spans, coded.basis
        given = [a for a in side if a is not None] + [coded.symbols]
    shapes = plane_shapes(coded.entry)
    return [Plane(a.reshape(s[:2]), *s[2:]) for a, s in zip(given, shapes, strict=True)]


def _coded(entry: CodedEntry | BatchNormEntry, planes: list[IntArray]) -> Coded:
    if isinstance(entry, BatchNormEntry):
        return CodedBatchNorm(entry, planes[0].reshape(-1), planes[1].reshape(-1))
    rest = iter(planes)
    rows = next(rest).reshape(-1) if "r" in entry.groups else None
    columns = next(rest).reshape(-1) if "c" in entry.groups else None
    spans = np.cumsum(next(rest), axis=1, dtype=np.int64) if entry.span else None
    for exponents in (rows, columns, spans):
        if exponents is not None and exponents.size and np.abs(exponents).max() > MAX_EXPONENT:
            raise CorruptFile(f"a step exponent of tensor {entry.name!r} is out of range, allowed is ±{MAX_EXPONENT}")
    basis = next(rest) if entry.basis_side else None
    if basis is not None and np.abs(basis).max(initial=0) > MAX_BASIS:
        raise CorruptFile(f"the basis of tensor {entry.name!r} has an entry out of range, allowed is ±{MAX_BASIS}")
    own = None if spans is None else spans.astype(np.int32)
    return CodedTensor(entry, next(rest).reshape(entry.rows, entry.columns), rows, columns, basis, span_exponents=own)


def runs(items: Iterable[T], size_of: Callable[[T], int], enough: int) -> Iterator[list[T]]:
    """Runs of consecutive items, each closed once their sizes add up to `enough`."""
    run: list[T] = []
    size = 0
    for item in items:
        run.append(item)
        size += size_of(item)
        if size >= enough:
            yield run
            run, size = [], 0
    if run:
        yield run


def _num_values(tensor: Coded) -> int:
    return sum(rows * columns for rows, columns, *_ in plane_shapes(tensor.entry))


def _jobs(planes: Sequence[Plane], coder: Coder) -> list[Job]:
    """The streams of a section that is to be encoded."""
    count = streams.num_streams(coder, sum(p.symbols.size for p in planes))
    largest = max(planes, key=lambda p: p.symbols.size).symbols
    magnitude = float(np.abs(largest).mean()) if largest.size else 0.0
    lanes = lanes_for(sum(p.symbols.size for p in planes), largest.size, len(largest) // count, magnitude)
    return [([_part(p, stream, count) for p in planes], lanes, coder) for stream in range(count)]


def _part(plane: Plane, stream: int, count: int) -> Plane:
    rows = streams.rows_of(stream, count, len(plane.symbols), plane.kind)
    return replace(plane, symbols=plane.symbols[rows.start : rows.stop])


def _stream_jobs(
    data: bytes, shapes: Sequence[PlaneShape], lanes: int, coder: Coder, planes: Sequence[IntArray]
) -> list[StreamJob]:
    """The streams of a symbol section that is to be decoded into its planes. Raises CorruptFile."""
    count = streams.num_streams(coder, sum(rows * columns for rows, columns, *_ in shapes))
    jobs: list[StreamJob] = []
    for stream, piece in enumerate(streams.cut(data, count)):
        rows = [streams.rows_of(stream, count, s[0], s[2]) for s in shapes]
        parts = [(len(r), *s[1:]) for r, s in zip(rows, shapes, strict=True)]
        into = [plane[r.start : r.stop] for r, plane in zip(rows, planes, strict=True)]
        jobs.append((piece, parts, lanes, coder, into))
    return jobs


def _batchnorm_values(norm: CodedBatchNorm, step: tuple[int, int]) -> dict[str, NDArray[np.generic]]:
    entry = norm.entry
    scale, shift = (
        to_dtype(dequantize(symbols[None], step, total_index(qp, None, None, 1), (0, 0))[0], entry.dtype)
        for symbols, qp in zip((norm.scale, norm.shift), entry.qps, strict=True)
    )
    variance = to_dtype(np.full(entry.channels, 1 - entry.eps, np.float32), entry.dtype)
    result = {
        entry.key("weight"): scale,
        entry.key("bias"): shift,
        entry.key("running_mean"): np.zeros_like(scale),
        entry.key("running_var"): variance,
    }
    if entry.batches_tracked is not None:
        result[entry.key("num_batches_tracked")] = np.array(entry.batches_tracked, np.int64)
    return result


def _num_bytes(entry: RawEntry) -> int:
    count = DTYPES[entry.dtype].size
    for d in entry.shape:
        count *= d
    return count


def _raw_values(data: memoryview, entry: RawEntry) -> NDArray[np.generic]:
    array: NDArray[np.generic]
    if entry.dtype == "bfloat16":
        bits = np.frombuffer(data, "<u2").astype(np.uint32)
        bits <<= 16
        array = bits.view(np.float32)
    elif entry.dtype == "bool":
        array = np.frombuffer(data, np.uint8) != 0
    else:
        dtype = np.dtype(DTYPES[entry.dtype].numpy)
        array = np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype)
    return array.reshape(entry.shape)


def decoded_aliases(container: Container) -> dict[str, str]:
    """Aliases of the file: name → name of the tensor it equals."""
    return {e.name: e.of for e in container.entries if isinstance(e, AliasEntry)}


def dtypes(container: Container) -> dict[str, str]:
    """The dtype of every state-dict key."""
    result: dict[str, str] = {}
    for entry in container.entries:
        if isinstance(entry, AliasEntry):
            result[entry.name] = result[entry.of]
        elif isinstance(entry, BatchNormEntry):
            result |= {entry.key(k): entry.dtype for k in ("weight", "bias", "running_mean", "running_var")}
            if entry.batches_tracked is not None:
                result[entry.key("num_batches_tracked")] = "int64"
        else:
            result[entry.name] = entry.dtype
    return result


def split_bits(group: Sequence[CodedEntry | BatchNormEntry], bits: Sequence[float]) -> dict[str, TensorBits]:
    """Bits of a section's entries by name, from its planes' bits."""
    rest = iter(bits)
    result: dict[str, TensorBits] = {}
    for entry in group:
        own = [(shape[2], next(rest)) for shape in plane_shapes(entry)]
        basis = sum(b for kind, b in own if kind == BASIS)
        side = basis + sum(b for kind, b in own if kind == SIDE)
        result[entry.name] = TensorBits(sum(b for _, b in own) - side, side, basis)
    return result
