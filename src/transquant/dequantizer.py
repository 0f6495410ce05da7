"""Dequantization compiled: the integers of `grid.dequantize`, and its values bit for bit, in one pass over the symbols."""

from __future__ import annotations

import numba as nb
import numpy as np
from numpy.typing import NDArray

from transquant.errors import CorruptFile
from transquant.grid import NOT_FLOAT32, QUARTERS
from transquant.records import IntArray
from transquant.trellis_code import TRELLIS_CODES

_TOO_LARGE = 2.0**128 - 2.0**103  # the least that float32 rounds to infinity


def dequantize(
    symbols: IntArray, step: tuple[int, int], t: NDArray[np.int64], offsets: tuple[int, int], state_bits: int = 0, fold: int = 1
) -> NDArray[np.float32]:
    """`grid.dequantize`, with its arguments, float32 (rows, columns). Raises CorruptFile where a value does not fit float32."""
    values = np.empty(symbols.shape, np.float32)
    # products of both are exact: 26 and 27 bits, and a power of two
    scales = np.ldexp((step[0] * QUARTERS[t & 3]).astype(np.float64), step[1] + (t >> 2) - 20)
    if state_bits and symbols.size:
        fits = _rebuild_paths(symbols, scales, *offsets, *TRELLIS_CODES[state_bits], symbols.shape[1] // fold, values)
    else:
        fits = _rebuild(symbols, scales, *offsets, values)
    if not fits:
        raise CorruptFile(NOT_FLOAT32)
    return values


@nb.njit(cache=True, nogil=True)
def _rebuild(symbols, scales, first, more, values):  # type: ignore[no-untyped-def]
    """`scales`: float64, one row or as many as `symbols`, one column or as many. Whether all values fit."""
    rows, columns = symbols.shape
    fits = True
    first, more = np.int32(first), np.int32(more)
    for i in range(rows):
        of_row, given, found = scales[i % len(scales)], symbols[i], values[i]
        if len(of_row) == 1:
            scale = of_row[0]
            for j in range(columns):
                value = _middle(given[j], first, more) * scale
                fits &= abs(value) < _TOO_LARGE
                found[j] = np.float32(value)
        else:
            for j in range(columns):
                value = _middle(given[j], first, more) * of_row[j]
                fits &= abs(value) < _TOO_LARGE
                found[j] = np.float32(value)
    return fits


@nb.njit(cache=True, nogil=True, inline="always")
def _middle(k, first, more):  # type: ignore[no-untyped-def]
    """What a symbol without a trellis stands for, in 1/64 step: int32, as its arguments."""
    size = np.int32(abs(k))
    offset = more if size > 1 else (first if size == 1 else np.int32(0))
    value = np.int32(np.int32(size << 6) - offset)
    return value if k >= 0 else np.int32(-value)


@nb.njit(cache=True, nogil=True)
def _rebuild_paths(symbols, scales, first, more, feedback, forward, segment, values):  # type: ignore[no-untyped-def]
    rows, columns = symbols.shape
    fits = True
    for i in range(rows):
        of_row, given, found = scales[i % len(scales)], symbols[i], values[i]
        along = 1 if len(of_row) > 1 else 0
        for begin in range(0, columns, segment):
            state = 0
            for j in range(begin, begin + segment):
                k = given[j]
                offset = first if k == 0 else (more if k > 0 else -more)
                middle = 64 * k + 16 - offset
                odd = state & 1
                value = (-middle if odd else middle) * of_row[j * along]
                fits &= abs(value) < _TOO_LARGE
                found[j] = np.float32(value)
                state = (state >> 1) ^ (feedback * odd) ^ (forward * (k & 1))
    return fits
