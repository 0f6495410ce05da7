"""Dequantization compiled: the integers of `grid.dequantize`, and its values bit for bit, in one pass over the symbols."""

from __future__ import annotations

import numba as nb
import numpy as np
from numpy.typing import NDArray

from transquant.errors import CorruptFile
from transquant.grid import NOT_FLOAT32, QUARTERS
from transquant.records import IntArray
from transquant.trellis_code import TRELLIS_CODES

_LEAST = -1021  # exponent of the first entry of _POWERS
_POWERS = np.ldexp(1.0, np.arange(_LEAST, 1024))


def dequantize(
    symbols: IntArray, step: tuple[int, int], t: NDArray[np.int64], offsets: tuple[int, int], state_bits: int = 0, fold: int = 1
) -> NDArray[np.float32]:
    """`grid.dequantize`, with its arguments, float32 (rows, columns). Raises CorruptFile where a value does not fit float32."""
    values = np.empty(symbols.shape, np.float32)
    if symbols.size:
        segment = symbols.shape[1] // fold
        of_entries = np.broadcast_to(t, symbols.shape)
        if not _fill(symbols, of_entries, step[0] * QUARTERS, step[1] - 20, *offsets, *TRELLIS_CODES[state_bits], segment, values):
            raise CorruptFile(NOT_FLOAT32)
    return values


@nb.njit(cache=True, nogil=True)
def _fill(symbols, t, mantissas, exponent, first, more, feedback, forward, segment, values):  # type: ignore[no-untyped-def]
    rows, columns = symbols.shape
    good = True
    for i in range(rows):
        state = 0
        left = segment
        for j in range(columns):
            if left == 0:
                state, left = 0, segment
            left -= 1
            k = np.int64(symbols[i, j])
            if forward:
                if k == 0:
                    value = 16 - first
                else:
                    value = 64 * k + 16 - (more if k > 0 else -more)
                odd = state & 1
                if odd:
                    value = -value
                state = (state >> 1) ^ (feedback * odd) ^ (forward * (k & 1))
            elif k == 0:
                value = np.int64(0)
            else:
                offset = first if k == 1 or k == -1 else more
                value = 64 * k - (offset if k > 0 else -offset)
            index = t[i, j]
            # exact: an integer below 2^53 times a power of two
            exact = float(value * mantissas[index & 3]) * _POWERS[exponent + (index >> 2) - _LEAST]
            rounded = np.float32(exact)
            values[i, j] = rounded
            good &= np.isfinite(rounded)
    return good
