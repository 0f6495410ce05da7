"""Streams calibration batches through copies of the model and sums up what they say.

Partial sums of a micro-batch are added in the order of the micro-batches, so the result depends neither on the number
of threads nor on how the user cut the batches. The model itself is never touched: copies run in its place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from transquant.errors import InputError
from transquant.records import AliasSpec, BatchNormSpec, FloatArray, LayerStats, Plan, Statistics, VectorSpec, WeightSpec
from transquant.stats.metric import direction, resolve, unit
from transquant.stats.moments import LayerMoments, Shape, moment_shapes
from transquant.workers import Workers

Run = Callable[[nn.Module, Any], Tensor]
Progress = Callable[[int, int], None]

MAX_SIDE = 8192
MEMORY_LIMIT = 6 << 30
VECTOR_CARE = 256  # four bits more than a weight of the same relative size


@dataclass(slots=True)
class _Partial:
    """Sums over one micro-batch (or, added up, over all): float64 tensors by weight name, squared gradients by key."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    totals: dict[str, Tensor]
    rows: dict[str, Tensor]  # squared gradients by row and by column, of weights that no hooked module used
    columns: dict[str, Tensor]
    positions: dict[str, int]
    energies: dict[str, list[float]]
    vectors: dict[str, Tensor]
    samples: int
    unit: float

    def add(self, other: _Partial) -> None:
        for part in ("inputs", "outputs", "totals", "rows", "columns", "vectors"):
            mine, theirs = getattr(self, part), getattr(other, part)
            for name, value in theirs.items():
                if name in mine:
                    mine[name] += value
                else:
                    mine[name] = value
        for name, count in other.positions.items():
            self.positions[name] = self.positions.get(name, 0) + count
        for name, values in other.energies.items():
            self.energies.setdefault(name, []).extend(values)
        self.unit = (self.unit * self.samples + other.unit * other.samples) / (self.samples + other.samples)
        self.samples += other.samples


def collect(
    model: nn.Module,
    batches: Sequence[Any],
    plan: Plan,
    run: Run,
    pool: Workers,
    metric: str = "auto",
    seed: int = 0,
    max_side: int = MAX_SIDE,
    memory_limit: int = MEMORY_LIMIT,
    progress: Progress | None = None,
) -> Statistics:
    """Statistics of all weights and vectors of the plan.

    `batches` are fixed micro-batches (`modules.micro_batches`), `run(model, batch)` gives the output (N, ...). One random
    direction a sample, one forward and one backward pass. The scale of each layer's G ⊗ A is that of E‖∇W‖².
    Raises InputError for a model that cannot be copied or run, and for NaN or infinite activations."""
    collectors = [_Collector(copy_model(model), plan, run, max_side, memory_limit) for _ in range(min(pool.count, len(batches)))]
    with torch.no_grad():
        metric = resolve(metric, run(collectors[0].model, batches[0]))
    total: _Partial | None = None
    for first in range(0, len(batches), len(collectors)):
        chunk = list(enumerate(batches[first : first + len(collectors)], first))
        jobs = zip(collectors, chunk, strict=False)
        for partial in pool.map(lambda job: job[0].partial(*job[1], metric, seed), jobs):
            if total is None:
                total = partial
            else:
                total.add(partial)
        if progress:
            progress(min(first + len(collectors), len(batches)), len(batches))
    assert total is not None
    if not total.inputs and not total.rows:
        raise InputError("calibration reached no weight of the model: is its forward a function of another object?")
    weights = [s for s in plan.specs if isinstance(s, WeightSpec)]
    layers = {s.name: _layer_stats(s, total, collectors[0].shapes[s.name]) for s in weights}
    vectors = {key: (value / total.samples * total.unit).numpy() for key, value in total.vectors.items()}
    return Statistics(layers, vectors, metric, total.samples)


