"""The bytes of one sample's map at one point: whose they are, how large the map is, a checksum, the payload.

    codec     4 bytes   fingerprint of the codec file
    checksum  4 bytes   CRC-32 of all other bytes, little-endian
    place     varint    8 · number of the point + number of axes
    lengths   varints   of each axis beside the channels: none of a vector, (T) of a sequence, (height, width) of an image
    payload   the rest

A varint is an integer in groups of seven bits, the lowest first; all groups but the last have the eighth bit set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

from transquant.errors import CorruptFile
from transquant.features.maps import Lengths

FINGERPRINT = 4
MAX_AXES = 7
_HEAD = FINGERPRINT + 4
_GROUPS = 5  # of a varint at most: 35 bits


@dataclass(frozen=True, slots=True)
class Packet:
    """`index`: of the point in the codec; `lengths`: of the axes beside samples and channels."""

    index: int
    lengths: Lengths
    payload: bytes


def pack(fingerprint: bytes, packet: Packet) -> bytes:
    """The bytes of a packet."""
    assert len(fingerprint) == FINGERPRINT
    assert len(packet.lengths) <= MAX_AXES
    rest = _varints([8 * packet.index + len(packet.lengths), *packet.lengths]) + packet.payload
    return fingerprint + crc32(rest, crc32(fingerprint)).to_bytes(4, "little") + rest


def unpack(data: bytes, fingerprint: bytes) -> Packet:
    """The packet of some bytes. Raises CorruptFile where they are damaged, or another codec's."""
    if len(data) <= _HEAD:
        raise CorruptFile(f"a packet of {len(data)} bytes is truncated: the shortest have {_HEAD + 1}")
    codec, rest = data[:FINGERPRINT], data[_HEAD:]
    if crc32(rest, crc32(codec)) != int.from_bytes(data[FINGERPRINT:_HEAD], "little"):
        raise CorruptFile(f"a packet of {len(data)} bytes is damaged or truncated: its checksum does not match")
    if codec != fingerprint:
        raise CorruptFile(f"the packet is of another codec: its fingerprint is {codec.hex()}, this codec's {fingerprint.hex()}")
    place, position = _varint(rest, 0)
    lengths = []
    for _ in range(place % 8):
        length, position = _varint(rest, position)
        if length == 0:
            raise CorruptFile("a packet is of a map without pixels")
        lengths.append(length)
    return Packet(place // 8, tuple(lengths), rest[position:])


def _varints(numbers: Sequence[int]) -> bytes:
    result = bytearray()
    for number in numbers:
        while number > 127:
            result.append(number & 127 | 128)
            number >>= 7
        result.append(number)
    return bytes(result)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """(number, position behind it)."""
    number = 0
    for group in range(_GROUPS):
        if position + group >= len(data):
            break
        number |= (data[position + group] & 127) << (7 * group)
        if data[position + group] < 128:
            return number, position + group + 1
    raise CorruptFile("a packet ends in the middle of its header")
