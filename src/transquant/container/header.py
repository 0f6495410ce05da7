"""The JSON header and the records it stands for, one function a direction (FORMAT.md section 2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, cast, get_args

from transquant.channels import KeptChannels
from transquant.container.checks import integer, items, keys, known, short, string
from transquant.container.dtypes import CODED_DTYPES, DTYPES
from transquant.container.kept import BATCHNORM_VECTORS, kept_from_json, kept_to_json
from transquant.errors import CorruptFile, LimitExceeded, UnsupportedVersion
from transquant.records import (
    GRAPH,
    MAX_BANDS,
    MAX_FOLD,
    Activation,
    AliasEntry,
    BatchNormEntry,
    CodedEntry,
    Coder,
    Entry,
    Limits,
    RawEntry,
    SectionKind,
    is_packed,
)

MAX_ENTRIES = 100_000
MAX_SPAN = 1024
TRELLIS_BITS = 2, 6
ACTIVATION_BITS = 2, 8
ACTIVATION_EXPONENTS = -130, 60  # steps are normal numbers in float32, and so are their inverses
BATCHNORM_KEYS = (*BATCHNORM_VECTORS, "num_batches_tracked")

SYMBOLS: tuple[str, ...] = get_args(Coder)
SectionRow = tuple[SectionKind, int, int, int, int]  # kind, count, lanes, length, crc32


def entry_to_json(entry: Entry) -> dict[str, Any]:
    """One entry as its JSON object, defaults left out."""
    if isinstance(entry, AliasEntry):
        return {"k": "a", "n": entry.name, "o": entry.of}
    if isinstance(entry, BatchNormEntry):
        value: dict[str, Any] = {"k": "b", "n": entry.name, "s": [entry.channels], "q": list(entry.qps), "e": entry.eps}
        if entry.batches_tracked is not None:
            value["b"] = entry.batches_tracked
    elif isinstance(entry, RawEntry):
        value = {"k": "r", "n": entry.name, "s": list(entry.shape)}
    else:
        value = {"n": entry.name, "s": list(entry.shape), "q": entry.qp}
        for key, part, default in (
            ("x", entry.transform, "i"), ("y", entry.axis, ""), ("z", entry.coding, "u"), ("v", entry.state_bits, 0),
        ):  # fmt: skip
            if part != default:
                value[key] = part
        if entry.recon_offsets != (0, 0):
            value["d"] = list(entry.recon_offsets)
        if entry.groups:
            value["g"] = entry.groups
        for key, number, default in (("f", entry.fold, 1), ("w", entry.span, 0)):
            if number != default:
                value[key] = number
        if (how := entry.activation) is not None:
            value["a"] = [how.bits, how.zero, how.mantissa, how.exponent]
    if entry.dtype != "float32":
        value["t"] = entry.dtype
    return value


def entry_from_json(value: Any) -> Entry:
    """One entry, validated. Raises CorruptFile or UnsupportedVersion."""
    kind = value.get("k", "c") if isinstance(value, dict) else "c"
    known(kind, ("c", "b", "r", "a"), "the kind of a tensor")
    if kind == "a":
        value = keys(value, "kno", "", "an alias")
        return AliasEntry(string(value["n"], "a tensor name"), string(value["o"], "an alias target"))
    if kind == "b":
        value = keys(value, "knsqe", "tb", "a BatchNorm")
        name = string(value["n"], "a tensor name", empty=True)
        channels = integer(items(value["s"], "a BatchNorm's shape", length=1)[0], 0, 2**31 - 1, "a dimension")
        first, second = (_qp(q) for q in items(value["q"], "a BatchNorm's step indices", length=2))
        eps = value["e"]
        if type(eps) not in (int, float) or not 0 <= eps < 1:  # false for NaN too
            raise CorruptFile(f"the eps of BatchNorm {short(name)} is {short(eps)}, allowed is 0 up to 1")
        tracked = value.get("b")
        if tracked is not None:
            integer(tracked, 0, 2**63 - 1, "a BatchNorm's counter")
        return BatchNormEntry(name, channels, _dtype(value, CODED_DTYPES), (first, second), float(eps), tracked)
    if kind == "r":
        value = keys(value, "kns", "t", "a raw tensor")
        return RawEntry(string(value["n"], "a tensor name"), _shape(value["s"]), _dtype(value, tuple(DTYPES)))
    return _coded(keys(value, "nsq", "ktdgzxyfvaw", "a coded tensor"))


def header_to_json(
    step: tuple[int, int],
    entries: Sequence[Entry],
    sections: Sequence[SectionRow],
    metadata: dict[str, str],
    kept: Sequence[KeptChannels] = (),
) -> dict[str, Any]:
    """The header as a JSON object."""
    value: dict[str, Any] = {"step": list(step), "tensors": [entry_to_json(e) for e in entries]}
    value["sections"] = [list(s) for s in sections]
    if kept:
        value["kept"] = kept_to_json(kept, entries)
    if metadata:
        value["metadata"] = metadata
    return value


def header_from_json(
    value: dict[str, Any],
) -> tuple[tuple[int, int], tuple[Entry, ...], list[SectionRow], dict[str, str], tuple[KeptChannels, ...]]:
    """(step, entries, section rows, metadata, kept channels) of a header, validated as a whole."""
    unknown = [k for k in value if k not in ("step", "tensors", "sections", "features", "metadata", "kept")]
    if unknown or items(value.get("features", []), "features", most=64):
        raise UnsupportedVersion("the header has features that need a newer version of transquant")
    for key in ("step", "tensors", "sections"):
        if key not in value:
            raise CorruptFile(f"the header lacks the key {key!r}")
    mantissa, exponent = items(value["step"], "the global step", length=2)
    step = integer(mantissa, 2048, 4095, "the step's mantissa"), integer(exponent, -160, 60, "the step's exponent")
    entries = tuple(entry_from_json(e) for e in items(value["tensors"], "the list of tensors", most=MAX_ENTRIES))
    _check_names(entries)
    rows = [_section(s) for s in items(value["sections"], "the section table", most=MAX_ENTRIES)]
    _check_sections(entries, rows)
    metadata = value.get("metadata", {})
    if not isinstance(metadata, dict) or len(metadata) > 64:
        raise CorruptFile("the metadata is not an object of at most 64 texts")
    for key, text in metadata.items():
        string(key, "a metadata key")
        string(text, "a metadata text", most=1 << 20, empty=True)
    kept = kept_from_json(value["kept"], entries, tensor_shapes(entries)) if "kept" in value else ()
    return step, entries, rows, metadata, kept


def tensor_names(entry: Entry) -> list[str]:
    """State-dict keys of an entry."""
    if isinstance(entry, BatchNormEntry):
        count = 4 if entry.batches_tracked is None else 5
        return [entry.key(k) for k in BATCHNORM_KEYS[:count]]
    return [entry.name]


def tensor_shapes(entries: Iterable[Entry]) -> dict[str, tuple[int, ...]]:
    """Shapes by state-dict key, without the graph of a network."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        if isinstance(entry, AliasEntry):
            shapes[entry.name] = shapes[entry.of]
        elif isinstance(entry, BatchNormEntry):
            shapes |= {key: () if key.endswith(BATCHNORM_KEYS[4]) else (entry.channels,) for key in tensor_names(entry)}
        elif entry.name != GRAPH:
            shapes[entry.name] = entry.shape
    return shapes


