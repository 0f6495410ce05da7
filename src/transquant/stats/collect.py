"""Streams calibration batches through copies of the model and sums up what they say.

Partial sums of a micro-batch are added in the order of the micro-batches, those of a fold in one process, so the result depends
neither on the number of threads and processes nor on how the user cut the batches. The model itself is never touched: copies
run in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from transquant.errors import InputError
from transquant.memory import give_back
from transquant.records import BatchNormSpec, FloatArray, Plan, Statistics, Use, VectorSpec, WeightSpec
from transquant.stats.absorbers import absorbers
from transquant.stats.copies import wide_copy
from transquant.stats.inputs import InputRecorder, input_uses
from transquant.stats.metric import direction, resolve, unit
from transquant.stats.moments import Moments, moment_shapes
from transquant.stats.recorders import Handle, attach
from transquant.stats.sums import Sums, assembled, layer_stats, tied_name, together
from transquant.workers import Workers

Run = Callable[[nn.Module, Any], Tensor]
Progress = Callable[[int, int], None]

MAX_SIDE = 8192
MEMORY_LIMIT = 3 << 30  # of all moments together: each fold and each thread holds as much
MANY_FOLDS, FEW_FOLDS = 4, 2
FEW_ABOVE = 1 << 29  # bytes of moments from which on there are few


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
    cross_validate: bool = True,
    progress: Progress | None = None,
    inputs: bool = False,
) -> Statistics:
    """Statistics of all weights and vectors of the plan.

    `batches` are fixed micro-batches (`modules.micro_batches`), `run(model, batch)` gives the output (N, ...). One random
    direction a sample, one forward and one backward pass. The scale of each layer's G ⊗ A is that of E‖∇W‖². `cross_validate`: the
    moments' eigenvalues are what other samples say (`shrinkage`); else moments are the sample's. `inputs`: also histograms
    of layers' inputs (`inputs.py`).
    Raises InputError for a model that cannot be copied or run, and for NaN or infinite activations."""
    number = max(1, min(pool.count, -(-len(batches) // pool.processes.size)))
    collectors = [_Collector(wide_copy(model), plan, run, max_side, memory_limit, inputs) for _ in range(number)]
    with torch.no_grad():
        metric = resolve(metric, run(collectors[0].model, batches[0]))
        followed = absorbers(collectors[0].model, batches[0], plan, run)

    def depends() -> object:  # the sums of one batch stand for the code of the model, which cannot be seen
        own = model.state_dict(), plan, batches, metric, seed, max_side, memory_limit, cross_validate, inputs
        return own, collectors[0].partial(0, batches[0], metric, seed)

    stats = pool.keep(
        "statistics", depends, lambda: _statistics(collectors, batches, plan, pool, metric, seed, cross_validate, progress)
    )
    return replace(stats, absorbers=followed)


def _statistics(
    collectors: Sequence[_Collector],
    batches: Sequence[Any],
    plan: Plan,
    pool: Workers,
    metric: str,
    seed: int,
    cross_validate: bool,
    progress: Progress | None,
) -> Statistics:
    needed = sum(shape.num_bytes for shape in collectors[0].shapes.values())
    num_folds = MANY_FOLDS if needed < FEW_ABOVE else FEW_FOLDS
    mine = [k for k in range(len(batches)) if k % num_folds % pool.processes.size == pool.processes.rank]
    own: dict[int, Sums] = {}
    for first in range(0, len(mine), len(collectors)):
        chunk = [(k, batches[k]) for k in mine[first : first + len(collectors)]]
        jobs = zip(collectors, chunk, strict=False)
        partials = pool.own(lambda job: job[0].partial(*job[1], metric, seed), jobs)
        by_fold: dict[int, list[Sums]] = {}
        for (k, _), partial in zip(chunk, partials, strict=True):
            by_fold.setdefault(k % num_folds, []).append(partial)
        additions = [(own.get(fold), later) for fold, later in by_fold.items()]
        own |= zip(by_fold, pool.own(lambda pair: _added(*pair), additions), strict=True)
        del partials, partial, by_fold, additions
        if needed >= FEW_ABOVE:
            give_back()
        if progress:
            progress(min(first + len(collectors), len(mine)), len(mine))
    pieces = [(fold, piece) for fold, sums in own.items() for piece in sums.pieces()]
    folds = assembled(piece for share in pool.processes.swap(pieces) for piece in share)
    total = together(folds)
    if not total.positions and not total.row_squares:
        raise InputError("calibration reached no weight of the model: is its forward a function of another object?")
    shapes = collectors[0].shapes
    weights = [s for s in plan.specs if isinstance(s, WeightSpec)]
    largest = sorted(weights, key=lambda s: -shapes[s.name].num_bytes)  # long ones first
    found = pool.map(lambda s: layer_stats(s, folds, total, shapes[s.name], cross_validate), largest)
    by_name = {s.name: layer for s, layer in zip(largest, found, strict=True)}
    layers = {s.name: by_name[s.name] for s in weights}
    vectors = {key: (value / total.samples * total.unit).numpy() for key, value in total.vectors.items()}
    inputs = {s.name: total.inputs[s.name].stats(total.samples, total.unit) for s in weights if s.name in total.inputs}
    return Statistics(layers, vectors, metric, total.samples, inputs=inputs)


def _added(total: Sums | None, partials: list[Sums]) -> Sums:
    """A fold's sums with those of later micro-batches added."""
    for partial in partials:
        if total is None:
            total = partial.widened()
        else:
            total.add(partial)
    assert total is not None
    return total


