"""From one scalar c to a draft of the file: metric, steps, symbols, predicted distortion, bytes.

    LayerStats ─ regularise, factor ─┬─ matrix_steps ─ step sizes ─┐
    weights ─── (Wiener filter) ─────┴── quantize_feedback ────────┴─ CodedTensor ─ encode ─ bytes

Every layer depends on c and the `Choice` alone, so layers run in parallel and drafts are reproducible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, log2

import numpy as np
import torch
from torch import Tensor

from transquant.allocation.steps import Grouping, first_guess, matrix_steps, vector_qp
from transquant.bitstream import EncodedFile, Job, encode, values
from transquant.entropy.lanes import encode_planes
from transquant.entropy.tables import MAX_SYMBOL, fold_for
from transquant.grid import global_step, nearest_qp, steps, total_index
from transquant.metadata import write_distortions
from transquant.quantizers.feedback import Rounding, quantize_feedback
from transquant.quantizers.metric import (
    Damping,
    Factor,
    centred,
    factor,
    mean_diagonal,
    noise_level,
    quadratic_form,
    regularise,
    wiener,
)
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

FINEST = 2.0**-64  # scalar c; below it nothing changes, since symbols have their range
IDLE_VECTOR = 256  # as many weights does a vector's value count for, where calibration never reached it
LARGEST_SYMBOL = MAX_SYMBOL / 8
WIENER_SIDE = 2048  # no eigenbases above this side length


@dataclass(frozen=True, slots=True)
class Choice:
    """What the held-back samples decide: the regularisation of the metric, the step groups, the dead zone."""

    damping: Damping = field(default_factory=Damping)
    grouping: Grouping = field(default_factory=Grouping)
    dead_zone: float = 0.6

    @property
    def rounding(self) -> Rounding:
        """Magnitudes are rebuilt in the middle of their bins, [k − 1 + dead zone, k + dead zone). Centroids, which the mean
        square asks for, shrink every layer a little, and that hurts the network more than it saves."""
        offset = -round(64 * (self.dead_zone - 0.5))
        return Rounding(self.dead_zone, (offset, offset))


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

    @property
    def predicted(self) -> float:
        """Sum of the layers' predicted distortions, units of the metric."""
        return float(sum(self.distortions.values()))

    def state(self) -> dict[str, Tensor]:
        """Decoded tensors by key, as a reader would give them, exact ones left out."""
        entries = tuple(e for e in self.entries if not isinstance(e, RawEntry | AliasEntry))
        arrays = values(Container(self.step, entries, ()), self.coded)
        state = {k: torch.from_numpy(np.array(v)) for k, v in arrays.items()}
        aliases = {e.name: e.of for e in self.entries if isinstance(e, AliasEntry)}
        return state | {name: state[of] for name, of in aliases.items() if of in state}


