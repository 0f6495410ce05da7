"""From one scalar c to a draft of the file: metric, steps, symbols, predicted distortion, bytes.

    LayerStats ─ regularise, factor ─┬─ matrix_steps ─ step sizes ─┐
    weights ─── (Wiener filter) ─────┴── quantize_feedback ────────┴─ CodedTensor ─ encode ─ bytes

Every layer depends on c and the `Choice` alone, so layers run in parallel and drafts are reproducible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from transquant.allocation.steps import Grouping, first_guess, matrix_steps, vector_qp
from transquant.bitstream import EncodedFile, encode, values
from transquant.entropy.lanes import encode_planes
from transquant.entropy.tables import MAX_SYMBOL
from transquant.grid import global_step, nearest_qp, steps, total_index
from transquant.quantizers.feedback import Rounding, quantize_feedback
from transquant.quantizers.metric import Damping, factor, noise_level, regularise, wiener
from transquant.records import (
    AliasEntry,
    AliasSpec,
    BatchNormEntry,
    BatchNormSpec,
    Coded,
    CodedBatchNorm,
    CodedEntry,
    CodedTensor,
    Container,
    Entry,
    FloatArray,
    IntArray,
    LayerStats,
    Plan,
    RawEntry,
    RawSpec,
    Statistics,
    VectorSpec,
    WeightSpec,
)
from transquant.workers import Workers

IDLE_STEP = 0.25  # of a tensor's rms: for weights that calibration never reached
FINE_STEP = 1 / 64  # of a vector's rms, likewise
WIENER_SIDE = 2048  # no eigenbases above this side length


@dataclass(frozen=True, slots=True)
class Choice:
    """What the held-back samples decide: the regularisation of the metric, the step groups, the dead zone."""

    damping: Damping = field(default_factory=Damping)
    grouping: Grouping = field(default_factory=Grouping)
    dead_zone: float = 0.5


@dataclass(frozen=True, slots=True)
class Source:
    """What is to be coded: float64 values by name (weights (O, n); vectors (C,); BatchNorm "<name>.scale" and
    "<name>.shift" (C,)), and the exact bytes of raw tensors."""

    values: Mapping[str, FloatArray]
    raw: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Draft:
    """A quantized model at scalar c: everything but its bytes. `distortions`: predicted, by spec name."""

    c: float
    step: tuple[int, int]
    entries: tuple[Entry, ...]
    coded: Mapping[str, Coded]
    distortions: Mapping[str, float]
    offsets: Mapping[str, tuple[int, int]]  # centroids seen in this draft, for the next one

    @property
    def predicted(self) -> float:
        """Sum of the layers' predicted distortions, units of the metric."""
        return float(sum(self.distortions.values()))

    def state(self) -> dict[str, np.ndarray]:
        """Decoded tensors by key, as a reader would give them, raw ones left out."""
        entries = tuple(e for e in self.entries if not isinstance(e, RawEntry | AliasEntry))
        return dict(values(Container(self.step, entries, ()), self.coded))