class _Collector:
    """One copy of the model with its hooks."""

    def __init__(self, model: nn.Module, plan: Plan, run: Run, max_side: int, memory_limit: int, inputs: bool) -> None:
        self.model, self.run = model, run
        modules = dict(model.named_modules(remove_duplicate=False))
        specs = [s for s in plan.specs if isinstance(s, WeightSpec)]
        self.shapes = moment_shapes(specs, max_side, memory_limit)
        self.layers = [Moments(s, self.shapes[s.name]) for s in specs]
        self.recorded, self.others = _recorded(self.layers, modules, max_side)
        used = [(s.name, {id(m): m for m in (modules[u.module] for u in input_uses(s))}) for s in specs if inputs]
        self.inputs = [InputRecorder(name, list(found.values())) for name, found in used if found]
        self.vectors = [s for s in plan.specs if isinstance(s, VectorSpec)]
        self.batchnorms = [(s, modules[s.name]) for s in plan.specs if isinstance(s, BatchNormSpec)]
        self.parameters = dict(model.named_parameters(remove_duplicate=False))

    def partial(self, index: int, batch: Any, metric: str, seed: int) -> Sums:
        """Forward, one random direction, backward; sums over the batch."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % (1 << 63))
        handles: list[Handle] = []
        try:
            for layer in (*self.layers, *self.others):
                layer.reset(index)
            for kind, module, sinks in self.recorded:
                handles += attach(kind, module, sinks)
            for recorder in self.inputs:
                handles += recorder.attach()
            with torch.enable_grad():
                output = self.run(self.model, batch)
                resolve(metric, output)
                if not output.requires_grad:
                    raise InputError(
                        "the model's output has no gradient (is its forward under torch.no_grad?); use metric='weights'"
                    )
                for layer in (*self.layers, *self.others):
                    layer.check()
                direction(output, metric, generator).backward()  # type: ignore[no-untyped-call]
        finally:
            for handle in handles:
                handle.remove()
        samples = len(output)
        every = (*self.layers, *self.others)
        seen = {layer.spec.name: layer for layer in every if layer.columns is not None and layer.rows is not None}
        sums = Sums(
            {name: layer.columns.cpu() for name, layer in seen.items() if layer.columns is not None},
            {name: layer.rows.cpu() for name, layer in seen.items() if layer.rows is not None},
            {name: layer.total.cpu() for name, layer in seen.items() if layer.total is not None},
            {name: layer.positions for name, layer in seen.items()},
            *self._squared_gradients(set(seen)),
            {layer.spec.name: [self._energies(layer) / samples] for layer in self.layers},
            self._vector_gradients(),
            samples,
            unit(output, metric),
            {r.name: r.sums for r in self.inputs if r.sums is not None},
        )
        for layer in every:
            layer.reset(index)
        for parameter in self.parameters.values():
            parameter.grad = None
        return sums

    def _gradient(self, name: str) -> Tensor | None:
        gradient = self.parameters[name].grad
        if gradient is None:
            return None
        gradient = (gradient.to_dense() if gradient.is_sparse else gradient).double()
        if not bool(torch.isfinite(gradient).all()):
            raise InputError(f"the gradient of {name!r} has NaN or infinite values on a calibration batch")
        return gradient

    def _energies(self, layer: Moments) -> FloatArray:
        """‖∇W‖² of the batch, float64 (g,); the samples' directions are independent, so its mean is the sum of theirs."""
        gradient = self._gradient(layer.spec.name)
        if gradient is None:
            return np.zeros(layer.shape.groups)
        energies: FloatArray = gradient.square().reshape(layer.shape.groups, -1).sum(1).cpu().numpy()
        return energies

    def _squared_gradients(self, seen: set[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By row (g, o) and by column (g, n): of weights whose rows are rescaled, and of those that were used, but not by calls
        of a module that is known."""
        rows, columns = {}, {}
        for layer in self.layers:
            name = layer.spec.name
            gradient = self._gradient(name) if name not in seen or layer.spec.rescaled else None
            if gradient is not None:
                squares = gradient.square().reshape(layer.shape.groups, layer.shape.rows, -1).cpu()
                rows[name], columns[name] = squares.sum(2), squares.sum(1)
        return rows, columns

    def _vector_gradients(self) -> dict[str, Tensor]:
        squares: dict[str, Tensor] = {}
        for spec in self.vectors:
            gradient = self._gradient(spec.name)
            if gradient is not None:
                squares[spec.name] = gradient.square().cpu()
        for norm, module in self.batchnorms:
            scale, shift = self._gradient(norm.key("weight")), self._gradient(norm.key("bias"))
            if scale is None or shift is None:
                continue
            # y = s·x + t with x = x̂·√(σ²+eps) + μ: dL/ds = dL/dγ·√(σ²+eps) + μ·dL/dβ
            deviation = (module.running_var.double() + norm.eps).sqrt()
            by_scale = scale * deviation + module.running_mean.double() * shift
            squares[norm.key("weight")] = by_scale.square().cpu()
            squares[norm.key("bias")] = shift.square().cpu()
        return squares


Recorded = list[tuple[str, nn.Module, dict[str, Moments]]]  # kind, module, and the moments it fills by attribute


def _recorded(layers: Sequence[Moments], modules: Mapping[str, nn.Module], max_side: int) -> tuple[Recorded, list[Moments]]:
    """What is recorded of each weight: by its own module, and by others that are tied to it. Those of its kind fill the same
    moments, the others some of their own, which are returned too."""
    recorded: dict[tuple[str, int], tuple[str, nn.Module, dict[str, Moments]]] = {}
    others: list[Moments] = []
    for layer in layers:
        spec = layer.spec
        by_kind = {spec.kind: layer}
        for use in (Use(spec.module or "", spec.kind, spec.attribute), *spec.tied):
            if use.kind not in by_kind:
                other = replace(spec, name=tied_name(spec.name, use.kind), kind=use.kind, module=use.module, tied=())
                by_kind[use.kind] = Moments(other, next(iter(moment_shapes([other], max_side, MEMORY_LIMIT).values())))
                others.append(by_kind[use.kind])
            entry = recorded.setdefault((use.kind, id(modules[use.module])), (use.kind, modules[use.module], {}))
            entry[2].setdefault(use.attribute, by_kind[use.kind])
    return list(recorded.values()), others
