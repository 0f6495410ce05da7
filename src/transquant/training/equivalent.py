"""Other weights with which a network computes the same, and that take fewer bits.

    few tokens ─ embedding E ─ x ─ W of the layers that read it     x has no more directions than there are tokens
    few tokens ─ E·Q·D ────────── W·Q·D⁻¹                           so all other columns of both are zero

Q are the principal axes of what the embedding puts out, D makes columns of E and of W about equally sensitive. Without that both a
closed loop and gradients through rounding pay for all columns: docs/training.md has figures. Principal axes are the Karhunen–Loève
transform of transform quantization (Young et al., arXiv 2009.01174); here it costs nothing, since the layer before takes it up.

And of two biases that are added one is enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from transquant.guard import unchanged
from transquant.modules.run import Forward, Output, batches_of, micro_batches, run_batch
from transquant.records import Plan, VectorSpec, WeightSpec

POWER = 0.25  # D is so much of a direction's variance, inverted: half-way between what is best for E and for W
SEEN = 1e-9  # of the table's energy: with less a direction is not there
SAME = 1e-3  # of the outputs' root mean square: by how much they may differ


@dataclass(slots=True)
class _Reading:
    """Of one embedding: layers that read its very output, and moments of that, float64 (E,) and (E, E)."""

    embedding: nn.Embedding
    readers: set[nn.Module] = field(default_factory=set)
    output: Tensor | None = None
    count: int = 0
    total: Tensor | None = None
    square: Tensor | None = None


def fewer_columns(
    model: nn.Module, plan: Plan, calibration: Iterable[Any], forward: Forward | None, output: Output | None
) -> list[str]:
    """Rotate the inputs of layers that read an embedding of fewer tokens than it has columns, in place. Names of the embeddings
    for which that was done; where outputs would not be the same, for whatever reason, nothing is.

    Left alone: weights that several modules share, that do not learn or are stored exactly, and embeddings with `max_norm`."""
    own = _unshared(model, plan)
    found = [
        _Reading(m)
        for name, m in model.named_modules()
        if type(m) is nn.Embedding and m.max_norm is None and m.weight.shape[0] < m.weight.shape[1] and id(m.weight) in own
    ]
    if not found:
        return []
    batches = list(micro_batches(batches_of(calibration, whole=forward is not None)))
    with unchanged(model), torch.no_grad():
        model.eval()
        before, done = _watched(model, found, batches, forward, output), set()
        for reading in found:
            layers = [_inputs(m) for m in reading.readers]
            if not layers or any(w is None or not all(id(p) in own for p in w) for w, _ in layers):
                continue
            weights = [p for some, _ in layers for p in some or ()]
            biases = [b for _, b in layers]
            changed: list[Tensor] = [reading.embedding.weight, *weights, *(b for b in biases if b is not None)]
            kept = [p.detach().clone() for p in changed]
            _rotate(reading, weights, biases if all(b is not None and id(b) in own for b in biases) else None)
            after = run_batch(model, batches[0], forward, output)
            if bool((after - before).abs().max() <= SAME * before.square().mean().sqrt()):
                done.add(reading.embedding)
                continue
            for parameter, value in zip(changed, kept, strict=True):
                parameter.copy_(value)
    return [name for name, m in model.named_modules() if m in done]


def one_bias(model: nn.Module, plan: Plan, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which of two biases that a recurrent layer adds the second is zero, and the first their sum. (A GRU's are
    multiplied with a gate in part, and stay, as do biases that are shared, do not learn or are stored exactly.)"""
    merged, own = dict(state), _unshared(model, plan)
    for path, module in model.named_modules():
        if not isinstance(module, nn.RNN | nn.LSTM | nn.RNNCell | nn.LSTMCell):
            continue
        for attribute in (a for a in module._parameters if a.startswith("bias_ih")):
            both = attribute, attribute.replace("bias_ih", "bias_hh")
            if all(id(module._parameters[a]) in own for a in both):
                first, second = (f"{path}.{a}".removeprefix(".") for a in both)
                merged[first], merged[second] = state[first] + state[second], torch.zeros_like(state[second])
    return merged


