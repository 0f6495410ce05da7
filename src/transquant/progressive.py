"""Progressive quantization: rows of all weights are fixed group by group, and what is still float learns to make up for it.

    float weights ─┬─ some rows of every weight ─ feedback, trellis ─ fixed ─┐
                   └─ all other rows, vectors ─ learn the float network's outputs ─ some rows of these ─ …

Steps, offsets and the metric are those of a draft, and the format is the same. Its nearest relative is incremental network
quantization (Zhou et al. 2017, arXiv 1702.03044), which fixes weights in parts, too, and trains the rest. There parts are chosen by
magnitude and rounded one by one to powers of two, and the rest learns labels for epochs; here rows are drawn at random and go
through the error feedback and the trellis, and the rest learns the network's own outputs on unlabelled samples in little
more than a thousand small steps. Weights that are float have exact gradients, where one through a quantizer is a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import exp

import numpy as np
import torch
from torch import Tensor

from transquant.choices import Choice
from transquant.distillation import SEED, Lesson, Teacher, vector_places
from transquant.encoder import Draft, Encoder
from transquant.grid import on_grid
from transquant.records import CodedTensor, FloatArray, IntArray, WeightSpec
from transquant.row_coding import CodedRows, RowCoder, by_rows
from transquant.tuning import LARGE
from transquant.weights import CodedWeight, dequantized, predicted

FROM = 8  # effort
GROUPS = 20
TAPER = 0.6  # by how much the first group is larger than the mean, and the last one smaller: few rows are left to make up for it
TILT = 1.2  # of the log of a bit's price, from the first group to the last: what is lost first can be made up for
UPDATES, FINISH = 64, 40  # steps after each group; of the vectors at last
RATE, VECTOR_RATE = 0.005, 0.02  # of the first step after each group, in quantizer steps
DECAY = 0.98  # of Adam's mean squares: gradients change with every group

Say = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Fixed:
    """What a run has given: by name, symbols int32 (O, n) of weights and targets float64 (O, n) that they were quantized towards,
    values float64 (C,) of vectors."""

    symbols: Mapping[str, IntArray]
    targets: Mapping[str, FloatArray]
    vectors: Mapping[str, FloatArray]


def progressive(encoder: Encoder, teacher: Teacher, c: float, choice: Choice, say: Say) -> Draft | None:
    """A draft at scalar c whose rows were fixed one group after another; None where no weight's rows can be, or where there is
    nothing to learn from."""
    c = on_grid(c)
    if encoder.plan.work > LARGE or not teacher.ready():
        return None
    draft = encoder.draft(c, choice)
    coders = _coders(encoder, draft, choice)
    learners = teacher.copies.learners(coders)
    coders = {name: coder for name, coder in coders.items() if name in learners}
    if not coders:
        return None
    fixed: Fixed | None = encoder.pool.keep(
        "progressive", lambda: (teacher.fingerprint(), encoder.known, c, choice, draft.coded),
        lambda: _Run(encoder, teacher, draft, coders, say).run(),
    )  # fmt: skip
    if fixed is None:
        return None
    weights = {name: draft.coded[name] for name in encoder.layers}
    done = {n: CodedWeight(w, draft.distortions[n], None) for n, w in weights.items() if isinstance(w, CodedTensor)}
    for name, coder in coders.items():
        tensor = coder.whole(fixed.symbols[name])
        error = fixed.targets[name] - dequantized(tensor, draft.step)
        done[name] = CodedWeight(tensor, predicted(error, encoder.layers[name]), None)
    return encoder.revised(fixed.vectors, {}, done).draft(c, choice)


def _coders(encoder: Encoder, draft: Draft, choice: Choice) -> dict[str, RowCoder]:
    """By name, of the weights whose rows can be fixed some at a time."""
    specs = {s.name: s for s in encoder.plan.specs if isinstance(s, WeightSpec)}
    coders: dict[str, RowCoder] = {}
    for name, tensor in draft.coded.items():
        if name not in specs or not isinstance(tensor, CodedTensor):
            continue
        transform, stats = encoder.transform(specs[name]), encoder.layers[name]
        reached = stats.input_moment.any() and stats.output_moment.any()
        if reached and by_rows(tensor, transform):
            coders[name] = RowCoder.of(tensor, encoder.source.values[name], stats, draft.c, draft.step, choice, transform)
    return coders


class _Run:
    """One walk through all groups of rows."""

    def __init__(self, encoder: Encoder, teacher: Teacher, draft: Draft, coders: Mapping[str, RowCoder], say: Say) -> None:
        self.pool, self.coders, self.say, values = encoder.pool, coders, say, encoder.source.values
        state = draft.state()
        self.places = vector_places(draft)
        floats = {key: values[name] for key, (name, _) in self.places.items()} | {name: values[name] for name in coders}
        state |= {key: torch.from_numpy(np.array(value)).reshape(state[key].shape) for key, value in floats.items()}
        units: dict[str, float | Tensor] = {key: unit for key, (_, unit) in self.places.items()}
        units |= {name: torch.from_numpy(coder.units).reshape(state[name].shape) for name, coder in coders.items()}
        self.lesson = Lesson(teacher, state, units, shares=1, decay=DECAY)
        self.symbols = {name: np.zeros_like(coder.tensor.symbols) for name, coder in coders.items()}
        self.targets = {name: np.array(values[name]) for name in coders}
        self.counts: dict[str, FloatArray | None] = dict.fromkeys(coders)

    def run(self) -> Fixed | None:
        groups = row_groups({name: len(self.symbols[name]) for name in self.coders})
        rates = dict.fromkeys(self.places, VECTOR_RATE) | dict.fromkeys(self.coders, RATE)
        total = GROUPS * UPDATES + FINISH
        for k, group in enumerate(groups):
            self._fix(group, exp(TILT * (0.5 - k / (GROUPS - 1))))
            last = k == GROUPS - 1
            wanted = dict.fromkeys(self.places, VECTOR_RATE) if last else rates
            self.lesson.learn(FINISH if last else UPDATES, wanted, lambda done, _, k=k: self.say(k * UPDATES + done, total))  # type: ignore[misc]
        if not self.lesson.finite():
            return None
        values = self.lesson.values
        vectors = {name: values[key].numpy().reshape(-1) for key, (name, _) in self.places.items() if key in values}
        return Fixed(self.symbols, self.targets, vectors)

    def _fix(self, group: Mapping[str, IntArray], tilt: float) -> None:
        """Quantize these rows as they are now; from here on they stay."""
        now = self.lesson.values
        names = sorted(group, key=lambda n: -self.symbols[n].size)  # long ones first
        targets = {n: now[n].numpy().reshape(self.symbols[n].shape)[group[n]] for n in names}

        def coded(name: str) -> CodedRows:
            return self.coders[name].code(group[name], targets[name], tilt, self.counts[name])

        for name, rows in zip(names, self.pool.map(coded, names), strict=True):
            which = group[name]
            self.symbols[name][which], self.targets[name][which], self.counts[name] = rows.symbols, targets[name], rows.counts
            shape = self.lesson.values[name].shape
            self.lesson.fix(name, torch.from_numpy(which), torch.from_numpy(rows.values).reshape(len(which), *shape[1:]))


def row_groups(heights: Mapping[str, int]) -> list[dict[str, IntArray]]:
    """For each group some rows of every weight, int64 in ascending order, drawn without replacement; weights that have none are
    left out. Groups become smaller towards the end."""
    shares = 1 + TAPER * (1 - 2 * np.arange(GROUPS) / (GROUPS - 1))
    cuts = np.concatenate([[0], np.cumsum(shares)]) / shares.sum()
    generator = torch.Generator().manual_seed(SEED)
    groups: list[dict[str, IntArray]] = [{} for _ in range(GROUPS)]
    for name, height in heights.items():
        order = torch.randperm(height, generator=generator).numpy()
        ends = np.rint(cuts * height).astype(int)
        for group, begin, end in zip(groups, ends[:-1], ends[1:], strict=True):
            if end > begin:
                group[name] = np.sort(order[begin:end])
    return groups
