"""Sums over micro-batches, and the statistics of a layer from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transquant.records import FloatArray, LayerStats, WeightSpec
from transquant.stats.inputs import InputSums
from transquant.stats.moments import Shape
from transquant.stats.shrinkage import centre, cross_validated, mean_moment, outer

OWN_SCALE = ("attention",)  # kinds whose groups are so different in use that each has a scale of its own


@dataclass(slots=True)
class Sums:
    """Over one micro-batch (or, added up, over all): float64 tensors by weight name, squared gradients by key. Moments of one
    micro-batch may be float32."""

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
    inputs: dict[str, InputSums] = field(default_factory=dict)  # histograms, where they are asked for

    def add(self, other: Sums) -> None:
        """Add a later micro-batch."""
        for part in ("columns", "rows", "totals", "positions", "row_squares", "column_squares", "vectors", "inputs"):
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

    def widened(self) -> Sums:
        """The same with all moments in float64, so that others can be added."""
        columns, rows = ({name: m.double() for name, m in part.items()} for part in (self.columns, self.rows))
        return replace(self, columns=columns, rows=rows)

    def without_moments(self) -> Sums:
        """A copy of all that is small."""
        return Sums(
            {}, {}, _copy(self.totals), _copy(self.positions), _copy(self.row_squares), _copy(self.column_squares),
            {k: list(v) for k, v in self.energies.items()}, _copy(self.vectors), self.samples, self.unit,
            {k: v.clone() for k, v in self.inputs.items()},
        )  # fmt: skip

    def pieces(self) -> Iterator[Piece]:
        """All that is small, then one moment after the other: what `assembled` puts together again."""
        yield "", "", self.without_moments()
        for part in ("columns", "rows"):
            for name, moment in getattr(self, part).items():
                yield part, name, moment


Piece = tuple[str, str, Any]  # part, weight, moment; or "", "", the rest


def assembled(pieces: Iterable[tuple[int, Piece]]) -> list[Sums]:
    """The folds, in order, of all their pieces."""
    folds: dict[int, Sums] = {}
    for fold, (part, name, value) in pieces:
        if part:
            getattr(folds[fold], part)[name] = value
        else:
            folds[fold] = value
    return [folds[k] for k in sorted(folds)]


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def together(folds: Sequence[Sums]) -> Sums:
    """The sum of folds, moments left out."""
    total = folds[0].without_moments()
    for fold in folds[1:]:
        total.add(fold.without_moments())
    return total


def layer_stats(spec: WeightSpec, folds: Sequence[Sums], total: Sums, shape: Shape, cross_validate: bool = True) -> LayerStats:
    """Moments scaled so that an error that is white costs what the squared gradients say: tr A · tr G = E‖∇W‖².

    `folds`: sums over parts of the samples, out of which the weight's moments are taken; `total`: theirs `together`;
    `cross_validate`: eigenvalues by cross-validation."""
    name = spec.name
    if name in total.positions:
        input_moment, output_moment = _moments(name, folds, cross_validate)
        for other in dict.fromkeys(tied_name(name, use.kind) for use in spec.tied):
            if other in total.positions:
                input_moment, output_moment = both(input_moment, output_moment, *_moments(other, folds, cross_validate))
    elif name in total.row_squares:
        input_moment, output_moment = total.column_squares[name].numpy(), total.row_squares[name].numpy()
    else:  # never reached
        return LayerStats(np.zeros((shape.groups, shape.columns)), np.zeros((shape.groups, shape.rows)), 0, 0.0, 0.0)
    if spec.rescaled and name in total.positions:
        output_moment = rescaled_rows(output_moment, total.row_squares[name].numpy())
    energies = np.array(total.energies[name])  # (micro-batches, g)
    energy = float(energies.sum(1).mean())
    error = float(energies.sum(1).std(ddof=1) / len(energies) ** 0.5 / energy) if len(energies) > 1 and energy > 0 else 0.0
    products, by_group = _traces(input_moment) * _traces(output_moment), energies.mean(0)
    if spec.kind not in OWN_SCALE:
        products, by_group = np.full_like(products, products.sum()), np.full_like(by_group, by_group.sum())
    scale = np.divide(by_group, products, out=np.zeros_like(products), where=products > 0) * total.unit
    output_moment = output_moment * scale.reshape(-1, *(1,) * (output_moment.ndim - 1))
    # one memory layout, wherever a layer was computed: it may decide how products are summed up
    moments = np.ascontiguousarray(input_moment), np.ascontiguousarray(output_moment)
    stats = LayerStats(*moments, total.samples, energy, error)
    if name not in total.totals:
        return stats
    return replace(stats, input_mean=(total.totals[name] / total.positions[name].clamp(min=1)[:, None]).numpy())


def tied_name(name: str, kind: str) -> str:
    """Key of the moments of a weight's use in a layer of another kind than its own."""
    return f"{name} as {kind}"


def _moments(name: str, folds: Sequence[Sums], cross_validate: bool) -> tuple[FloatArray, FloatArray]:
    """Moments of the columns, a mean over positions, and of the rows, a sum over those of a sample."""
    seen = [h for h in folds if name in h.columns]
    positions = [h.positions[name] for h in seen]
    samples = [torch.full_like(p, h.samples) for h, p in zip(seen, positions, strict=True)]
    # out of the folds: moments of all layers together are large, and those that are done need not be kept
    columns, rows = [h.columns.pop(name) for h in seen], [h.rows.pop(name) for h in seen]
    estimate = cross_validated if cross_validate else mean_moment
    if not cross_validate or name not in seen[0].totals or columns[0].ndim == 2:
        return estimate(columns, positions).numpy(), estimate(rows, samples).numpy()
    totals = [h.totals[name] for h in seen]
    mean = mean_moment(totals, positions)
    for sums, total, count in zip(columns, totals, positions, strict=True):
        centre(sums, total, count, mean)
    moment = estimate(columns, positions).add_(outer(mean.reshape(columns[0].shape[:-1])))
    return moment.numpy(), estimate(rows, samples).numpy()


def both(a: FloatArray, g: FloatArray, b: FloatArray, h: FloatArray) -> tuple[FloatArray, FloatArray]:
    """One Kronecker product for two uses, in the place of G ⊗ A + H ⊗ B: the mean of both factors, weighted with each use's
    share of the cost. It has the same trace, and what is dear in either use is dear."""
    first, second = float((_traces(a) * _traces(g)).sum()), float((_traces(b) * _traces(h)).sum())
    if not (first > 0 and second > 0):
        return (a, g) if first > 0 else (b, h)
    columns = _added(a * (first / _traces(a).sum()), b * (second / _traces(b).sum()))
    rows = _added(g * (first / _traces(g).sum()), h * (second / _traces(h).sum()))
    return columns / (first + second), rows


def _added(one: FloatArray, two: FloatArray) -> FloatArray:
    """Sum of two moments, kept as the fuller of both; of blocks of unlike sizes only the diagonals."""
    if one.shape == two.shape:
        return one + two
    full, other = (one, two) if one.ndim > two.ndim else (two, one)
    if other.ndim > 2:
        return _diagonal(full) + _diagonal(other)
    extra = other.reshape(*full.shape[:-1])
    added: FloatArray = full + extra[..., None] * np.eye(full.shape[-1])
    return added


def _diagonal(moment: FloatArray) -> FloatArray:
    diagonal: FloatArray = np.einsum("...ii->...i", moment).reshape(len(moment), -1)
    return diagonal


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