class Encoder:
    """Quantizes and encodes one model for any scalar c."""

    def __init__(self, plan: Plan, source: Source, stats: Statistics, pool: Workers) -> None:
        self.plan, self.source, self.stats, self.pool = plan, source, stats, pool
        shared = {s.of for s in plan.specs if isinstance(s, AliasSpec)}  # what others use too cannot be corrected for one
        biases = {s.name for s in plan.specs if isinstance(s, VectorSpec) and s.name.endswith("bias")} - shared
        own_bias = {name.removesuffix("bias") for name in biases if f"{name.removesuffix('bias')}weight" not in shared}
        self.layers = {
            name: centred(layer) if name.removesuffix("weight") in own_bias else replace(layer, input_mean=None)
            for name, layer in stats.layers.items()
        }
        self.idle_level = _mean_energy(self.layers, source.values)

    def draft(self, c: float, choice: Choice) -> Draft:
        """Quantize everything with scalar c, rounded to the format's grid."""
        step = global_step(max(c, FINEST))
        c = float(steps(step, np.zeros((1, 1), np.int64))[0, 0])
        specs = self.plan.specs
        weights = [s for s in specs if isinstance(s, WeightSpec)]
        weights.sort(key=lambda s: -np.prod(s.shape[:1]) * np.prod(s.shape))  # long ones first
        results = self.pool.map(lambda s: self._weight(s, c, step, choice), weights)
        done = {spec.name: result for spec, result in zip(weights, results, strict=True)}
        shifts = {f"{name.removesuffix('weight')}bias": shift for name, (_, _, shift) in done.items() if shift is not None}
        coded: dict[str, Coded] = {}
        entries: list[Entry] = []
        distortions: dict[str, float] = {}
        for spec in specs:
            if isinstance(spec, WeightSpec):
                tensor, distortions[spec.name], _ = done[spec.name]
                coded[spec.name] = tensor
                entries.append(tensor.entry)
            elif isinstance(spec, VectorSpec):
                qp, symbols, distortions[spec.name] = self._vector(spec.name, spec.name, c, step, shifts.get(spec.name))
                entry = CodedEntry(spec.name, spec.shape, spec.dtype, qp)
                coded[spec.name] = CodedTensor(entry, symbols.reshape(entry.rows, entry.columns))
                entries.append(entry)
            elif isinstance(spec, BatchNormSpec):
                scale = self._vector(f"{spec.name}.scale", spec.key("weight"), c, step)
                shift = self._vector(f"{spec.name}.shift", spec.key("bias"), c, step)
                norm = BatchNormEntry(spec.name, spec.channels, spec.dtype, (scale[0], shift[0]), spec.eps, spec.batches_tracked)
                coded[spec.name] = CodedBatchNorm(norm, scale[1], shift[1])
                distortions[spec.name] = scale[2] + shift[2]
                entries.append(norm)
            elif isinstance(spec, RawSpec):
                entries.append(RawEntry(spec.name, spec.shape, spec.dtype))
            elif isinstance(spec, AliasSpec):
                entries.append(AliasEntry(spec.name, spec.of))
        return Draft(c, step, tuple(entries), coded, distortions)

    def encode(self, draft: Draft) -> EncodedFile:
        """The file of a draft, with what `inspect` tells of its distortion in the metadata."""
        metadata = write_distortions(self.stats.metric, draft.distortions)

        def encode_sections(jobs: Sequence[Job]) -> list[tuple[bytes, list[float]]]:
            return self.pool.map(lambda job: encode_planes(*job), jobs)

        return encode(draft.step, draft.entries, draft.coded, self.source.raw, encode_sections, metadata)

    def first_guess(self, target_bytes: float) -> float:
        """A scalar c whose file has about that size."""
        variances, sensitivities, counts = [], [], []
        for spec in self.plan.specs:
            if isinstance(spec, WeightSpec):
                stats = self.stats.layers[spec.name]
                weight = self.source.values[spec.name]
                variances.append(float(np.mean(weight**2)))
                sensitivities.append(_mean_level(stats))
                counts.append(weight.size)
        return first_guess(8 * target_bytes, np.array(variances), np.array(sensitivities), np.array(counts, np.float64))

    def _weight(
        self, spec: WeightSpec, c: float, step: tuple[int, int], choice: Choice
    ) -> tuple[CodedTensor, float, FloatArray | None]:
        """One weight: its symbols, predicted distortion, and float64 (O,) what the layer's bias must add, or None."""
        weight = self.source.values[spec.name]
        stats = self.layers[spec.name]
        entry = CodedEntry(spec.name, spec.shape, spec.dtype)
        entry = replace(entry, fold=fold_for(entry.rows, entry.columns // max(entry.taps, 1), entry.taps))
        if not (stats.input_moment.any() and stats.output_moment.any()):
            return self._idle_weight(entry, weight, step), 0.0, None
        moments = [_live(stats, k) for k in range(len(stats.input_moment))]
        blocks = weight.reshape(len(moments), -1, weight.shape[1])
        variance = float(np.mean(weight**2))
        factors = [_factors(a, g, variance, c, choice.damping) for a, g in moments]
        plan = matrix_steps(
            np.stack([g.diagonal for _, g in factors]), np.stack([a.diagonal for a, _ in factors]), entry.taps,
            choice.grouping,
        )  # fmt: skip
        sizes = steps(step, total_index(plan.qp, plan.row_exponents, plan.column_exponents, entry.taps))
        if coarser := _quarter_octaves(np.abs(weight) / sizes):
            plan = replace(plan, qp=plan.qp + coarser)
            sizes = steps(step, total_index(plan.qp, plan.row_exponents, plan.column_exponents, entry.taps))
        sizes = np.broadcast_to(sizes, weight.shape).reshape(blocks.shape)
        symbols = np.empty(blocks.shape, np.int32)
        distortion = 0.0
        shift = None if stats.input_mean is None else np.zeros(blocks.shape[:2])
        for k, (a, g) in enumerate(moments):
            target = _target(blocks[k], a, g, variance, c, choice.damping)
            symbols[k], decoded = _quantize(target, sizes[k], *factors[k], choice.rounding)
            error = blocks[k] - decoded
            distortion += quadratic_form(error, stats.input_moment[k], stats.output_moment[k])
            if shift is not None and stats.input_mean is not None:
                shift[k] = (error * stats.input_mean[k]).sum(1)
        has = ("r" if plan.row_exponents is not None else "") + ("c" if plan.column_exponents is not None else "")
        entry = replace(entry, qp=plan.qp, recon_offsets=choice.rounding.offsets, groups=has)  # type: ignore[arg-type]
        tensor = CodedTensor(entry, symbols.reshape(weight.shape), plan.row_exponents, plan.column_exponents)
        return tensor, distortion, None if shift is None else shift.reshape(-1)

    def _idle_weight(self, entry: CodedEntry, weight: FloatArray, step: tuple[int, int]) -> CodedTensor:
        """A weight that calibration never reached: rounded as if its relative error mattered as much as the others'."""
        qp = nearest_qp((float(np.mean(weight**2)) / self.idle_level) ** 0.5) if weight.any() else 0
        qp += _quarter_octaves(np.abs(weight) / float(steps(step, np.array([[qp]]))[0, 0]))
        sizes = np.broadcast_to(steps(step, np.array([[qp]])), weight.shape)
        symbols, _ = quantize_feedback(weight, sizes, None, None, Rounding())
        return CodedTensor(replace(entry, qp=qp), symbols)

    def _vector(
        self, name: str, key: str, c: float, step: tuple[int, int], shift: FloatArray | None = None
    ) -> tuple[int, IntArray, float]:
        """One vector, plus `shift`, with one step: step index, symbols int32 (C,), predicted distortion."""
        vector = self.source.values[name].reshape(-1)
        if shift is not None:
            vector = vector + shift
        sensitivity = self.stats.vectors.get(key)
        if sensitivity is None or not sensitivity.any():
            sensitivity = np.zeros(vector.shape)
            qp = nearest_qp((float(np.mean(vector**2)) / self.idle_level / IDLE_VECTOR) ** 0.5) if vector.any() else 0
        else:
            qp = vector_qp(sensitivity)
        qp += _quarter_octaves(np.abs(vector) / float(steps(step, np.array([[qp]]))[0, 0]))
        size = float(steps(step, np.array([[qp]]))[0, 0])
        symbols = np.rint(vector / size).astype(np.int32)
        error = vector - symbols * size
        return qp, symbols, float(np.sum(sensitivity.reshape(-1) * error**2))


def _live(stats: LayerStats, group: int) -> tuple[FloatArray, FloatArray]:
    """Moments of a group; a dead group among live ones takes the mean of all."""
    a, g = stats.input_moment[group], stats.output_moment[group]
    return (a, g) if a.any() and g.any() else (stats.input_moment.mean(0), stats.output_moment.mean(0))


def _factors(a: FloatArray, g: FloatArray, variance: float, c: float, damping: Damping) -> tuple[Factor, Factor]:
    """Factors of the regularised input and output moments."""
    noise = noise_level(damping, c * c / 12, variance, mean_diagonal(a), mean_diagonal(g))
    return factor(regularise(a, damping.alpha + noise)), factor(regularise(g, damping.gamma + noise))


def _target(weight: FloatArray, a: FloatArray, g: FloatArray, variance: float, c: float, damping: Damping) -> FloatArray:
    """What is quantized: the weights, or their Wiener filtered form where that was chosen and fits in memory."""
    if not damping.wiener or variance == 0 or not a.ndim == g.ndim == 2 or max(len(a), len(g)) > WIENER_SIDE:
        return weight
    return wiener(weight, regularise(a, damping.alpha), regularise(g, damping.gamma), c * c / 12 / variance)


def _quantize(
    target: FloatArray, sizes: FloatArray, input_factor: Factor, output_factor: Factor, rounding: Rounding
) -> tuple[IntArray, FloatArray]:
    """Symbols int32 (o, n) and decoded values float64 (o, n) of one group; diagonal blocks of columns are independent."""
    lower_out = None if output_factor.lower is None else output_factor.lower[0]
    if input_factor.lower is None or len(input_factor.lower) == 1:
        lower_in = None if input_factor.lower is None else input_factor.lower[0]
        symbols, error = quantize_feedback(target, sizes, lower_out, lower_in, rounding)
        return symbols, target - error
    width = len(input_factor.lower[0])
    symbols, decoded = np.empty(target.shape, np.int32), np.empty(target.shape)
    for k, lower_in in enumerate(input_factor.lower):
        part = slice(k * width, (k + 1) * width)
        columns = np.ascontiguousarray(target[:, part])
        symbols[:, part], error = quantize_feedback(columns, sizes[:, part], lower_out, lower_in, rounding)
        decoded[:, part] = columns - error
    return symbols, decoded


def _quarter_octaves(magnitudes: FloatArray) -> int:
    """By how much a step index must grow so that symbols stay well inside the format's range; feedback needs some room."""
    largest = float(magnitudes.max(initial=0.0))
    return max(0, ceil(4 * log2(largest / LARGEST_SYMBOL))) if largest > 0 else 0


def _mean_energy(layers: Mapping[str, LayerStats], values: Mapping[str, FloatArray]) -> float:
    """Distortion of an error as large as a weight itself: mean over the weights that calibration reached, or 1."""
    energies = {name: float(np.sum(values[name] ** 2)) * _mean_level(layer) for name, layer in layers.items()}
    count = sum(values[name].size for name, energy in energies.items() if energy > 0)
    return sum(energies.values()) / count if count else 1.0


def _mean_level(stats: LayerStats) -> float:
    """Mean sensitivity of a layer's entries."""
    pairs = zip(stats.input_moment, stats.output_moment, strict=True)
    return float(np.mean([mean_diagonal(a) * mean_diagonal(g) for a, g in pairs]))
