"""Fixed-length codes read by compiled code: the integers of `packing.read_codes`."""

from __future__ import annotations

import numba as nb
import numpy as np

from transquant.records import IntArray


def read_codes(data: bytes, bit: int, depth: int, count: int) -> IntArray:
    """`packing.read_codes`, with its arguments."""
    codes = np.empty(count, np.int32)
    _read(np.frombuffer(data, np.uint8), bit, depth, codes)
    return codes


@nb.njit(cache=True, nogil=True)
def _read(data, bit, depth, codes):  # type: ignore[no-untyped-def]
    mask = (1 << depth) - 1
    byte = bit >> 3
    held = 8 - (bit & 7)  # bits of `window` that are still to be read
    window = np.int64(data[byte]) if byte < len(data) else np.int64(0)
    byte += 1
    for i in range(len(codes)):
        while held < depth:
            window = ((window << 8) | data[byte]) & 0xFFFFFFFF
            byte += 1
            held += 8
        held -= depth
        codes[i] = (window >> held) & mask