def check_limits(entries: Iterable[Entry], file_bytes: int, limits: Limits) -> None:
    """Refuse a header that asks for too much, before anything is allocated. Raises LimitExceeded."""
    sizes: dict[str, int] = {}
    total = 0
    for entry in entries:
        if isinstance(entry, AliasEntry):
            size = sizes[entry.name] = sizes[entry.of]  # an alias may be aliased too
        elif isinstance(entry, BatchNormEntry):
            each = entry.channels * DTYPES[entry.dtype].size
            sizes |= dict.fromkeys(tensor_names(entry), each)
            size = 4 * each + 16 * entry.channels + 8
        else:
            count = prod(max(d, 1) for d in entry.shape)  # rows without columns have exponents, and arrays of them limits
            sizes[entry.name] = count * DTYPES[entry.dtype].size
            size = sizes[entry.name] + (8 * (count + entry.basis_side**2 + _spans(entry)) if isinstance(entry, CodedEntry) else 0)
        total += size
    if total > limits.max_decoded_bytes:
        raise LimitExceeded(
            f"the file asks for {total} bytes, the limit is {limits.max_decoded_bytes}; raise it with "
            "Limits(max_decoded_bytes=...) if you trust the file"
        )
    if total > max(limits.free_expansion_bytes, limits.max_expansion * file_bytes):
        raise LimitExceeded(
            f"the file of {file_bytes} bytes asks for {total} bytes, more than {limits.max_expansion} times its size; "
            "raise Limits(max_expansion=...) if you trust the file"
        )


