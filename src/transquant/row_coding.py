"""Rows of one weight, quantized some at a time: with the steps, offsets and basis that the whole weight has been given.

    target of some rows ─ analyze ─ A, G[rows, rows] ─ feedback, trellis ─ symbols of these rows

What the other rows have lost is not fed back here: whoever quantizes some rows first lets the others learn to make up for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from transquant.choices import Choice, LayerTransform
from transquant.entropy.tables import magnitude_laws
from transquant.grid import steps, tensor_index
from transquant.quantizers.feedback import Rounding
from transquant.quantizers.metric import Factor, factor
from transquant.quantizers.trellis import SIZES, Trellis
from transquant.records import CodedTensor, FloatArray, IntArray, LayerStats
from transquant.transforms.frame import Frame
from transquant.weights import Moments, dequantized, frame_of, lagrangian, metric_of, quantize_groups


@dataclass(frozen=True, slots=True)
class CodedRows:
    """Symbols int32 (k, n) of some rows and their values as a reader will give them, float64 (k, n); `counts`: what the trellis
    has learned of code lengths, for the rows to come."""

    symbols: IntArray
    values: FloatArray
    counts: FloatArray | None


class RowCoder:
    """Quantizes rows of one weight, with the entry, exponents and basis of `tensor`, what it is as a whole. `moments`: of each
    group (A, G), regularised; `frame`: of its transform; `bit`: what a bit costs, units of the metric; `rounding`: where there is
    no trellis."""

    def __init__(
        self, tensor: CodedTensor, moments: Moments, frame: Frame | None, bit: float, step: tuple[int, int], rounding: Rounding
    ) -> None:
        self.tensor, self.moments, self.frame, self.bit, self.step = tensor, moments, frame, bit, step
        trellised = tensor.entry.coding == "t"
        self.rounding = Rounding(offsets=tensor.entry.recon_offsets) if trellised else rounding
        self._input_moments = [a if frame is None else frame.column_moment(a) for a, _ in moments]
        self.sizes = self._sizes(tensor)

    @classmethod
    def of(
        cls, tensor: CodedTensor, weight: FloatArray, stats: LayerStats, c: float, step: tuple[int, int], choice: Choice,
        transform: LayerTransform,
    ) -> RowCoder:  # fmt: skip
        """For `tensor`: float64 (O, n) `weight`, quantized as a whole with scalar c and the same `choice` and `transform`."""
        _, damped, _ = metric_of(weight, stats, c, choice)
        frame = frame_of(tensor.entry, weight, damped, transform, None)
        return cls(tensor, damped, frame, choice.rate * lagrangian(c), step, choice.rounding())

    @cached_property
    def _input_factors(self) -> list[Factor]:
        return [factor(a, upper=True) for a in self._input_moments]

    @property
    def units(self) -> FloatArray:
        """What a weight moves by in a step, float64 (O, n): its own, or the mean of its row's where coefficients have steps."""
        if self.frame is None:
            return np.array(self.sizes)
        return np.broadcast_to(np.sqrt((self.sizes**2).mean(1, keepdims=True)), self.sizes.shape).copy()

    def _sizes(self, tensor: CodedTensor) -> FloatArray:
        sizes = steps(self.step, tensor_index(tensor))
        if self.frame is not None:
            sizes = sizes / self.frame.layout.per_band(self.frame.scales)
        return np.broadcast_to(sizes, tensor.symbols.shape)

    def code(
        self, rows: IntArray, target: FloatArray, tilt: float, counts: FloatArray | None, exponents: IntArray | None = None
    ) -> CodedRows:  # fmt: skip
        """Quantize some rows, int (k,) in ascending order, towards a target float64 (k, n). `tilt`: what a bit costs, relative to
        its price at c; `counts` of rows before these; `exponents`: other row exponents than the tensor's, int32 (O,)."""
        entry, symbols, all_sizes = self.tensor.entry, np.empty(target.shape, np.int32), self.sizes
        if exponents is not None:
            all_sizes = self._sizes(replace(self.tensor, row_exponents=exponents))
        coeffs = target
        if self.frame is not None:
            coeffs = replace(self.frame, layout=replace(self.frame.layout, rows=len(rows))).analyze(target)
        height = entry.rows // len(self.moments)
        for group, (_, moment) in enumerate(self.moments):
            mine = np.flatnonzero(rows // height == group)
            if not len(mine):
                continue
            own, trellis = rows[mine] - group * height, None
            if entry.coding == "t":
                trellis = Trellis(entry.state_bits, len(mine), entry.columns // entry.fold, magnitude_laws(SIZES), counts)
            left = factor(moment[own] if moment.ndim == 1 else np.ascontiguousarray(moment[np.ix_(own, own)]))
            factors = [(self._input_factors[group], left)]
            sizes = np.ascontiguousarray(all_sizes[rows[mine]])
            symbols[mine], _ = quantize_groups(coeffs[mine], sizes, factors, self.rounding, None, trellis, self.bit * tilt)
            counts = None if trellis is None else trellis.counts
        exponents = self.tensor.row_exponents if exponents is None else exponents
        # columns of the basis that the whole did without are not sent: where a trellis is, symbol 0 has a value, so none come back
        part = replace(
            self.tensor,
            entry=replace(entry, shape=(len(rows), *entry.shape[1:])),
            symbols=symbols,
            row_exponents=None if exponents is None else exponents[rows],
        )
        return CodedRows(symbols, dequantized(part, self.step), counts)

    def whole(self, symbols: IntArray) -> CodedTensor:
        """The weight with the symbols of all its rows, int32 (O, n)."""
        return replace(self.tensor, symbols=symbols)


def by_rows(tensor: CodedTensor, transform: LayerTransform) -> bool:
    """Whether rows of a coded weight can be quantized some at a time."""
    return tensor.codes is None and transform.axis != "r" and not transform.kept
