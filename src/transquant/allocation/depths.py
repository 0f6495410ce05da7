"""Integer bit depths by equal slope (Young et al., arXiv 2009.01174, section 5): the paper's allocation.

A group of coefficients with sensitivity h has, for each depth b, the step that errs least and its squared error; of all
points (b · count, h · error) the one with the least D + λ R is taken, with the same λ for all groups of coefficients and
of bases. The paper measures D by running the network; here it is the closed form (methods: G.2), and can be checked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba as nb
import numpy as np

from transquant.records import FloatArray, IntArray

MOST_DEPTH = 8  # of coefficients; bases may have 16
TRIES = 14  # steps a depth, a quarter octave apart


@dataclass(frozen=True, slots=True)
class DepthTable:
    """Best step (as its log2 in quarter octaves) and squared error of a group by depth 0, 1, …; float64 and int32 (depths,)."""

    errors: FloatArray
    quarters: IntArray
    count: int

    def best(self, sensitivity: float, lmbda: float, least: int = 0) -> int:
        """The depth, at least `least`, of the smallest sensitivity · error + λ · bits."""
        costs = sensitivity * self.errors + lmbda * self.count * np.arange(len(self.errors))
        return least + int(np.argmin(costs[least:]))


def depth_table(values: FloatArray, most: int = MOST_DEPTH) -> DepthTable:
    """The table of a group's values, float64 of any shape; all depths 0 to `most`."""
    x = np.ascontiguousarray(values, np.float64).reshape(-1)
    largest = float(np.abs(x).max(initial=0.0))
    errors, quarters = np.zeros(most + 1), np.zeros(most + 1, np.int32)
    errors[0] = x @ x
    if largest > 0:
        for depth in range(1, most + 1):
            # from the step that reaches the largest value on, downwards: finer steps clip more
            top = int(np.ceil(4 * np.log2(largest / (1 if depth == 1 else 2 ** (depth - 1)))))
            quarters[depth] = top - np.arange(TRIES)[(trials := _squared_errors(x, top, depth)).argmin()]
            errors[depth] = min(trials.min(), errors[depth - 1])
    return DepthTable(errors, quarters, x.size)


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
