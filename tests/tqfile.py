"""Takes a compressed file apart and puts it together again with whatever was changed, its lengths and checksums made right.

Knows the frame of FORMAT.md section 1 and that a row of the section table ends in (length, checksum), nothing else: so it
works on files of any version and kind.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass, replace
from typing import Any

FIXED = struct.Struct("<4sBBIII")


@dataclass(frozen=True)
class Parts:
    """`header` is JSON text, perhaps no longer JSON; `start` are magic, version and flags."""

    start: bytes
    header: bytes
    sections: tuple[bytes, ...]

    @property
    def value(self) -> dict[str, Any]:
        return json.loads(self.header)

    def with_value(self, value: Any) -> Parts:
        return replace(self, header=json.dumps(value, separators=(",", ":"), ensure_ascii=True).encode())

    def with_section(self, index: int, data: bytes) -> Parts:
        """One section changed, its row of the table too."""
        sections = [*self.sections]
        sections[index] = data
        return replace(self, sections=tuple(sections)).repaired()

    def repaired(self) -> Parts:
        """The section table's lengths and checksums made right, as far as there are rows for them."""
        value = self.value
        rows = value.get("sections") if isinstance(value, dict) else None
        for row, section in zip(rows if isinstance(rows, list) else [], self.sections, strict=False):
            if isinstance(row, list) and len(row) > 2:
                row[-2:] = [len(section), zlib.crc32(section)]
        return self.with_value(value)

    def join(self) -> bytes:
        """The file, with the header's lengths and checksum made right."""
        packed = deflate(self.header)
        lengths = self.start[4:6] + struct.pack("<II", len(self.header), len(packed))
        return self.start[:4] + lengths + struct.pack("<I", zlib.crc32(lengths + packed)) + packed + b"".join(self.sections)


def split(data: bytes) -> Parts:
    """The parts of a good file."""
    raw_length, length = struct.unpack_from("<II", data, 6)
    header = zlib.decompressobj(-15).decompress(data[FIXED.size : FIXED.size + length])
    assert len(header) == raw_length
    sections, place = [], FIXED.size + length
    for row in json.loads(header)["sections"]:
        sections.append(data[place : place + row[-2]])
        place += row[-2]
    assert place == len(data)
    return Parts(data[:6], header, tuple(sections))


def made(header: Any, *sections: bytes, version: int = 1) -> bytes:
    """A file around a header, JSON value or text; a value's section table is repaired, text is taken as it is."""
    start = b"\x93TQ\n" + bytes([version, 0])
    if isinstance(header, bytes):
        return Parts(start, header, sections).join()
    return Parts(start, b"{}", sections).with_value(header).repaired().join()


def deflate(data: bytes) -> bytes:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    return squeeze.compress(data) + squeeze.flush()


def repaired_frame(data: bytes) -> bytes:
    """Any bytes, as a file whose frame is right as far as that can be: for a fuzzer, which would never guess a checksum.

    The header's length and checksum are set over what it holds; where it inflates to JSON with a section table, the
    sections' checksums are set too."""
    if len(data) < FIXED.size:
        return data
    length = min(struct.unpack_from("<I", data, 10)[0], len(data) - FIXED.size)
    packed, rest = data[FIXED.size : FIXED.size + length], data[FIXED.size + length :]
    raw_length = struct.unpack_from("<I", data, 6)[0]
    try:
        header = zlib.decompressobj(-15).decompress(packed, 1 << 20)
        value = json.loads(header)
        place = 0
        for row in value["sections"]:
            row[-1] = zlib.crc32(rest[place : place + row[-2]])
            place += row[-2]
        header = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
        packed, raw_length = deflate(header), len(header)
    except Exception:  # whatever is wrong with it is the reader's to find
        pass
    lengths = data[4:6] + struct.pack("<II", raw_length, len(packed))
    return data[:4] + lengths + struct.pack("<I", zlib.crc32(lengths + packed)) + packed + rest
