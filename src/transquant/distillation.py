"""Distillation of what takes hardly any bytes: with all weights quantized, biases and BatchNorms learn the float network's outputs.

    float network ─ outputs ─┐
    quantized weights, held ─┴─ distance ─ gradients ─ biases, scales, shifts ─ quantized again

Weights do not learn: a few hundred samples say too little about them, and what they gain there they lose elsewhere. The vectors
of a network are few, and their steps fine. Every value learns in units of its vector's step, which the metric has made equally
important everywhere (Adam: Kingma & Ba, arXiv 1412.6980). Unlabelled samples, the same that the statistics are of. Even vectors
learn these samples by heart, so only a share of what they learned is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import cos, pi
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from transquant.choices import Choice
from transquant.encoder import Draft, Encoder
from transquant.grid import steps
from transquant.records import BatchNormEntry, CodedEntry, CodedTensor, FloatArray
from transquant.stats.copies import Copies
from transquant.stats.metric import loss
from transquant.weights import CodedWeight
from transquant.workers import Workers

Run = Callable[[nn.Module, Any], Tensor]

FROM = 6  # effort
STEPS = 160
RATE = 0.15  # of the first step, in steps of a vector; it falls to 0 along a cosine
SHARES = 4  # micro-batches a step, whatever the number of threads and processes
MOST_OUTPUTS = 1 << 28  # values of float outputs that are held; with more there is no distillation
SEED = 20202
SHARES_OF_CHANGE = (1.0, 0.5, 0.25)  # of what was learned: held-back samples say how much of it holds for others


class Teacher:
    """The float network's outputs on some micro-batches, and copies of the model that learn them."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], run: Run, pool: Workers, metric: str) -> None:
        self.batches, self.run, self.pool, self.metric = list(batches), run, pool, metric
        self._copies = Copies(model, min(pool.count, SHARES))
        self._outputs: list[Tensor] = []

    def learn(self, state: Mapping[str, Tensor], units: Mapping[str, float], say: Callable[[int, int], None]) -> dict[str, Tensor]:
        """Values of parameters after distillation, by state-dict key. `state`: of the quantized network; `units`: of those that
        learn, by key. Empty where outputs are too many to hold, or numbers are not finite."""
        if not self._outputs:
            self._copies.load({})
            some = self._output(self.batches[0])
            if some.numel() * len(self.batches) > MOST_OUTPUTS:
                return {}
            self._outputs = self.pool.map(self._output, self.batches)
        self._copies.load(state)
        names = self._copies.learners(units)
        start = {n: state[n].double() for n in names}
        moved = {n: torch.zeros_like(v, requires_grad=True) for n, v in start.items()}
        optimizer = torch.optim.Adam(moved.values(), lr=RATE)
        generator = torch.Generator().manual_seed(SEED)
        queue: list[int] = []
        for step in range(STEPS):
            say(step, STEPS)
            while len(queue) < SHARES:
                queue += torch.randperm(len(self.batches), generator=generator).tolist()
            members, queue = queue[:SHARES], queue[SHARES:]
            now = {n: (start[n] + units[n] * moved[n]).detach() for n in names}
            parts = self.pool.map(lambda k, now=now: self._gradients(k, now), members)  # type: ignore[misc]
            count = sum(number for _, number in parts)
            for n in names:
                moved[n].grad = torch.stack([gradients[n] for gradients, _ in parts]).sum(0) * (units[n] / count)
            optimizer.param_groups[0]["lr"] = RATE * (1 + cos(pi * step / STEPS)) / 2
            optimizer.step()
        learned = {n: (start[n] + units[n] * moved[n]).detach() for n in names}
        return learned if all(bool(torch.isfinite(v).all()) for v in learned.values()) else {}

    def _output(self, batch: Any) -> Tensor:
        with self._copies.one() as model, torch.no_grad():
            return self.run(model, batch).float().cpu()

    def _gradients(self, number: int, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """Of the summed distance on a micro-batch, float64 by key, and the number of predictions or values."""
        with self._copies.one() as model:
            parameters = dict(model.named_parameters(remove_duplicate=False))
            with torch.no_grad():
                for name, value in values.items():
                    parameters[name].copy_(value)
            with torch.enable_grad():
                total, count = loss(self._outputs[number], self.run(model, self.batches[number]).float().cpu(), self.metric)
                found = torch.autograd.grad(total, [parameters[n] for n in values], allow_unused=True)
        gradients = {
            n: torch.zeros_like(v) if g is None else g.double().cpu() for (n, v), g in zip(values.items(), found, strict=True)
        }
        return gradients, count


def learned_changes(teacher: Teacher, draft: Draft, say: Callable[[int, int], None]) -> dict[str, FloatArray]:
    """What the vectors of a draft learn, float64 (length,) by name of the values; empty where nothing could be learned."""
    state, places = draft.state(), _places(draft)
    learned = teacher.learn(state, {key: unit for key, (_, unit) in places.items()}, say)
    return {
        name: (learned[key].double() - state[key].double()).numpy().reshape(-1)
        for key, (name, _) in places.items()
        if key in learned
    }


def changed(encoder: Encoder, draft: Draft, choice: Choice, changes: Mapping[str, FloatArray], share: float) -> Draft:
    """A draft with the weights of another, made with `choice`, and a share of the changes added to its vectors."""
    state = draft.state()
    weights = {name: draft.coded[name] for name in encoder.layers}
    done = {name: CodedWeight(w, draft.distortions[name], None) for name, w in weights.items() if isinstance(w, CodedTensor)}
    values: dict[str, FloatArray] = {}
    for key, (name, _) in _places(draft).items():
        now: FloatArray = state[key].double().numpy().reshape(-1)
        values[name] = now + share * changes[name] if name in changes else now
    return encoder.revised(values, {}, done).draft(draft.c, choice)


def _places(draft: Draft) -> dict[str, tuple[str, float]]:
    """By state-dict key of a coded vector: its name among the values that are coded, and its step."""
    places: dict[str, tuple[str, float]] = {}

    def size(qp: int) -> float:
        return float(steps(draft.step, np.array([[qp]]))[0, 0])

    for entry in draft.entries:
        if isinstance(entry, BatchNormEntry):
            for part, attribute, qp in zip(("scale", "shift"), ("weight", "bias"), entry.qps, strict=True):
                places[entry.key(attribute)] = f"{entry.name}.{part}", size(qp)
        elif isinstance(entry, CodedEntry) and len(entry.shape) < 2:
            places[entry.name] = entry.name, size(entry.qp)
    return places