def _spans(entry: CodedEntry) -> int:
    """Spans of all rows, without a dimension of 0."""
    return max(entry.rows, 1) * -(-prod(max(d, 1) for d in entry.shape[1:]) // entry.span) if entry.span else 0


def _coded(value: dict[str, Any]) -> CodedEntry:
    transform = known(value.get("x", "i"), ("i", "d", "k", "e"), "a transform")
    axis = known(value["y"], ("r", "c", "k", "j"), "an axis") if "y" in value else ""
    coding = known(value.get("z", "u"), ("u", "t", "f"), "a quantizer")
    state_bits = integer(value["v"], *TRELLIS_BITS, "a trellis' state bits") if "v" in value else 0
    groups = known(value.get("g", ""), ("", "r", "c", "rc", "s"), "a step grouping")
    span = integer(value["w"], 1, MAX_SPAN, "a span") if "w" in value else 0
    offsets = [integer(d, -31, 31, "a reconstruction offset") for d in items(value.get("d", [0, 0]), "offsets", length=2)]
    entry = CodedEntry(
        string(value["n"], "a tensor name"), _shape(value["s"]), _dtype(value, CODED_DTYPES), _qp(value["q"]),
        (offsets[0], offsets[1]), cast(Any, groups), integer(value.get("f", 1), 1, MAX_FOLD, "a fold"),
        cast(Any, transform), cast(Any, axis), cast(Any, coding), state_bits,
        _activation(value["a"]) if "a" in value else None, span,
    )  # fmt: skip
    shape = list(entry.shape)
    if len(shape) < 2 and (groups or axis or entry.fold > 1 or coding != "u" or entry.activation):
        raise CorruptFile(
            f"a tensor of shape {shape} has step groups, a fold, an axis, a trellis, bit depths or an activation, allowed for "
            "matrices only"
        )
    if (groups == "s") != (span > 0):
        raise CorruptFile(f"tensor {entry.name!r} has spans of {span} columns, which does not go with step groups {groups!r}")
    if span and (transform != "i" or coding != "u"):
        raise CorruptFile(f"tensor {entry.name!r} has spans, allowed with transform 'i' and quantizer 'u' only")
    if (coding == "t") != (state_bits > 0):
        raise CorruptFile(f"tensor {entry.name!r} has {state_bits} state bits, which does not go with quantizer {coding!r}")
    if bool(axis) != (transform != "i" or coding == "f"):
        raise CorruptFile(f"tensor {entry.name!r} has the axis {axis!r}, which does not go with transform {transform!r}")
    if transform != "i" and not 1 <= entry.bands <= MAX_BANDS:
        raise CorruptFile(f"tensor {entry.name!r} is transformed over {entry.bands} bands, allowed are 1 to {MAX_BANDS}")
    if transform == "d" and axis != "k":
        raise CorruptFile(f"tensor {entry.name!r} has a DCT over axis {axis!r}, allowed is 'k'")
    if coding == "f" and (groups or entry.fold > 1 or entry.recon_offsets != (0, 0)):
        raise CorruptFile(f"tensor {entry.name!r} has fixed-length codes and settings of entropy-coded symbols")
    if entry.fold > 1 and entry.columns // max(entry.group_columns, 1) % entry.fold:
        raise CorruptFile(f"a tensor of shape {shape} has rows folded by {entry.fold}, which does not divide them")
    return entry


def _activation(value: Any) -> Activation:
    bits, zero, mantissa, exponent = items(value, "an activation", length=4)
    integer(bits, *ACTIVATION_BITS, "an activation's bits")
    return Activation(
        bits,
        integer(zero, 0, 2**bits - 1, "an activation's zero"),
        integer(mantissa, 2048, 4095, "the mantissa of an activation's step"),
        integer(exponent, *ACTIVATION_EXPONENTS, "the exponent of an activation's step"),
    )


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(integer(d, 0, 2**31 - 1, "a dimension") for d in items(value, "a shape", most=8))


def _qp(value: Any) -> int:
    return integer(value, -400, 400, "a step index")


def _dtype(value: dict[str, Any], allowed: tuple[str, ...]) -> str:
    dtype = known(value.get("t", "float32"), tuple(DTYPES), "a dtype")
    if dtype not in allowed:
        raise CorruptFile(f"a tensor has dtype {dtype}, allowed here are {', '.join(allowed)}")
    return dtype


def _check_names(entries: tuple[Entry, ...]) -> None:
    seen: set[str] = set()
    labels: set[str] = set()  # entries are looked up by name too, so a BatchNorm's prefix is one
    for entry in entries:
        names = tensor_names(entry)
        if isinstance(entry, AliasEntry) and entry.of not in seen:
            raise CorruptFile(f"{short(entry.name)} is an alias of {short(entry.of)}, which is no earlier tensor")
        if seen.intersection(names) or entry.name in labels:
            raise CorruptFile(f"two tensors are named {short(names[0])}")
        seen.update(names)
        labels.add(entry.name)


def _section(value: Any) -> SectionRow:
    row = items(value, "a section", length=5)
    kind = known(row[0], (*SYMBOLS, "p", "r"), "a section kind")
    count = integer(row[1], 1, MAX_ENTRIES, "a section's count")
    lanes = integer(row[2], 0, 1024, "a section's lanes")
    symbols = kind in SYMBOLS
    if (not symbols and lanes) or (symbols and (lanes == 0 or lanes & (lanes - 1))):
        raise CorruptFile(f"a section of kind {kind!r} has {lanes} lanes, allowed are powers of two up to 1024, 0 without symbols")
    length = integer(row[3], 0, 2**62, "a section's length")
    return cast(SectionKind, kind), count, lanes, length, integer(row[4], 0, 2**32 - 1, "a section's checksum")


def _check_sections(entries: tuple[Entry, ...], rows: list[SectionRow]) -> None:
    kinds = ["s" if row[0] in SYMBOLS else row[0] for row in rows]
    if kinds != sorted(kinds, key="spr".index) or kinds.count("r") > 1:
        raise CorruptFile("the sections are not in the order of symbols, packed, raw, or two are raw")
    packed = sum(is_packed(e) for e in entries)
    coded = sum(isinstance(e, CodedEntry | BatchNormEntry) for e in entries) - packed
    raw = sum(isinstance(e, RawEntry) for e in entries)
    for kind, number in (("s", coded), ("p", packed), ("r", raw)):
        counted = sum(row[1] for of, row in zip(kinds, rows, strict=True) if of == kind)
        if counted != number:
            raise CorruptFile(f"sections of kind {kind!r} hold {counted} tensors, the header lists {number}")
