"""From weights to coefficients and back, with the metric: D = tr(G E A Eᵀ) stays what it is in any basis.

With W = C Bᵀ (an axis of the columns; B = S over the axis, expanded to n × n) or W = S C (the rows):

    A → Bᵀ A B    or    G → Sᵀ G S

Feedback in the coefficient domain is feedback with these moments. S is the basis *as decoded*: coefficients are analyzed by
its exact inverse, so a coarse basis costs some coding gain and no distortion. In the open loop, as published, coefficients
come from the exact basis, and the basis' own error adds to theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from transquant.records import FloatArray, IntArray
from transquant.transforms.algebra import condition, congruence, inverse, product
from transquant.transforms.exact import DCT_BITS, dct_basis
from transquant.transforms.layout import Layout

BASIS_BITS = 12
WORST_CONDITION = 1e4


@dataclass(frozen=True, slots=True)
class Frame:
    """One weight's transform: `synthesis` float64 (r, r), the decoded basis with columns of about unit norm; `analysis`
    (r, r), from bands to coefficients. `basis` int32 (r, r) as it is sent, None for a DCT: an integer of column b stands
    for 2^(quarters[b] / 4), int32 (r,), which the steps of the coefficients take over."""

    layout: Layout
    synthesis: FloatArray
    analysis: FloatArray
    quarters: IntArray
    basis: IntArray | None = None

    @property
    def scales(self) -> FloatArray:
        """What an integer of each column stands for, float64 (r,)."""
        return 2.0 ** (self.quarters / 4)

    def analyze(self, weight: FloatArray) -> FloatArray:
        """Coefficients (O, n) of a weight (O, n)."""
        coded: FloatArray = self.layout.coded(product(self.analysis, self.layout.bands(weight)))
        return coded

    def synthesize(self, coeffs: FloatArray) -> FloatArray:
        """The weight (O, n) of coefficients (O, n)."""
        weight: FloatArray = self.layout.weight(product(self.synthesis, self.layout.coded_bands(coeffs)))
        return weight

    def column_moment(self, moment: FloatArray) -> FloatArray:
        """A in the coefficient domain; (n, n), or (n,) where only the diagonal is known (off-diagonals it gets are dropped)."""
        if self.layout.axis == "r":
            return moment
        s, channels, taps = self.synthesis, self.layout.channels, self.layout.taps
        if moment.ndim == 1:
            if self.layout.axis == "k":
                return np.ascontiguousarray(product(moment.reshape(channels, taps), s**2).T).reshape(-1)
            if self.layout.axis == "c":
                return product((s**2).T, moment.reshape(channels, taps)).reshape(-1)
            return product(moment[None], s**2).reshape(-1)
        a, t = torch.from_numpy(moment), torch.from_numpy(s)
        if self.layout.axis == "j":
            return (t.T @ a @ t).numpy()
        n = channels * taps
        a = a.reshape(channels, taps, channels, taps)
        if self.layout.axis == "k":
            a = torch.einsum("ikjl,lb->ikjb", a, t)
            return torch.einsum("ikjb,ka->aibj", a, t).reshape(n, n).contiguous().numpy()
        a = torch.einsum("ikjl,jb->ikbl", a, t)
        return torch.einsum("ikbl,ia->akbl", a, t).reshape(n, n).contiguous().numpy()

    def row_moment(self, moment: FloatArray) -> FloatArray:
        """G in the coefficient domain; (O, O), or (O,) where only the diagonal is known."""
        if self.layout.axis != "r":
            return moment
        s = self.synthesis
        return product(moment[None], s**2).reshape(-1) if moment.ndim == 1 else congruence(s, moment)


def band_cost(layout: Layout, column_moment: FloatArray, row_moment: FloatArray) -> FloatArray:
    """G of `fit`, float64 (r, r): what an error of a band costs, all else averaged. Moments as in `Frame`."""
    a, g = column_moment, row_moment
    trace_rows = float(g.sum() if g.ndim == 1 else np.trace(g))
    if layout.axis == "r":
        trace_columns = float(a.sum() if a.ndim == 1 else np.trace(a))
        return trace_columns * (np.diag(g) if g.ndim == 1 else g)
    if layout.axis == "j":
        return trace_rows * (np.diag(a) if a.ndim == 1 else a)
    if a.ndim == 1:
        return trace_rows * np.diag(a.reshape(layout.channels, layout.taps).sum(1 if layout.axis == "c" else 0))
    full = a.reshape(layout.channels, layout.taps, layout.channels, layout.taps)
    cost: FloatArray = np.einsum("ikjk->ij" if layout.axis == "c" else "ikil->kl", full)
    return trace_rows * cost


def dct_frame(layout: Layout, kernel: tuple[int, ...]) -> Frame:
    """The DCT over a kernel; nothing is sent."""
    synthesis = np.asarray(dct_basis(kernel) * 2.0**-DCT_BITS, np.float64)
    return Frame(layout, synthesis, inverse(synthesis), np.full(len(synthesis), -4 * DCT_BITS, np.int32))


def closed_frame(layout: Layout, synthesis: FloatArray, bits: int) -> Frame:
    """The frame of a basis with unit-norm columns, rounded to multiples of 2^−bits; finer where that is nearly singular."""
    for finer in range(bits, BASIS_BITS + 1):
        basis = np.rint(synthesis * 2.0**finer).astype(np.int32)
        decoded = np.asarray(basis * 2.0**-finer, np.float64)
        if condition(decoded) < WORST_CONDITION:
            break
    return Frame(layout, decoded, inverse(decoded), np.full(len(basis), -4 * finer, np.int32), basis)


def open_frame(layout: Layout, synthesis: FloatArray, basis: IntArray, quarters: IntArray) -> Frame:
    """The open loop's frame: `basis` holds the columns of `synthesis` in units of 2^(quarters / 4), coefficients come from
    the exact one. A band whose column vanishes has no coefficients."""
    dead = np.abs(basis).max(0) == 0
    decoded = np.where(dead[None, :], synthesis, basis * 2.0 ** (quarters / 4))
    return Frame(layout, decoded, np.where(dead[:, None], 0, inverse(synthesis)), quarters, basis)
