"""The step grid and dequantization of FORMAT.md section 3. numpy only: the portable reader uses it.

step of entry (i, j) = mantissa · K[t mod 4] · 2^(exponent + t // 4 − 14),   t = qp + 2·row_exponent[i] + 2·column_exponent[j],
or qp + 2·span_exponent[i, j // span]
"""

from __future__ import annotations

from math import floor, frexp, log2

import numpy as np
from numpy.typing import NDArray

from transquant.errors import CorruptFile
from transquant.records import CodedTensor, FloatArray, IntArray
from transquant.trellis_code import odd_states

QUARTERS = np.array([16384, 19484, 23170, 27554], dtype=np.int64)
MAX_QP = 400
MAX_EXPONENT = 64
NOT_FLOAT32 = "a decoded value does not fit float32"
_BLOCK = 1 << 18  # values dequantized at a time


def global_step(value: float) -> tuple[int, int]:
    """The (mantissa, exponent) nearest to a positive value, 2048 ≤ mantissa ≤ 4095."""
    fraction, exponent = frexp(value)  # 0.5 <= fraction < 1
    mantissa = round(fraction * 4096)
    if mantissa == 4096:
        mantissa, exponent = 2048, exponent + 1
    return mantissa, min(max(exponent - 12, -160), 60)


def on_grid(value: float) -> float:
    """The positive value nearest to another that the format has as its global step."""
    return float(steps(global_step(value), np.zeros((1, 1), np.int64))[0, 0])


def nearest_qp(ratio: float) -> int:
    """Quarter-octave index of a positive step relative to the global step, clamped to the format's range."""
    return int(min(max(floor(4 * log2(ratio) + 0.5), -MAX_QP), MAX_QP))


def total_index(qp: int, rows: IntArray | None, columns: IntArray | None, taps: int) -> NDArray[np.int64]:
    """t as int64, broadcastable to (rows, columns)."""
    t = np.full((1, 1), qp, np.int64)
    if rows is not None:
        t = t + 2 * rows.astype(np.int64)[:, None]
    if columns is not None:
        t = t + 2 * np.repeat(columns.astype(np.int64), taps)[None, :]
    return t


def tensor_index(tensor: CodedTensor) -> NDArray[np.int64]:
    """t of a tensor without fixed-length codes, int64, broadcastable to (rows, columns)."""
    entry = tensor.entry
    if tensor.span_exponents is not None:
        return entry.qp + 2 * np.repeat(tensor.span_exponents.astype(np.int64), entry.span, axis=1)[:, : entry.columns]
    return total_index(entry.qp, tensor.row_exponents, tensor.column_exponents, entry.group_columns)


def steps(step: tuple[int, int], t: NDArray[np.int64]) -> FloatArray:
    """Step sizes as float64, exact, the shape of t."""
    sizes: FloatArray = np.ldexp((step[0] * QUARTERS[t & 3]).astype(np.float64), step[1] + (t >> 2) - 14)
    return sizes


def dequantize(
    symbols: IntArray, step: tuple[int, int], t: NDArray[np.int64], offsets: tuple[int, int], state_bits: int = 0, fold: int = 1
) -> NDArray[np.float32]:
    """Values float32 of symbols int32 (rows, columns): integers below 2^53 times a power of two, rounded once.

    `offsets`: reconstruction offsets of magnitudes 1 and above, 1/64 step toward zero. `state_bits`: of a trellis, in which each
    row is `fold` paths; symbol k then stands for k + 1/4 steps or, in odd states, its negative, and the offsets are those of 0
    and of all others. Raises CorruptFile where a value does not fit float32. Works block by block: the integers take many times
    the memory of the values."""
    values = np.empty(symbols.shape, np.float32)
    odd = None
    if state_bits:
        paths = symbols.reshape(symbols.shape[0] * fold, symbols.shape[1] // fold)
        odd = odd_states(paths, state_bits).reshape(symbols.shape)
    rows = max(_BLOCK // max(symbols.shape[1], 1), 1)
    for first in range(0, symbols.shape[0], rows):
        for left in range(0, symbols.shape[1], _BLOCK):
            block = slice(first, first + rows), slice(left, left + _BLOCK)
            of_t = tuple(s if length > 1 else slice(1) for s, length in zip(block, t.shape, strict=True))
            values[block] = _dequantize(symbols[block], step, t[of_t], offsets, None if odd is None else odd[block])
    if not np.isfinite(values).all():
        raise CorruptFile(NOT_FLOAT32)
    return values


def _dequantize(
    symbols: IntArray, step: tuple[int, int], t: NDArray[np.int64], offsets: tuple[int, int], odd: NDArray[np.bool_] | None
) -> NDArray[np.float32]:
    wide = symbols.astype(np.int64)
    size = np.abs(wide)
    if odd is None:
        value = np.sign(wide) * (64 * size - np.where(size > 1, offsets[1], np.where(size == 1, offsets[0], 0)))
    else:
        value = 64 * wide + 16 - np.where(wide == 0, offsets[0], np.sign(wide) * offsets[1])
        value = np.where(odd, -value, value)
    product = value * (step[0] * QUARTERS[t & 3])
    with np.errstate(over="ignore", under="ignore"):
        return np.ldexp(product.astype(np.float64), step[1] + (t >> 2) - 20).astype(np.float32)  # type: ignore[no-any-return]
