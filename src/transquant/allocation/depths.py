"""Integer bit depths by equal slope (Young et al., arXiv 2009.01174, section 5): the paper's allocation.

A group of coefficients with sensitivity h has, for each depth b, the step that errs least and its squared error; of all
points (b · count, h · error) the one with the least D + λ R is taken, with the same λ for all groups of coefficients and
of bases. The paper measures D by running the network; here it is the closed form (methods: G.2), and can be checked.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    x = values.reshape(-1)
    errors, quarters = [float(x @ x)], [0]
    largest = float(np.abs(x).max(initial=0.0))
    for depth in range(1, most + 1):
        if largest == 0:
            errors.append(0.0)
            quarters.append(0)
            continue
        # from the step that reaches the largest value on, downwards: finer steps clip more
        top = int(np.ceil(4 * np.log2(largest / (1 if depth == 1 else 2 ** (depth - 1)))))
        trials = [(float(np.sum((x - quantized(x, 2 ** ((top - k) / 4), depth)) ** 2)), top - k) for k in range(TRIES)]
        error, quarter = min(trials)
        errors.append(min(error, errors[-1]))
        quarters.append(quarter)
    return DepthTable(np.array(errors), np.array(quarters, np.int32), x.size)


def quantized(values: FloatArray, step: float, depth: int) -> FloatArray:
    """Decoded values of plain rounding with a saturating code of `depth` bits: −1, 1 for one bit, else two's complement."""
    if depth == 0:
        return np.zeros_like(values)
    if depth == 1:
        return np.where(values < 0, -step, step)
    half = 2 ** (depth - 1)
    decoded: FloatArray = np.clip(np.rint(values / step), -half, half - 1) * step
    return decoded
