"""What each row of a weight costs at each depth, in bits and in distortion, from the weights as they are.

Bits: the code length of a row's rounded symbols under a Laplace law of their own spread, which is what a coder that adapts comes
near to. Distortion: rounding errors, weighted with the diagonals of the factored metric, as the closed loop makes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from transquant.quantizers.metric import factor, regularise
from transquant.records import FloatArray, LayerStats
from transquant.searching.policy import MOST

ALPHA, GAMMA = 0.02, 0.05  # dampings of the metric's factors, as compression supposes before it tunes them


@dataclass(frozen=True, slots=True)
class RowTable:
    """`bits` and `errors` float64 (O, 8) of rows at depths 1 … 8; `importance` float64 (O,), log2 by criterion."""

    bits: FloatArray
    errors: FloatArray
    importance: FloatArray

    def at(self, rows: np.ndarray, depths: FloatArray) -> tuple[float, float]:
        """Bits and distortion of some rows at their depths."""
        place = rows, depths.astype(np.int64) - 1
        return float(self.bits[place].sum()), float(self.errors[place].sum())


def row_table(weight: FloatArray, stats: LayerStats, criterion: str) -> RowTable:
    """The table of a weight, float64 (O, n)."""
    peaks = np.abs(weight).max(1)
    peaks = np.where(peaks > 0, peaks, 1.0)
    rows, columns = _sensitivities(stats)
    bits, errors = np.empty((2, len(weight), MOST))
    for depth in range(1, MOST + 1):
        sizes = (peaks * 2.0 ** (1 - depth))[:, None]
        symbols = np.rint(weight / sizes)
        bits[:, depth - 1] = _code_lengths(np.abs(symbols), np.abs(weight / sizes).mean(1))
        squares = (weight - symbols * sizes) ** 2
        per_group = squares.reshape(len(columns), -1, weight.shape[1]) * columns[:, None, :]
        errors[:, depth - 1] = per_group.sum(2).reshape(-1) * rows
    if criterion == "norm":
        importance = 2 * np.log2(np.maximum(np.abs(weight).sum(1), 1e-30))
    else:
        level = rows * np.repeat(columns.mean(1), len(weight) // len(columns))
        importance = np.log2(np.maximum(level * peaks**2, 1e-60))
    return RowTable(bits, errors, importance)


def _sensitivities(stats: LayerStats) -> tuple[FloatArray, FloatArray]:
    """Of rows, float64 (O,), and of columns by group, float64 (g, n): their products are those of the closed loop."""
    rows = [factor(regularise(g, GAMMA)).diagonal for g in stats.output_moment]
    columns = [factor(regularise(a, ALPHA), upper=True).diagonal for a in stats.input_moment]
    return np.concatenate(rows), np.stack(columns)


def _code_lengths(magnitudes: FloatArray, spread: FloatArray) -> FloatArray:
    """Bits of each row's symbols under a Laplace law with mean magnitude `spread`, in steps; float64 (O,)."""
    spread = np.maximum(spread, 0.02)
    zero = -np.expm1(-0.5 / spread)  # probability of symbol 0
    decay = np.log2(np.e) / spread  # bits of one magnitude more
    first = 1 - np.log2(1 - zero) - np.log2(-np.expm1(-1 / spread))  # bits of magnitude 1: half of the others' probability
    count = (magnitudes > 0).sum(1)
    bits: FloatArray = (magnitudes.shape[1] - count) * -np.log2(zero) + count * first + (magnitudes.sum(1) - count) * decay
    return bits
