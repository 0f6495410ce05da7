"""Sums over micro-batches, and the statistics of a layer from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from transquant.records import FloatArray, LayerStats, WeightSpec
from transquant.stats.moments import Shape

OWN_SCALE = ("attention",)  # kinds whose groups are so different in use that each has a scale of its own


@dataclass(slots=True)
class Sums:
    """Over one micro-batch (or, added up, over all): float64 tensors by weight name, squared gradients by key."""

    columns: dict[str, Tensor]  # moments, as in `Moments`
    rows: dict[str, Tensor]
    totals: dict[str, Tensor]
    positions: dict[str, Tensor]
    row_squares: dict[str, Tensor]  # squared gradients (g, o) and (g, n), where they are needed
    column_squares: dict[str, Tensor]
    energies: dict[str, list[FloatArray]]  # ‖∇W‖² a sample by group (g,), of each micro-batch
    vectors: dict[str, Tensor]
    samples: int
    unit: float

    def add(self, other: Sums) -> None:
        """Add a later micro-batch."""
        for part in ("columns", "rows", "totals", "positions", "row_squares", "column_squares", "vectors"):
            mine, theirs = getattr(self, part), getattr(other, part)
            for name, value in theirs.items():
                if name in mine:
                    mine[name] += value
                else:
                    mine[name] = value
        for name, values in other.energies.items():
            self.energies.setdefault(name, []).extend(values)
        self.unit = (self.unit * self.samples + other.unit * other.samples) / (self.samples + other.samples)
        self.samples += other.samples


def layer_stats(spec: WeightSpec, total: Sums, shape: Shape) -> LayerStats:
    """Moments scaled so that an error that is white costs what the squared gradients say: tr A · tr G = E‖∇W‖²."""
    name = spec.name
    if name in total.columns:
        positions = total.positions[name].clamp(min=1)
        moment = total.columns[name]
        input_moment = (moment / positions.reshape(-1, *(1,) * (moment.ndim - 1))).numpy()
        output_moment = (total.rows[name] / total.samples).numpy()
    elif name in total.row_squares:
        input_moment, output_moment = total.column_squares[name].numpy(), total.row_squares[name].numpy()
    else:  # never reached
        return LayerStats(np.zeros((shape.groups, shape.columns)), np.zeros((shape.groups, shape.rows)), 0, 0.0, 0.0)
    if spec.rescaled and name in total.columns:
        output_moment = rescaled_rows(output_moment, total.row_squares[name].numpy())
    energies = np.array(total.energies[name])  # (micro-batches, g)
    energy = float(energies.sum(1).mean())
    error = float(energies.sum(1).std(ddof=1) / len(energies) ** 0.5 / energy) if len(energies) > 1 and energy > 0 else 0.0
    products, by_group = _traces(input_moment) * _traces(output_moment), energies.mean(0)
    if spec.kind not in OWN_SCALE:
        products, by_group = np.full_like(products, products.sum()), np.full_like(by_group, by_group.sum())
    scale = np.divide(by_group, products, out=np.zeros_like(products), where=products > 0) * total.unit
    output_moment = output_moment * scale.reshape(-1, *(1,) * (output_moment.ndim - 1))
    stats = LayerStats(input_moment, output_moment, total.samples, energy, error)
    if name not in total.totals:
        return stats
    return replace(stats, input_mean=(total.totals[name] / positions[:, None]).numpy())


def rescaled_rows(moment: FloatArray, squares: FloatArray) -> FloatArray:
    """The moment of rows (g, o, o) or (g, o), that of W = diag(s) V, for V: diagonal in proportion to V's squared gradients."""
    diagonal = moment if moment.ndim == 2 else np.einsum("kii->ki", moment)
    factors = np.divide(squares, diagonal, out=np.zeros_like(squares), where=diagonal > 0)
    if moment.ndim == 2:
        return moment * factors
    scale = np.sqrt(factors)
    return moment * scale[:, :, None] * scale[:, None, :]


def _traces(moment: FloatArray) -> FloatArray:
    """Trace of each group's moment, float64 (g,)."""
    diagonal = np.einsum("...ii->...i", moment) if moment.ndim > 2 else moment
    traces: FloatArray = diagonal.reshape(len(moment), -1).sum(1)
    return traces
