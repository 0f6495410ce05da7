"""Distillation of what takes hardly any bytes: with all weights quantized, biases and BatchNorms learn the float network's outputs.

    float network ─ outputs ─┐
    quantized weights, held ─┴─ distance ─ gradients ─ biases, scales, shifts ─ quantized again

Weights do not learn here (in `progressive.py` they do, as long as they are float): with all of them at once, what they gain on a
few hundred samples they lose elsewhere. The vectors of a network are few, and their steps fine. Every value learns in units of its
vector's step, which the metric has made equally important everywhere (Adam: Kingma & Ba, arXiv 1412.6980). Unlabelled samples,
the same that the statistics are of. Even vectors learn these samples by heart, so only a share of what they learned is kept.
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
from transquant.fingerprint import fingerprint
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
        self.copies = Copies(model, min(pool.count, SHARES))
        self._outputs: list[Tensor] = []

    def ready(self) -> bool:
        """Whether there is something to learn from: not where outputs are too many to hold."""
        if not self._outputs:
            self.copies.load({})
            some = self._output(self.batches[0])
            if some.numel() * len(self.batches) > MOST_OUTPUTS:
                return False
            self._outputs = self.pool.map(self._output, self.batches)
        return True

    def learn(self, state: Mapping[str, Tensor], units: Mapping[str, float], say: Callable[[int, int], None]) -> dict[str, Tensor]:
        """Values of parameters after distillation, by state-dict key. `state`: of the quantized network; `units`: of those that
        learn, by key. Empty where outputs are too many to hold, or numbers are not finite."""
        if not self.ready():
            return {}
        lesson = Lesson(self, state, units)
        lesson.learn(STEPS, dict.fromkeys(units, RATE), say)
        return lesson.values if lesson.finite() else {}

    def fingerprint(self) -> bytes:
        """Of the network, the samples and what the float network makes of them."""
        return fingerprint(self.copies.state, self.batches, self._outputs, self.metric)

    def gradients(self, number: int, values: Mapping[str, Tensor], names: Sequence[str]) -> tuple[dict[str, Tensor], int]:
        """Of the summed distance on a micro-batch with some parameters' `values`, float64 by key for those in `names`, and the
        number of predictions or values."""
        with self.copies.one() as model:
            parameters = dict(model.named_parameters(remove_duplicate=False))
            with torch.no_grad():
                for name, value in values.items():
                    parameters[name].copy_(value)
            with torch.enable_grad():
                total, count = loss(self._outputs[number], self.run(model, self.batches[number]).float().cpu(), self.metric)
                found = torch.autograd.grad(total, [parameters[n] for n in names], allow_unused=True)
        gradients = {n: torch.zeros_like(values[n]) if g is None else g.double().cpu() for n, g in zip(names, found, strict=True)}
        return gradients, count

    def _output(self, batch: Any) -> Tensor:
        with self.copies.one() as model, torch.no_grad():
            return self.run(model, batch).float().cpu()


class Lesson:
    """Parameters that learn a teacher's outputs, a stretch of steps at a time; Adam's memory and the order of the samples go on.

    `state`: of the whole network, by state-dict key; `units`: by key, of those that may learn, numbers or tensors of their shape;
    `shares`: micro-batches a step. One lesson of a teacher at a time: its copies of the model have these weights."""

    def __init__(
        self, teacher: Teacher, state: Mapping[str, Tensor], units: Mapping[str, float | Tensor], shares: int = SHARES,
        decay: float = 0.999,
    ) -> None:  # fmt: skip
        self.teacher, self.units, self.shares = teacher, units, shares
        teacher.copies.load(state)
        self.names = teacher.copies.learners(units)
        self._start = {n: state[n].double().clone() for n in self.names}
        self._moved = {n: torch.zeros_like(v, requires_grad=True) for n, v in self._start.items()}
        self._fixed: dict[str, Tensor] = {}  # bool (O,): rows that learn no more
        groups = [{"params": [moved], "name": n} for n, moved in self._moved.items()]
        self._optimizer = torch.optim.Adam(groups, lr=RATE, betas=(0.9, decay)) if groups else None
        self._generator = torch.Generator().manual_seed(SEED)
        self._queue: list[int] = []

    @property
    def values(self) -> dict[str, Tensor]:
        """As they are now, float64 by key."""
        return {n: (self._start[n] + self.units[n] * self._moved[n]).detach() for n in self.names}

    def finite(self) -> bool:
        """Whether all values are."""
        return all(bool(torch.isfinite(v).all()) for v in self.values.values())

    def fix(self, name: str, rows: Tensor, values: Tensor) -> None:
        """Give some rows, int64 (k,), of a parameter values that they keep from now on, (k, ...)."""
        fixed = self._fixed.setdefault(name, torch.zeros(len(self._start[name]), dtype=torch.bool))
        fixed[rows] = True
        self._start[name][rows] = values
        with torch.no_grad():
            self._moved[name][rows] = 0

    def learn(self, count: int, rates: Mapping[str, float], say: Callable[[int, int], None]) -> None:
        """Steps of those parameters that have a rate, which falls to 0 along a cosine; all others stay."""
        names = [n for n in self.names if n in rates]
        if not names or self._optimizer is None:
            return
        teacher, generator = self.teacher, self._generator
        for step in range(count):
            say(step, count)
            while len(self._queue) < self.shares:
                self._queue += torch.randperm(len(teacher.batches), generator=generator).tolist()
            members, self._queue = self._queue[: self.shares], self._queue[self.shares :]
            now = self.values
            parts = teacher.pool.map(lambda k, now=now: teacher.gradients(k, now, names), members)  # type: ignore[misc]
            number = sum(own for _, own in parts)
            for n, moved in self._moved.items():
                moved.grad = None
                if n in rates:
                    moved.grad = torch.stack([gradients[n] for gradients, _ in parts]).sum(0) * (self.units[n] / number)
            for group in self._optimizer.param_groups:
                group["lr"] = rates.get(group["name"], 0.0) * (1 + cos(pi * step / count)) / 2
            self._optimizer.step()
            with torch.no_grad():
                for n, fixed in self._fixed.items():
                    self._moved[n][fixed] = 0


def learned_changes(teacher: Teacher, draft: Draft, say: Callable[[int, int], None]) -> dict[str, FloatArray]:
    """What the vectors of a draft learn, float64 (length,) by name of the values; empty where nothing could be learned."""
    state, places = draft.state(), vector_places(draft)
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
    for key, (name, _) in vector_places(draft).items():
        now: FloatArray = state[key].double().numpy().reshape(-1)
        values[name] = now + share * changes[name] if name in changes else now
    return encoder.revised(values, {}, done).draft(draft.c, choice)


def vector_places(draft: Draft) -> dict[str, tuple[str, float]]:
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