class Encoder:
    """Quantizes and encodes one model for any scalar c."""

    def __init__(self, plan: Plan, source: Source, stats: Statistics, pool: Workers) -> None:
        self.plan, self.source, self.stats, self.pool = plan, source, stats, pool

    def draft(self, c: float, choice: Choice, offsets: Mapping[str, tuple[int, int]] | None = None) -> Draft:
        """Quantize everything with scalar c (rounded to the format's grid); `offsets` from an earlier draft."""
        step = global_step(c)
        c = float(steps(step, np.zeros((1, 1), np.int64))[0, 0])
        specs = self.plan.specs
        weights = [s for s in specs if isinstance(s, WeightSpec)]
        weights.sort(key=lambda s: -np.prod(s.shape[:1]) * np.prod(s.shape))  # long ones first
        results = self.pool.map(lambda s: self._weight(s, c, step, choice, (offsets or {}).get(s.name, (0, 0))), weights)
        done = {spec.name: result for spec, result in zip(weights, results, strict=True)}
        coded: dict[str, Coded] = {}
        entries: list[Entry] = []
        distortions: dict[str, float] = {}
        for spec in specs:
            if isinstance(spec, WeightSpec):
                tensor, distortions[spec.name], _ = done[spec.name]
                coded[spec.name] = tensor
                entries.append(tensor.entry)
            elif isinstance(spec, VectorSpec):
                qp, symbols, distortions[spec.name] = self._vector(spec.name, spec.name, c, step)
                entry = CodedEntry(spec.name, spec.shape, spec.dtype, qp)
                coded[spec.name] = CodedTensor(entry, symbols.reshape(entry.rows, entry.columns))
                entries.append(entry)
            elif isinstance(spec, BatchNormSpec):
                scale = self._vector(f"{spec.name}.scale", spec.key("weight"), c, step)
                shift = self._vector(f"{spec.name}.shift", spec.key("bias"), c, step)
                norm = BatchNormEntry(
                    spec.name, spec.channels, spec.dtype, (scale[0], shift[0]), spec.eps, spec.batches_tracked
                )
                coded[spec.name] = CodedBatchNorm(norm, scale[1], shift[1])
                distortions[spec.name] = scale[2] + shift[2]
                entries.append(norm)
            elif isinstance(spec, RawSpec):
                entries.append(RawEntry(spec.name, spec.shape, spec.dtype))
            elif isinstance(spec, AliasSpec):
                entries.append(AliasEntry(spec.name, spec.of))
        seen = {name: result[2] for name, result in done.items()}
        return Draft(c, step, tuple(entries), coded, distortions, seen)

    def encode(self, draft: Draft, metadata: Mapping[str, str] | None = None) -> EncodedFile:
        """The file of a draft."""
        return encode(draft.step, draft.entries, draft.coded, self.source.raw, encode_planes, metadata)

    def first_guess(self, target_bytes: float) -> float:
        """A scalar c whose file has about that size."""
        variances, sensitivities, counts = [], [], []
        for spec in self.plan.specs:
            if isinstance(spec, WeightSpec):
                stats = self.stats.layers[spec.name]
                weight = self.source.values[spec.name]
                variances.append(float(np.mean(weight**2)))
                sensitivities.append(_mean_diagonal(stats.input_moment) * _mean_diagonal(stats.output_moment))
                counts.append(weight.size)
        return first_guess(8 * target_bytes, np.array(variances), np.array(sensitivities), np.array(counts, np.float64))

    def _weight(
        self, spec: WeightSpec, c: float, step: tuple[int, int], choice: Choice, offsets: tuple[int, int]
    ) -> tuple[CodedTensor, float, tuple[int, int]]:
        """One weight: its symbols, predicted distortion, and the centroids seen."""
        weight = self.source.values[spec.name]
        stats = self.stats.layers[spec.name]
        variance = float(np.mean(weight**2))
        groups = len(stats.input_moment)
        blocks = weight.reshape(groups, -1, weight.shape[1])
        taps = int(np.prod(spec.shape[2:]))
        entry = CodedEntry(spec.name, spec.shape, spec.dtype)
        if not (stats.input_moment.any() and stats.output_moment.any()):
            qp = nearest_qp(max(IDLE_STEP * variance**0.5, 1e-30) / c)
            sizes = np.broadcast_to(steps(step, np.array([[qp]])), weight.shape)
            symbols, _, _ = quantize_feedback(weight, sizes, None, None, Rounding())
            return CodedTensor(replace(entry, qp=qp), symbols), 0.0, (0, 0)

        targets = blocks.copy()
        lowers: list[tuple[FloatArray | None, FloatArray | None]] = []
        diagonals: list[tuple[FloatArray, FloatArray]] = []
        for k in range(groups):
            a, g = stats.input_moment[k], stats.output_moment[k]
            if not (a.any() and g.any()):  # a dead group among live ones takes the mean of the others
                a, g = stats.input_moment.mean(0), stats.output_moment.mean(0)
            mean_in, mean_out = _mean_diagonal(a), _mean_diagonal(g)
            noise = noise_level(choice.damping, c * c / 12, variance, mean_in, mean_out)
            if choice.damping.wiener and a.ndim == g.ndim == 2 and max(len(a), len(g)) <= WIENER_SIDE and variance > 0:
                damped = regularise(a, choice.damping.alpha), regularise(g, choice.damping.gamma)
                targets[k] = wiener(blocks[k], *damped, c * c / 12 / variance)
            lower_out, diagonal_out = factor(regularise(g, choice.damping.gamma + noise))
            lower_in, diagonal_in = factor(regularise(a, choice.damping.alpha + noise))
            lowers.append((lower_out, lower_in))
            diagonals.append((diagonal_out, diagonal_in))
        plan = matrix_steps(
            np.stack([d[0] for d in diagonals]), np.stack([d[1] for d in diagonals]), taps, choice.grouping
        )
        sizes = steps(step, total_index(plan.qp, plan.row_exponents, plan.column_exponents, taps))
        sizes = np.broadcast_to(sizes, weight.shape).reshape(blocks.shape)
        symbols = np.empty(blocks.shape, np.int32)
        moments = np.zeros(4)
        distortion = 0.0
        rounding = Rounding(choice.dead_zone, offsets)
        for k in range(groups):
            symbols[k], error, seen = quantize_feedback(targets[k], sizes[k], *lowers[k], rounding)
            moments += seen
            error = error + (blocks[k] - targets[k])
            distortion += quadratic_form(error, stats, k)
        has = ("r" if plan.row_exponents is not None else "") + ("c" if plan.column_exponents is not None else "")
        entry = replace(entry, qp=plan.qp, recon_offsets=offsets, groups=has)  # type: ignore[arg-type]
        tensor = CodedTensor(entry, symbols.reshape(weight.shape), plan.row_exponents, plan.column_exponents)
        return tensor, distortion, _centroids(moments)

    def _vector(self, name: str, key: str, c: float, step: tuple[int, int]) -> tuple[int, IntArray, float]:
        """One vector with one step: step index, symbols int32 (C,), predicted distortion."""
        vector = self.source.values[name].reshape(-1)
        sensitivity = self.stats.vectors.get(key)
        if sensitivity is None or not sensitivity.any():
            sensitivity = np.zeros(vector.shape)
            qp = nearest_qp(max(FINE_STEP * float(np.sqrt(np.mean(vector**2))), 1e-30) / c)
        else:
            qp = vector_qp(sensitivity)
        size = float(steps(step, np.array([[qp]]))[0, 0])
        symbols = np.clip(np.rint(vector / size), -MAX_SYMBOL, MAX_SYMBOL).astype(np.int32)
        error = vector - symbols * size
        return qp, symbols, float(np.sum(sensitivity.reshape(-1) * error**2))


