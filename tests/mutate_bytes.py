"""Changes of bytes: of a section with its row repaired, of the header's text with the frame repaired, and of a file unrepaired."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tqfile import Parts, deflate

Rng = np.random.Generator


def _any(rng: Rng, things: Sequence[object]) -> int:
    return int(rng.integers(len(things)))


def _flipped(rng: Rng, data: bytes, most: int = 5) -> bytes:
    bad = bytearray(data)
    for place in rng.integers(0, len(bad), rng.integers(1, most)):
        bad[place] ^= 1 << rng.integers(8)
    return bytes(bad)


# ------------------------------------------------------------------------------------------- sections, repaired


def section_bits(rng: Rng, base: Parts, others: Sequence[Parts]) -> Parts:
    index = _any(rng, base.sections)
    return base.with_section(index, _flipped(rng, base.sections[index]))


def section_length(rng: Rng, base: Parts, others: Sequence[Parts]) -> Parts:
    """Cut, or longer."""
    index = _any(rng, base.sections)
    data = base.sections[index]
    new = data[: rng.integers(len(data) + 1)] if rng.random() < 0.6 else data + rng.bytes(int(rng.integers(1, 40)))
    return base.with_section(index, new)


def section_content(rng: Rng, base: Parts, others: Sequence[Parts]) -> Parts:
    """All zeros, all ones, or random."""
    index = _any(rng, base.sections)
    length = len(base.sections[index])
    return base.with_section(index, [bytes(length), b"\xff" * length, rng.bytes(length)][int(rng.integers(3))])


def section_states(rng: Rng, base: Parts, others: Sequence[Parts]) -> Parts:
    """Coder states at the ends of their range and outside it."""
    index = _any(rng, base.sections)
    data = bytearray(base.sections[index])
    states = [0, 1, 65535, 65536, 65537, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
    for place in range(0, min(len(data) - 3, 4 * int(rng.integers(1, 9))), 4):
        struct.pack_into("<I", data, place, states[_any(rng, states)])
    return base.with_section(index, bytes(data))


def section_swap(rng: Rng, base: Parts, others: Sequence[Parts]) -> Parts:
    one, two = _any(rng, base.sections), _any(rng, base.sections)
    sections = [*base.sections]
    sections[one], sections[two] = sections[two], sections[one]
    return replace(base, sections=tuple(sections)).repaired()


def section_from_elsewhere(rng: Rng, base: Parts, others: Sequence[Parts]) -> Parts:
    other = others[_any(rng, others)].sections
    return base.with_section(_any(rng, base.sections), other[_any(rng, other)])


def section_splice(rng: Rng, base: Parts, others: Sequence[Parts]) -> Parts:
    """A piece of the section over another piece of it."""
    index = _any(rng, base.sections)
    data = bytearray(base.sections[index])
    a, b, n = (int(k) for k in rng.integers(0, len(data), 3))
    data[a : a + n] = data[b : b + n]
    return base.with_section(index, bytes(data))


def section_deflated(rng: Rng, base: Parts, others: Sequence[Parts]) -> Parts:
    """A valid deflate stream of another length, or of the right one with something after it."""
    index = len(base.sections) - 1
    try:
        body = zlib.decompress(base.sections[index], -15)
    except zlib.error:
        body = rng.bytes(100)
    kinds = [
        deflate(body) + b"\0",
        deflate(body + b"\0"),
        deflate(body[:-1]),
        deflate(bytes(1 << 20)),
        deflate(rng.bytes(len(body))),
        body,
        b"\3\0",
    ]
    return base.with_section(index, kinds[_any(rng, kinds)])


def section_dropped(rng: Rng, base: Parts, others: Sequence[Parts]) -> Parts:
    """One section and its row gone."""
    value, index = base.value, _any(rng, base.sections)
    del value["sections"][index]
    return replace(base, sections=base.sections[:index] + base.sections[index + 1 :]).with_value(value)


SECTION_MUTATORS = [
    section_bits, section_bits, section_length, section_content, section_states, section_swap, section_from_elsewhere, section_splice,
    section_deflated, section_dropped,
]  # fmt: skip

# ------------------------------------------------------------------------------------------- header text, repaired


def text_bits(rng: Rng, base: Parts, others: Sequence[Parts]) -> Parts:
    return replace(base, header=_flipped(rng, base.header))


def text_piece(rng: Rng, base: Parts, others: Sequence[Parts]) -> Parts:
    """Cut, or a piece of it twice."""
    a, b = sorted(int(k) for k in rng.integers(0, len(base.header), 2))
    text = base.header
    return replace(base, header=text[:b] + text[a:] if rng.random() < 0.5 else text[:a] + text[b:])


def text_number(rng: Rng, base: Parts, others: Sequence[Parts]) -> Parts:
    """A number written in a way that JSON does not allow, or allows and we do not."""
    places = [
        k for k in range(1, len(base.header)) if base.header[k : k + 1].isdigit() and base.header[k - 1 : k] in (b"[", b",", b":")
    ]
    place = places[_any(rng, places)]
    forms = [
        b"NaN",
        b"-Infinity",
        b"Infinity",
        b"0x1",
        b"01",
        b"1.0",
        b"1e2",
        b"-0",
        b"+1",
        b"1_0",
        b"1.",
        b".5",
        b"\xd9\xa1",
        b"9" * 5000,
        b"1E400",
        b"null",
        b"true",
        b'"1"',
    ]
    return replace(base, header=base.header[:place] + forms[_any(rng, forms)] + base.header[place + 1 :])


def text_duplicate_key(rng: Rng, base: Parts, others: Sequence[Parts]) -> Parts:
    """A key given twice, with the same or another value, or once as it is and once with an escape."""
    text = base.header.decode()
    places = [k for k in range(len(text)) if text[k] == "{" and text[k + 1 : k + 2] == '"']
    place = places[_any(rng, places)] + 1
    key = text[place : text.index(":", place)]
    twin = key if rng.random() < 0.7 else f'"\\u{ord(key[1]):04x}{key[2:]}'
    return replace(
        base,
        header=f"{text[:place]}{twin}:{['0', 'null', '[]', '[1,1]', chr(34) + 'c' + chr(34)][_any(rng, range(5))]},{text[place:]}".encode(),
    )


def text_nesting(rng: Rng, base: Parts, others: Sequence[Parts]) -> Parts:
    """Deep lists or objects in the place of a value, closed or not."""
    depth = [5, 7, 8, 9, 100, 5000, 200_000][_any(rng, range(7))]
    kind = int(rng.integers(3))
    deep = [b"[" * depth + b"]" * depth, b'{"a":' * depth + b"0" + b"}" * depth, b"[" * depth][kind]
    place = base.header.index(b":") + 1 if rng.random() < 0.5 else base.header.rindex(b":") + 1
    return replace(base, header=base.header[:place] + deep + b"," + base.header[place:])


def text_frame(rng: Rng, base: Parts, others: Sequence[Parts]) -> Parts:
    """Around the object: other encodings, marks, spaces, comments, nothing at all."""
    text = base.header
    forms = [
        b"\xef\xbb\xbf" + text, text + b" " * 70_000, text + b"\0", b"[" + text + b"]", text + text, b"", b" ", b"null", b"0", b"[]", b'"x"', b"{}",
        text.decode("utf-8", "replace").encode("utf-16"), text + b"//", b"\xff" + text, text[:-1] + b",}", text[:-1], b"{" + text, text.replace(b'"', b"'"),
    ]  # fmt: skip
    return replace(base, header=forms[_any(rng, forms)])


def version_or_flags(rng: Rng, base: Parts, others: Sequence[Parts]) -> Parts:
    start = bytearray(base.start)
    start[int(rng.integers(4, 6))] = int(rng.integers(256))
    return replace(base, start=bytes(start))


TEXT_MUTATORS = [
    text_bits,
    text_bits,
    text_piece,
    text_number,
    text_number,
    text_duplicate_key,
    text_nesting,
    text_frame,
    version_or_flags,
]

# ------------------------------------------------------------------------------------------- whole files, not repaired


def raw_damage(rng: Rng, data: bytes, other: bytes) -> tuple[str, bytes]:
    """Flipped, cut, longer, spliced with itself or with another file, or with other numbers in its first 18 bytes."""
    kind = int(rng.integers(6))
    if kind == 0:
        return "raw bits", _flipped(rng, data)
    if kind == 1:
        return "raw cut", data[: rng.integers(len(data))]
    if kind == 2:
        return "raw longer", data + rng.bytes(int(rng.integers(1, 100)))
    if kind == 3:
        a, b, n = (int(k) for k in rng.integers(0, len(data), 3))
        return "raw splice", data[:a] + data[b : b + n] + data[a + n :]
    if kind == 4:
        return "raw halves", data[: rng.integers(len(data))] + other[rng.integers(len(other)) :]
    bad = bytearray(data)
    struct.pack_into(
        "<I", bad, int(rng.choice([6, 10, 14])), int(rng.choice([0, 1, 18, 1 << 24, (1 << 24) + 1, 1 << 31, (1 << 32) - 1]))
    )
    return "raw lengths", bytes(bad)