def _unshared(model: nn.Module, plan: Plan) -> set[int]:
    """Identities of parameters that one module has, under one name, that learn, and that are coded."""
    coded = {s.name for s in plan.specs if isinstance(s, WeightSpec | VectorSpec)}
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                users.setdefault(id(parameter), []).append(f"{path}.{attribute}".removeprefix("."))
    return {key for key, names in users.items() if len(names) == 1 and names[0] in coded}


def _inputs(module: nn.Module) -> tuple[list[Tensor] | None, Tensor | None]:
    """What a layer multiplies its input with, (O, I) each, and what it adds to that, where there is one such and it has a bias;
    None for layers that do something else."""
    if type(module) is nn.Linear:
        return [module.weight], module.bias
    if isinstance(module, nn.RNNBase):
        weights: list[Tensor] = [p for n, p in module._parameters.items() if n.startswith("weight_ih_l0") and p is not None]
        return weights, module._parameters.get("bias_ih_l0") if len(weights) == 1 else None
    return None, None


def _watched(
    model: nn.Module, found: Sequence[_Reading], batches: Sequence[Any], forward: Forward | None, output: Output | None
) -> Tensor:
    """Run all batches, see who reads what; outputs for the first batch."""
    handles = []
    readings = {r.embedding: r for r in found}

    def put_out(module: nn.Module, inputs: Any, result: Tensor) -> None:
        reading = readings[module]  # type: ignore[index]
        values = result.detach().double().flatten(0, -2)
        total, square = values.sum(0), values.T @ values
        reading.total = total if reading.total is None else reading.total + total
        reading.square = square if reading.square is None else reading.square + square
        reading.count, reading.output = reading.count + len(values), result

    def taken(module: nn.Module, inputs: Any) -> None:
        for reading in found:
            if any(value is reading.output for value in inputs if isinstance(value, Tensor)):
                reading.readers.add(module)

    try:
        for module in model.modules():
            if module in readings:
                handles.append(module.register_forward_hook(put_out))
            elif not list(module.children()):
                handles.append(module.register_forward_pre_hook(taken))
        first: Tensor | None = None
        for batch in batches:
            result = run_batch(model, batch, forward, output)
            first = result.clone() if first is None else first
    finally:
        for handle in handles:
            handle.remove()
        for reading in found:
            reading.output = None
    assert first is not None
    return first


def _rotate(reading: _Reading, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None) -> None:
    """In place; with `biases` the embedding's mean output becomes zero."""
    assert reading.total is not None
    assert reading.square is not None
    table = reading.embedding.weight.detach().double()
    own = [w.detach().double() for w in weights]
    count = reading.count + len(table)  # each token once more: samples need not have all
    moment, mean = (reading.square + table.T @ table) / count, (reading.total + table.sum(0)) / count
    if biases is not None:
        for weight, bias in zip(own, biases, strict=True):
            assert bias is not None
            bias.add_((weight @ mean).to(bias))
        table, moment = table - mean, moment - mean[:, None] * mean
    variance, axes = torch.linalg.eigh(moment)
    variance, axes = variance.flip(0), axes.flip(1)
    seen = (table @ axes).square().sum(0) > SEEN * table.square().sum()
    scale = variance.clamp(min=float(variance[seen].min())) ** -POWER
    scale = scale * seen
    turned = [torch.where(seen, weight @ axes / scale.clamp(min=1e-30), 0.0) for weight in own]
    power = sum(float(w.square().sum()) for w in own), sum(float(w.square().sum()) for w in turned)
    share = (power[1] / power[0]) ** 0.5 if min(power) > 0 else 1.0  # weights are as large as before
    reading.embedding.weight.copy_((table @ axes) * scale * share)
    for parameter, weight in zip(weights, turned, strict=True):
        parameter.copy_(weight / share)
