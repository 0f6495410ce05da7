"""The file's layout (FORMAT.md section 1): magic, version, compressed header, sections to the exact end."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence

from transquant.container.checks import parse_json
from transquant.container.header import SectionRow, check_limits, header_from_json, header_to_json
from transquant.errors import CorruptFile, LimitExceeded, UnsupportedVersion
from transquant.records import Container, Limits, Section

MAGIC = b"\x93TQ\n"
VERSION = 1
MAX_HEADER = 16 << 20
_HEADER_COST = 32  # bytes of memory that a byte of JSON takes at most, in small lists
_FIXED = struct.Struct("<4sBBIII")  # magic, version, flags, raw length, header length, CRC-32


def write_container(container: Container) -> bytes:
    """The bytes of a file; deterministic."""
    rows: list[SectionRow] = [(s.kind, s.count, s.lanes, len(s.data), zlib.crc32(s.data)) for s in container.sections]
    value = header_to_json(container.step, container.entries, rows, dict(container.metadata), container.kept)
    raw = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")
    if len(raw) > MAX_HEADER:
        raise LimitExceeded(f"the header takes {len(raw)} bytes, the format allows {MAX_HEADER}")
    header = _deflate(raw)
    lengths = struct.pack("<BBII", VERSION, 0, len(raw), len(header))
    crc = zlib.crc32(lengths + header)
    return b"".join([MAGIC, lengths, struct.pack("<I", crc), header, *(s.data for s in container.sections)])


def read_container(data: bytes, limits: Limits | None = None) -> Container:
    """Parse and validate a file without decoding it. Raises errors.FileError (CorruptFile, UnsupportedVersion,
    LimitExceeded)."""
    limits = limits or Limits()
    start = header_bytes(data)
    _, _, _, raw_length, _, crc = _FIXED.unpack_from(data)
    if _HEADER_COST * raw_length > max(limits.free_expansion_bytes, limits.max_expansion * len(data)):
        raise LimitExceeded(
            f"the file of {len(data)} bytes has a header of {raw_length}, which may take {_HEADER_COST} times as much memory; "
            "raise Limits(max_expansion=...) if you trust the file"
        )
    header = data[_FIXED.size : start]
    if zlib.crc32(data[4:14] + header) != crc:
        raise CorruptFile("the header's checksum does not match: the file is damaged")
    step, entries, rows, metadata, kept = header_from_json(parse_json(_inflate(header, raw_length, "the header")))
    check_limits(entries, len(data), limits)
    if start + sum(row[3] for row in rows) != len(data):
        raise CorruptFile(f"the file has {len(data)} bytes, its header describes {start + sum(r[3] for r in rows)}")
    sections = []
    for number, (kind, count, lanes, length, section_crc) in enumerate(rows):
        body = data[start : start + length]
        if zlib.crc32(body) != section_crc:
            raise CorruptFile(f"the checksum of section {number} does not match: the file is damaged")
        sections.append(Section(kind, count, lanes, body))
        start += length
    return Container(step, entries, tuple(sections), metadata, kept)


def header_bytes(data: bytes) -> int:
    """Bytes of a file before its first section; checks magic, version and lengths."""
    if len(data) < _FIXED.size or not data.startswith(MAGIC):
        found = data[:4].hex(" ") or "nothing"
        raise CorruptFile(f"this is not a transquant file: it begins with {found}, expected {MAGIC.hex(' ')}")
    _, version, flags, raw_length, header_length, _ = _FIXED.unpack_from(data)
    if version != VERSION or flags:
        raise UnsupportedVersion(f"the file has format version {version}, flags {flags}, which needs a newer version of transquant")
    if raw_length > MAX_HEADER:
        raise LimitExceeded(f"the header would take {raw_length} bytes, the format allows {MAX_HEADER}")
    if _FIXED.size + header_length > len(data):
        raise CorruptFile(f"the header is cut off: it takes {header_length} bytes, the file has {len(data)}")
    return _FIXED.size + int(header_length)


def pack_raw(arrays: Sequence[bytes]) -> bytes:
    """The raw section: one deflate stream of all tensors' bytes."""
    return _deflate(b"".join(arrays))


def unpack_raw(data: bytes, lengths: Sequence[int]) -> list[memoryview]:
    """The tensors' bytes of a raw section, `lengths` bytes each, not copied. Raises CorruptFile."""
    body = memoryview(_inflate(data, sum(lengths), "the raw section"))
    pieces, start = [], 0
    for length in lengths:
        pieces.append(body[start : start + length])
        start += length
    return pieces


def _deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    return compressor.compress(data) + compressor.flush()


def _inflate(data: bytes, length: int, what: str) -> bytes:
    """Exactly `length` bytes from a raw deflate stream that ends with `data`; never more memory than that."""
    inflater = zlib.decompressobj(-15)
    try:
        body = inflater.decompress(data, length + 1)
    except zlib.error:
        raise CorruptFile(f"{what} is not a valid deflate stream") from None
    if len(body) != length or not inflater.eof or inflater.unused_data:
        raise CorruptFile(f"{what} does not inflate to the {length} bytes it declares")
    return body
