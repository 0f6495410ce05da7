"""Rounding to nearest with a saturating code of a fixed number of bits (FORMAT.md section 7), and its best steps."""

from __future__ import annotations

import numba as nb
import numpy as np

from transquant.records import FloatArray, IntArray

MOST_DEPTH = 8  # of coefficients; bases may have 16
TRIES = 14  # steps a depth, a quarter octave apart


def best_steps(values: FloatArray, most: int = MOST_DEPTH) -> tuple[FloatArray, IntArray]:
    """Least squared errors float64 (most + 1,) of values (float64, any shape) at depths 0 to `most`, and log2 of the steps
    that give them in quarter octaves, int32 (most + 1,)."""
    x = np.ascontiguousarray(values, np.float64).reshape(-1)
    largest = float(np.abs(x).max(initial=0.0))
    errors, quarters = np.zeros(most + 1), np.zeros(most + 1, np.int32)
    errors[0] = np.sum(x * x)  # not x @ x: how a dot product is summed up depends on the number of threads
    if largest > 0:
        for depth in range(1, most + 1):
            # from the step that reaches the largest value on, downwards: finer steps clip more
            top = int(np.ceil(4 * np.log2(largest / (1 if depth == 1 else 2 ** (depth - 1)))))
            quarters[depth] = top - np.arange(TRIES)[(trials := _squared_errors(x, top, depth)).argmin()]
            errors[depth] = min(trials.min(), errors[depth - 1])
    return errors, quarters


@nb.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz"})
def _squared_errors(x, top, depth):  # type: ignore[no-untyped-def]
    """Squared error of `quantized` at steps 2^(top/4), 2^((top − 1)/4), …: float64 (TRIES,)."""
    errors = np.zeros(TRIES)
    half = 2.0 ** (depth - 1)
    for k in range(TRIES):
        step = 2.0 ** ((top - k) / 4)
        total = 0.0
        for value in x:
            if depth == 1:
                error = abs(value) - step
            else:
                error = value - min(max(np.rint(value / step), -half), half - 1) * step
            total += error * error
        errors[k] = total
    return errors


def quantized(values: FloatArray, step: float, depth: int) -> FloatArray:
    """Decoded values of plain rounding with a saturating code of `depth` bits: −1, 1 for one bit, else two's complement."""
    if depth == 0:
        return np.zeros_like(values)
    if depth == 1:
        return np.where(values < 0, -step, step)
    half = 2 ** (depth - 1)
    decoded: FloatArray = np.clip(np.rint(values / step), -half, half - 1) * step
    return decoded
