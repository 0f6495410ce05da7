"""A weight as the product of few basis columns and as many bands: W = B T over its rows ("r") or its channels ("c").

Coefficients are those that err least for the basis as decoded, T = (Bᵀ M B)⁻¹ Bᵀ M X with M the cost of an error of a band, so
that the basis can be coarse. The metric of T's own errors is A, Bᵀ G B (rows) or B̃ᵀ A B̃, G (channels; B̃ is B on every tap).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from transquant.records import FloatArray
from transquant.transforms.algebra import congruence, product, solve
from transquant.transforms.fit import low_rank
from transquant.transforms.frame import band_cost
from transquant.transforms.layout import Layout


def low_rank_basis(layout: Layout, weight: FloatArray, column_moment: FloatArray, row_moment: FloatArray) -> FloatArray:
    """Columns float64 (r, k) such that the first of them are the best basis of every rank. Moments (n, n) and (O, O)."""
    return ranked(layout, weight, column_moment, row_moment)[0]


def ranked(layout: Layout, weight: FloatArray, column_moment: FloatArray, row_moment: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The same, and the squared error (k,) that is left without any column, with one, …; over channels the
    metric of the taps is averaged."""
    if layout.axis == "r":
        basis, values = low_rank(weight, row_moment, column_moment)
    else:
        left = torch.linalg.cholesky(torch.from_numpy(np.ascontiguousarray(row_moment + _least(row_moment)))).numpy()
        cost = band_cost(layout, column_moment, row_moment) / max(float(np.trace(row_moment)), 1e-300) / layout.taps
        basis, values = low_rank(layout.bands(product(np.ascontiguousarray(left.T), weight)), cost)
    return basis, np.cumsum((values**2)[::-1])[::-1]


def _least(moment: FloatArray) -> FloatArray:
    return np.eye(len(moment)) * (1e-6 * float(np.trace(moment)) / len(moment) + 1e-300)


@dataclass(frozen=True, slots=True)
class ReducedFrame:
    """`synthesis` float64 (r, K): the decoded basis of a weight, of which `layout` is the whole one's."""

    layout: Layout
    synthesis: FloatArray

    def analyze(self, weight: FloatArray, cost: FloatArray) -> FloatArray:
        """Coefficients (K, n) or (O, K · taps) of a weight (O, n), for the cost (r, r) of an error of a band."""
        weighted = product(np.ascontiguousarray(self.synthesis.T), cost)
        coeffs = solve(product(weighted, self.synthesis), product(weighted, self.layout.bands(weight)))
        return self._small.coded(coeffs)

    def synthesize(self, coeffs: FloatArray) -> FloatArray:
        """The weight (O, n) of coefficients."""
        return self.layout.weight(product(self.synthesis, self._small.coded_bands(coeffs)))

    def moments(self, moments: Sequence[tuple[FloatArray, FloatArray]]) -> list[tuple[FloatArray, FloatArray]]:
        """(A, G) of the coefficients' errors."""
        if self.layout.axis == "r":
            return [(a, congruence(self.synthesis, g)) for a, g in moments]
        spread: FloatArray = np.asarray(
            np.kron(self.synthesis, np.eye(self.layout.taps)), np.float64
        )  # columns of a weight are channel by channel
        return [(congruence(spread, a), g) for a, g in moments]

    @property
    def _small(self) -> Layout:
        kept = self.synthesis.shape[1]
        if self.layout.axis == "r":
            return Layout("r", kept, self.layout.channels, self.layout.taps)
        return Layout("c", self.layout.rows, kept, self.layout.taps)