def quadratic_form(error: FloatArray, stats: LayerStats, group: int) -> float:
    """tr(G E A Eᵀ) of one group with the moments as calibration gave them; error float64 (o, n)."""
    a, g = stats.input_moment[group], stats.output_moment[group]
    right = error * a if a.ndim == 1 else error @ a
    left = error * g[:, None] if g.ndim == 1 else g @ error
    return float(np.sum(left * right))


def _mean_diagonal(moment: FloatArray) -> float:
    """Mean diagonal entry of a moment (n, n) or (n,), or of a stack (g, n, n), (g, n) of more rows than one."""
    if moment.ndim == 3:
        return float(np.mean(np.einsum("kii->ki", moment)))
    if moment.ndim == 2 and moment.shape[0] == moment.shape[1]:
        return float(np.trace(moment)) / len(moment)
    return float(moment.mean())


def _centroids(moments: FloatArray) -> tuple[int, int]:
    """Reconstruction offsets in 1/64 step from the feedback's moments; 0 where too few entries tell."""
    one = 1 - moments[0] / moments[1] if moments[1] >= 32 else 0.0
    more = -moments[2] / moments[3] if moments[3] >= 32 else 0.0
    return int(np.clip(round(64 * one), -31, 31)), int(np.clip(round(64 * more), -31, 31))
