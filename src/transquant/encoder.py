"""From one scalar c to a draft of the file: metric, steps, symbols, predicted distortion, bytes.

    weights, LayerStats, transform ─ code_weight ─┐
    vectors, BatchNorms ─ one step each ──────────┴─ Draft ─ encode ─ bytes

Every layer depends on c, the `Choice` and its transform alone, so layers run in parallel and drafts are reproducible.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from transquant.activations import ActivationPlan
from transquant.allocation.steps import first_guess, vector_qp
from transquant.bitstream import EncodedFile, Job, Part, decode, encode, runs, values
from transquant.choices import IDENTITY, PACKED, Choice, LayerTransform, Method
from transquant.container import read_container
from transquant.dequantizer import dequantize
from transquant.entropy.lanes import decode_planes, encode_planes
from transquant.entropy.tables import fold_for
from transquant.fingerprint import fingerprint
from transquant.grid import global_step, nearest_qp, on_grid, steps
from transquant.metadata import write_activations, write_distortions
from transquant.quantizers.feedback import Rounding, quantize_feedback
from transquant.quantizers.metric import centred, mean_diagonal
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
    Limits,
    Plan,
    RawEntry,
    RawSpec,
    Spec,
    Statistics,
    VectorSpec,
    WeightSpec,
)
from transquant.row_depths import row_steps
from transquant.weights import CodedWeight, code_weight, quarter_octaves
from transquant.workers import Workers

FINEST = 2.0**-64  # scalar c; below it nothing changes, since symbols have their range
IDLE_VECTOR = 256  # as many weights does a vector's value count for, where calibration never reached it
METHOD = Method()

# Rules on the number of weights, so that files are the same on small and large machines:
LARGE = 1 << 24  # above it a model's sample stands for it in searches, and without calibration its symbols are not kept
SAMPLE = 1 << 20  # weights of a sample, about
WINDOW = 1 << 23  # values that are quantized, or encoded, before the next are looked at where symbols are not kept


@dataclass(frozen=True, slots=True)
class Source:
    """What is to be coded: float64 values by name (weights (O, n); vectors (C,); BatchNorm "<name>.scale" and
    "<name>.shift" (C,)), and the exact bytes of raw tensors."""

    values: Mapping[str, FloatArray]
    raw: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Draft:
    """A quantized model at scalar c: everything but its bytes. `distortions`: predicted, by spec name. `file`: of a large model,
    instead of what would be in `coded`."""

    c: float
    step: tuple[int, int]
    entries: tuple[Entry, ...]
    coded: Mapping[str, Coded]
    distortions: Mapping[str, float]
    file: EncodedFile | None = None

    @property
    def predicted(self) -> float:
        """Sum of the layers' predicted distortions, units of the metric."""
        return float(sum(self.distortions.values()))

    def state(self) -> dict[str, Tensor]:
        """Decoded tensors by key, as a reader would give them, exact ones left out."""
        entries = tuple(e for e in self.entries if not isinstance(e, RawEntry | AliasEntry))
        coded = self.coded
        if self.file is not None:
            container = read_container(self.file.data, Limits(1 << 62, 1 << 62))
            coded = decode(container, lambda sections: [[decode_planes(*job)[0] for job in s] for s in sections])
        arrays = values(Container(self.step, entries, ()), coded, dequantize)
        state = {k: torch.from_numpy(np.array(v)) for k, v in arrays.items()}
        aliases = {e.name: e.of for e in self.entries if isinstance(e, AliasEntry)}
        return state | {name: state[of] for name, of in aliases.items() if of in state}


