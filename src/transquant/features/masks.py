"""Masks of what is 0 and what is not, and what is not, compiled."""

from __future__ import annotations

import numba as nb
import numpy as np


@nb.njit(cache=True, nogil=True)
def pack(symbols, valued, signed, most, masks, indices):  # type: ignore[no-untyped-def]
    """Mask bits of all symbols, and of the first `valued` that are not 0 |q| − 1, of negative ones 127 more; how many those are,
    or -1 where a symbol is out of range."""
    count = 0
    for k in range(len(symbols)):
        q = symbols[k]
        if q == 0:
            continue
        masks[k >> 3] |= np.uint8(128 >> (k & 7))
        if k < valued:
            size = abs(q)
            if size > most or (q < 0 and not signed):
                return -1
            indices[count] = size - 1 if q > 0 else size - 1 + most
            count += 1
        elif q != 1:
            return -1
    return count


@nb.njit(cache=True, nogil=True)
def population(masks, valued):  # type: ignore[no-untyped-def]
    """How many of the first `valued` bits are 1."""
    count = 0
    for k in range(valued):
        count += (masks[k >> 3] >> (7 - (k & 7))) & 1
    return count


@nb.njit(cache=True, nogil=True)
def unpack(masks, indices, valued, signed, symbols):  # type: ignore[no-untyped-def]
    """The mirror of `pack`."""
    count = 0
    for k in range(len(symbols)):
        bit = (masks[k >> 3] >> (7 - (k & 7))) & 1
        if bit == 1 and k < valued:
            index = indices[count]
            count += 1
            symbols[k] = -(index - 126) if signed and index >= 127 else index + 1
        else:
            symbols[k] = bit