def weight_statistics(plan: Plan, values: Mapping[str, FloatArray]) -> Statistics:
    """Statistics without calibration: D = Σ ‖ΔW‖² / Σ ‖W‖² over all weights, so that every weight has the same step. A value
    of a vector acts on a whole row at every position: its relative error counts as that of `VECTOR_CARE` weights. `values`
    as from `modules.gather`. (Steps in proportion to each tensor's own size are far worse: docs/method.md.)"""
    weights = [s for s in plan.specs if isinstance(s, WeightSpec)]
    energy = float(sum(np.sum(values[s.name] ** 2) for s in weights))
    count = sum(values[s.name].size for s in weights)
    level = 1 / energy if energy > 0 else 0.0
    layers: dict[str, LayerStats] = {}
    vectors: dict[str, FloatArray] = {}

    def add_vector(key: str, vector: FloatArray, shape: tuple[int, ...]) -> None:
        square = float(np.mean(vector**2))
        vectors[key] = np.full(shape, VECTOR_CARE / count / square if square > 0 else 0.0)

    for spec in plan.specs:
        if isinstance(spec, WeightSpec):
            rows, columns = values[spec.name].shape
            layers[spec.name] = LayerStats(np.ones((1, columns)), np.full((1, rows), level), 0, 0.0, 0.0)
        elif isinstance(spec, VectorSpec):
            add_vector(spec.name, values[spec.name], spec.shape)
        elif isinstance(spec, BatchNormSpec):
            for part, attribute in (("scale", "weight"), ("shift", "bias")):
                vector = values[f"{spec.name}.{part}"]
                add_vector(spec.key(attribute), vector, vector.shape)
    return Statistics(layers, vectors, "weights", 0)


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode whose floating parameters take gradients. Raises InputError where it cannot be copied."""
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"the model cannot be copied ({reason}); transquant works on a copy, never on your model") from error
    twin.eval()
    for parameter in twin.parameters():
        parameter.grad = None
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return twin


class _Collector:
    """One copy of the model with its hooks."""

    def __init__(self, model: nn.Module, plan: Plan, run: Run, max_side: int, memory_limit: int) -> None:
        self.model, self.run = model, run
        modules = dict(model.named_modules(remove_duplicate=False))
        specs = [s for s in plan.specs if isinstance(s, WeightSpec)]
        self.shapes = moment_shapes(specs, max_side, memory_limit)
        shared: dict[str, list[nn.Module]] = {}
        for alias in plan.specs:
            if isinstance(alias, AliasSpec):
                shared.setdefault(alias.of, []).append(modules[alias.name.rpartition(".")[0]])
        self.layers = [LayerMoments(s, _users(modules[s.module or ""], shared.get(s.name, [])), self.shapes[s.name]) for s in specs]
        self.vectors = [s for s in plan.specs if isinstance(s, VectorSpec)]
        self.batchnorms = [(s, modules[s.name]) for s in plan.specs if isinstance(s, BatchNormSpec)]
        self.parameters = dict(model.named_parameters(remove_duplicate=False))

    def partial(self, index: int, batch: Any, metric: str, seed: int) -> _Partial:
        """Forward, one random direction, backward; sums over the batch."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % (1 << 63))
        for parameter in self.parameters.values():
            parameter.grad = None
        handles = []
        try:
            for layer in self.layers:
                layer.reset(index)
                handles += layer.attach()
            with torch.enable_grad():
                output = self.run(self.model, batch)
                resolve(metric, output)
                if not output.requires_grad:
                    raise InputError(
                        "the model's output has no gradient (is its forward under torch.no_grad?); use metric='weights'"
                    )
                direction(output, metric, generator).backward()  # type: ignore[no-untyped-call]
        finally:
            for handle in handles:
                handle.remove()
        samples = len(output)
        seen = [layer for layer in self.layers if layer.input is not None and layer.output is not None]
        return _Partial(
            {layer.spec.name: layer.input.cpu() for layer in seen if layer.input is not None},
            {layer.spec.name: layer.output.cpu() for layer in seen if layer.output is not None},
            {layer.spec.name: layer.total.cpu() for layer in seen if layer.total is not None},
            *self._unseen_gradients(),
            {layer.spec.name: layer.positions for layer in seen},
            {layer.spec.name: [self._energy(layer.spec.name) / samples] for layer in self.layers},
            self._vector_gradients(),
            samples,
            unit(output, metric),
        )

    def _energy(self, name: str) -> float:
        """‖∇W‖² of the batch; the samples' directions are independent, so its mean is the sum of theirs."""
        gradient = self.parameters[name].grad
        energy = 0.0 if gradient is None else float(gradient.double().square().sum())
        if not isfinite(energy):
            raise InputError(f"the gradient of {name!r} has NaN or infinite values on a calibration batch")
        return energy

    def _unseen_gradients(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Squared gradients by row (g, o) and by column (g, n) of weights that were used, but not by calls of their module
        (attention layers hand theirs to a function)."""
        rows, columns = {}, {}
        for layer in self.layers:
            gradient = self.parameters[layer.spec.name].grad
            if layer.input is None and gradient is not None:
                squares = gradient.double().square().reshape(layer.shape.groups, layer.shape.rows, -1).cpu()
                rows[layer.spec.name], columns[layer.spec.name] = squares.sum(2), squares.sum(1)
        return rows, columns

    def _vector_gradients(self) -> dict[str, Tensor]:
        squares: dict[str, Tensor] = {}
        for spec in self.vectors:
            gradient = self.parameters[spec.name].grad
            if gradient is not None:
                squares[spec.name] = gradient.double().square().cpu()
        for norm, module in self.batchnorms:
            scale, shift = self.parameters[norm.key("weight")].grad, self.parameters[norm.key("bias")].grad
            if scale is None or shift is None:
                continue
            # y = s·x + t with x = x̂·√(σ²+eps) + μ: dL/ds = dL/dγ·√(σ²+eps) + μ·dL/dβ
            deviation = (module.running_var.double() + norm.eps).sqrt()
            by_scale = scale.double() * deviation + module.running_mean.double() * shift.double()
            squares[norm.key("weight")] = by_scale.square().cpu()
            squares[norm.key("bias")] = shift.double().square().cpu()
        for key, square in squares.items():
            if not bool(torch.isfinite(square).all()):
                raise InputError(f"the gradient of {key!r} has NaN or infinite values on a calibration batch")
        return squares


def _users(module: nn.Module, others: list[nn.Module]) -> list[nn.Module]:
    """The modules whose calls count: the weight's own, and those of its class that are tied to it."""
    unique = {id(m): m for m in (module, *others) if type(m) is type(module)}
    return list(unique.values())


def _layer_stats(spec: WeightSpec, total: _Partial, shape: Shape) -> LayerStats:
    if spec.name in total.inputs:
        input_moment = (total.inputs[spec.name] / max(total.positions[spec.name], 1)).numpy()
        output_moment = (total.outputs[spec.name] / total.samples).numpy()
    elif spec.name in total.rows:
        input_moment, output_moment = total.columns[spec.name].numpy(), total.rows[spec.name].numpy()
    else:  # never reached
        return LayerStats(np.zeros((shape.groups, shape.columns)), np.zeros((shape.groups, shape.rows)), 0, 0.0, 0.0)
    energies = np.array(total.energies[spec.name])
    energy = float(energies.mean())
    error = float(energies.std(ddof=1) / len(energies) ** 0.5 / energy) if len(energies) > 1 and energy > 0 else 0.0
    traces = float((_traces(input_moment) * _traces(output_moment)).sum())
    scale = energy / traces * total.unit if traces > 0 else 0.0
    mean = total.totals[spec.name].numpy() / total.positions[spec.name] if spec.name in total.totals else None
    return LayerStats(input_moment, output_moment * scale, total.samples, energy, error, mean)


def _traces(moment: FloatArray) -> FloatArray:
    """Trace of each group's moment, float64 (g,)."""
    diagonal = np.einsum("...ii->...i", moment) if moment.ndim > 2 else moment
    traces: FloatArray = diagonal.reshape(len(moment), -1).sum(1)
    return traces