class Encoder:
    """Quantizes and encodes one model for any scalar c."""

    def __init__(
        self, plan: Plan, source: Source, stats: Statistics, pool: Workers, method: Method = METHOD,
        transforms: Mapping[str, LayerTransform] | None = None, activations: ActivationPlan | None = None,
        depths: Mapping[str, FloatArray] | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.source, self.stats, self.pool, self.method = plan, source, stats, pool, method
        self.transforms = transforms or {}  # by weight; what is left out has none
        self.activations = activations
        shared = {s.of for s in plan.specs if isinstance(s, AliasSpec)}  # what others use too cannot be corrected for one
        biases = {s.name for s in plan.specs if isinstance(s, VectorSpec) and s.name.endswith("bias")} - shared
        own_bias = {name.removesuffix("bias") for name in biases if f"{name.removesuffix('bias')}weight" not in shared}
        self.layers = {
            name: centred(layer)
            if name.removesuffix("weight") in own_bias
            else (layer if name in stats.absorbers else replace(layer, input_mean=None))
            for name, layer in stats.layers.items()
        }
        given = row_steps(depths or {}, source.values, self.layers)
        self.row_steps, self.unit = given.steps, given.unit  # where the caller has said how rows compare
        self.idle_level = _mean_energy(self.layers, source.values)
        self.done: dict[str, CodedWeight] = {}  # weights that are quantized already
        self.scale = 1.0  # weights of the model to those here, where this is a sample's encoder
        self.streamed = plan.num_weights > LARGE and stats.metric == "weights"
        self.known: dict[str, bytes] = {}  # fingerprints of weights with their statistics, where results are kept
        self._fingerprint([s.name for s in plan.specs if isinstance(s, WeightSpec)])

    def transformed(self, transforms: Mapping[str, LayerTransform]) -> Encoder:
        """The same encoder with other transforms."""
        other = copy(self)
        other.transforms = transforms
        return other

    def sampled(self) -> Encoder:
        """An encoder of evenly spaced rows of a large model's weights, with their part of the metric; itself where the model is
        not large. Its files are to the model's as `scale` says, but for what does not depend on the weights."""
        stride = self.plan.num_weights / SAMPLE
        if self.plan.num_weights <= LARGE:
            return self
        twin, own, specs = copy(self), dict[str, FloatArray](), list[Spec]()
        twin.layers, steps_of = {}, dict[str, FloatArray]()
        for spec in self.plan.specs:
            if isinstance(spec, WeightSpec):
                height, layer = spec.shape[0] // spec.groups, self.layers[spec.name]
                kept = np.unique(np.linspace(0, height - 1, ceil(height / stride)).astype(int))
                g = layer.output_moment[:, kept]
                g = g if g.ndim == 2 else g[:, :, kept]
                twin.layers[spec.name] = replace(layer, output_moment=g, input_mean=None)
                rows = (np.arange(spec.groups)[:, None] * height + kept).reshape(-1)
                own[spec.name] = self.source.values[spec.name][rows]
                if spec.name in self.row_steps:
                    steps_of[spec.name] = self.row_steps[spec.name][rows]
                spec = replace(spec, shape=(len(rows), *spec.shape[1:]))
            specs.append(spec)
        twin.plan, twin.row_steps = replace(self.plan, specs=tuple(specs)), steps_of
        twin.source = replace(self.source, values=_overlaid(self.source.values, own))
        twin.scale, twin.streamed = self.plan.num_weights / twin.plan.num_weights, False
        twin.known = {}
        twin._fingerprint(list(twin.layers))
        return twin

    def revised(
        self, values: Mapping[str, FloatArray], means: Mapping[str, FloatArray], done: Mapping[str, CodedWeight]
    ) -> Encoder:
        """The same encoder with other values to code, other means of layers' inputs where those matter, and more weights that
        are quantized already."""
        twin = copy(self)
        twin.source = replace(self.source, values=_overlaid(self.source.values, values))
        twin.layers = dict(self.layers)
        for name, mean in means.items():
            if self.layers[name].input_mean is not None:
                twin.layers[name] = replace(self.layers[name], input_mean=mean)
        twin.done = {**self.done, **done}
        twin.known = dict(self.known)
        twin._fingerprint([name for name in {**values, **means} if name in self.layers])
        return twin

    def _fingerprint(self, names: Sequence[str]) -> None:
        if self.pool.folder is not None:
            specs = {s.name: s for s in self.plan.specs}
            for name in names:
                own = self.source.values[name], self.layers[name], self.idle_level, self.row_steps.get(name)
                self.known[name] = fingerprint(specs[name], *own)

    def weights(self, names: Sequence[str], c: float, choice: Choice) -> dict[str, CodedWeight]:
        """Quantize some weights with a scalar c that is on the format's grid."""
        step = global_step(c)
        specs = [s for s in self.plan.specs if isinstance(s, WeightSpec) and s.name in set(names)]
        specs.sort(key=lambda s: -np.prod(s.shape[:1]) * np.prod(s.shape))  # long ones first
        results = self.pool.map(
            lambda s: self._weight(s, c, step, choice), specs,
            "layer", lambda s: (self.known[s.name], c, step, choice, self.transform(s), self.method),
        )  # fmt: skip
        return {spec.name: result for spec, result in zip(specs, results, strict=True)}

    def absorber(self, name: str) -> str | None:
        """The vector of the source that takes the mean error of a weight's output, if there is one."""
        if self.layers[name].input_mean is None:
            return None
        norm = self.stats.absorbers.get(name)
        return f"{name.removesuffix('weight')}bias" if norm is None else f"{norm}.shift"

    def draft(self, c: float, choice: Choice) -> Draft:
        """Quantize everything with scalar c, rounded to the format's grid."""
        c = on_grid(max(c, FINEST))
        if self.streamed:
            return self._written(c, choice)
        todo = [s.name for s in self.plan.specs if isinstance(s, WeightSpec) and s.name not in self.done]
        return self._assembled(self.plan.specs, self.done | self.weights(todo, c, choice), c)

    def part(self, name: str, c: float) -> Draft:
        """A draft of one weight that is quantized already, and of the vector that makes up for its error; nothing else."""
        vector = self.absorber(name) or name
        taken = {name, vector, vector.removesuffix(".shift")}
        specs = [s for s in self.plan.specs if (s.of if isinstance(s, AliasSpec) else s.name) in taken]
        return self._assembled(specs, self.done, c)

    def _assembled(self, specs: Sequence[Spec], done: Mapping[str, CodedWeight], c: float) -> Draft:
        """A draft of some specs, whose weights are quantized, with scalar c on the format's grid."""
        distortions: dict[str, float] = {}
        parts = list(self._parts(specs, done, c, distortions))
        coded = {entry.name: tensor for entry, tensor in parts if tensor is not None}
        return Draft(c, global_step(c), tuple(entry for entry, _ in parts), coded, distortions)

    def _written(self, c: float, choice: Choice) -> Draft:
        """A draft that is a file already: weights are quantized, encoded and forgotten, some at a time. Nothing may depend on
        what other weights have become: without calibration nothing does."""
        entries: list[Entry] = []
        distortions: dict[str, float] = {}

        def parts() -> Iterator[Part]:
            for specs in runs(self.plan.specs, _num_values, WINDOW):
                names = [s.name for s in specs if isinstance(s, WeightSpec)]
                for part in self._parts(specs, self.weights(names, c, choice), c, distortions):
                    entries.append(part[0])
                    yield part

        file = self._file(global_step(c), parts(), distortions)
        return Draft(c, global_step(c), tuple(entries), {}, distortions, file)

    def _parts(
        self, specs: Sequence[Spec], done: Mapping[str, CodedWeight], c: float, distortions: dict[str, float]
    ) -> Iterator[Part]:
        """Entries and symbols of some specs, whose weights are quantized; their predicted distortions go to `distortions`."""
        step = global_step(c)
        shifts = {self.absorber(name): w.shift for name, w in done.items() if w.shift is not None}
        for spec in specs:
            if isinstance(spec, WeightSpec):
                distortions[spec.name] = done[spec.name].distortion
                entry = done[spec.name].tensor.entry
                if self.activations is not None:
                    entry = replace(entry, activation=self.activations.quantizers.get(spec.name))
                yield entry, done[spec.name].tensor
            elif isinstance(spec, VectorSpec):
                qp, symbols, distortions[spec.name] = self._vector(spec.name, spec.name, c, step, shifts.get(spec.name))
                entry = CodedEntry(spec.name, spec.shape, spec.dtype, qp)
                yield entry, CodedTensor(entry, symbols.reshape(entry.rows, entry.columns))
            elif isinstance(spec, BatchNormSpec):
                scale = self._vector(f"{spec.name}.scale", spec.key("weight"), c, step)
                extra = shifts.get(f"{spec.name}.shift")
                if extra is not None:  # of the BatchNorm's input
                    extra = self.source.values[f"{spec.name}.scale"] * extra
                shift = self._vector(f"{spec.name}.shift", spec.key("bias"), c, step, extra)
                norm = BatchNormEntry(spec.name, spec.channels, spec.dtype, (scale[0], shift[0]), spec.eps, spec.batches_tracked)
                distortions[spec.name] = scale[2] + shift[2]
                yield norm, CodedBatchNorm(norm, scale[1], shift[1])
            elif isinstance(spec, RawSpec):
                yield RawEntry(spec.name, spec.shape, spec.dtype), None
            elif isinstance(spec, AliasSpec):
                yield AliasEntry(spec.name, spec.of), None

    def encode(self, draft: Draft) -> EncodedFile:
        """The file of a draft, with what `inspect` tells of its distortion in the metadata."""
        if draft.file is not None:
            return draft.file
        return self._file(draft.step, ((e, draft.coded.get(e.name)) for e in draft.entries), draft.distortions)

    def _file(self, step: tuple[int, int], parts: Iterable[Part], distortions: Mapping[str, float]) -> EncodedFile:
        """The file of parts that are taken one after the other."""

        def encode_streams(jobs: Iterable[Job]) -> Iterator[tuple[bytes, list[float]]]:
            for some in runs(jobs, lambda job: sum(plane.symbols.size for plane in job[0]), WINDOW):
                encoded = self.pool.map(lambda job: encode_planes(*job), some, "section", lambda job: job)
                some.clear()
                yield from encoded

        def metadata() -> Mapping[str, str]:
            plan = self.activations
            own = write_distortions(self.stats.metric, distortions)
            return own if plan is None else {**own, **write_activations(plan.mean_bits, plan.predicted)}

        return encode(step, parts, self.source.raw, encode_streams, self.method.coder, metadata, self.plan.kept)

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

    def _weight(self, spec: WeightSpec, c: float, step: tuple[int, int], choice: Choice) -> CodedWeight:
        weight, stats = self.source.values[spec.name], self.layers[spec.name]
        if not (stats.input_moment.any() and stats.output_moment.any()):
            return CodedWeight(self._idle_weight(spec, weight, step), 0.0, None)
        rows = self.row_steps.get(spec.name)
        return code_weight(spec, weight, stats, c, step, choice, self.transform(spec), self.method, rows)

    def transform(self, spec: WeightSpec) -> LayerTransform:
        """The transform of a weight; fixed-length codes have band groups even without one."""
        return self.transforms.get(spec.name, PACKED if self.method.coding == "fixed" else IDENTITY)

    def _idle_weight(self, spec: WeightSpec, weight: FloatArray, step: tuple[int, int]) -> CodedTensor:
        """A weight that calibration never reached: rounded as if its relative error mattered as much as the others'."""
        entry = CodedEntry(spec.name, spec.shape, spec.dtype)
        entry = replace(entry, fold=fold_for(entry.rows, entry.columns // max(entry.taps, 1), entry.taps))
        qp = nearest_qp((float(np.mean(weight**2)) / self.idle_level) ** 0.5) if weight.any() else 0
        qp += quarter_octaves(np.abs(weight) / float(steps(step, np.array([[qp]]))[0, 0]))
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
        qp += quarter_octaves(np.abs(vector) / float(steps(step, np.array([[qp]]))[0, 0]))
        size = float(steps(step, np.array([[qp]]))[0, 0])
        symbols = np.rint(vector / size).astype(np.int32)
        error = vector - symbols * size
        return qp, symbols, float(np.sum(sensitivity.reshape(-1) * error**2))


def _num_values(spec: Spec) -> int:
    return prod(spec.shape) if isinstance(spec, WeightSpec) else 0


def _overlaid(values: Mapping[str, FloatArray], others: Mapping[str, FloatArray]) -> Mapping[str, FloatArray]:
    """Values of which some are others; two layers deep however often that is done."""
    if isinstance(values, ChainMap):
        return ChainMap({**values.maps[0], **others}, *values.maps[1:])
    return ChainMap(dict(others), cast(Any, values))


def _mean_energy(layers: Mapping[str, LayerStats], values: Mapping[str, FloatArray]) -> float:
    """Distortion of an error as large as a weight itself: mean over the weights that calibration reached, or 1."""
    total, count = 0.0, 0
    for name, layer in layers.items():
        weight = values[name]
        energy = float(np.sum(weight**2)) * _mean_level(layer)
        total, count = total + energy, count + weight.size * (energy > 0)
    return total / count if count else 1.0


def _mean_level(stats: LayerStats) -> float:
    """Mean sensitivity of a layer's entries."""
    pairs = zip(stats.input_moment, stats.output_moment, strict=True)
    return float(np.mean([mean_diagonal(a) * mean_diagonal(g) for a, g in pairs]))
