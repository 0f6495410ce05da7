"""Large sections come in streams, which are coded on their own and so in parallel (FORMAT.md section 5). numpy only."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from transquant.entropy.tables import WEIGHTS
from transquant.errors import CorruptFile
from transquant.records import Coder

STREAM_VALUES = 1 << 20
MAX_STREAMS = 8


def num_streams(coder: Coder, values: int) -> int:
    """Streams of a symbol section of so many values."""
    return 1 if coder == "s" else min(max(values // STREAM_VALUES, 1), MAX_STREAMS)


def rows_of(stream: int, streams: int, rows: int, kind: int) -> range:
    """Rows of a plane in one of the streams: all but weights are in the first."""
    if kind != WEIGHTS:
        return range(rows if stream == 0 else 0)
    return range(rows * stream // streams, rows * (stream + 1) // streams)


def join(streams: Sequence[bytes]) -> bytes:
    """The bytes of a section: lengths of all streams but the last, then the streams."""
    return struct.pack(f"<{len(streams) - 1}I", *(len(s) for s in streams[:-1])) + b"".join(streams)


def cut(data: bytes, streams: int) -> list[bytes]:
    """The streams of a section. Raises CorruptFile."""
    start = 4 * (streams - 1)
    if len(data) < start:
        raise CorruptFile(f"a symbol section of {len(data)} bytes is too short for its {streams} streams")
    lengths = struct.unpack_from(f"<{streams - 1}I", data)
    if start + sum(lengths) > len(data):
        raise CorruptFile(f"a symbol section of {len(data)} bytes has streams of {start + sum(lengths)}")
    pieces = []
    for length in (*lengths, len(data) - start - sum(lengths)):
        pieces.append(data[start : start + length])
        start += length
    return pieces
