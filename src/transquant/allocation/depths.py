"""Integer bit depths by equal slope (Young et al., arXiv 2009.01174, section 5): the paper's allocation.

A group of coefficients with sensitivity h has, for each depth b, the step that errs least and its squared error; of all
points (b · count, h · error) the one with the least D + λ R is taken, with the same λ for all groups of coefficients and
of bases. The paper measures D by running the network; here it is the closed form (methods: G.2), and can be checked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from transquant.records import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class DepthTable:
    """Least squared error of a group by depth 0, 1, … and its step (log2 in quarter octaves); float64 and int32 (depths,)."""

    errors: FloatArray
    quarters: IntArray
    count: int

    def best(self, sensitivity: float, lmbda: float, least: int = 0) -> int:
        """The depth, at least `least`, of the smallest sensitivity · error + λ · bits."""
        costs = sensitivity * self.errors + lmbda * self.count * np.arange(len(self.errors))
        return least + int(np.argmin(costs[least:]))
