"""Progressive quantization as a training: rows of all weights are fixed group after group, while the others, still float, learn.

template, float network ─┬─ every few steps: look ─ hold: a group of rows ─ RowCoder ─ fixed; RatePlan ─ price of a bit
                         └─ settle: the last rows, at the asked size; vectors go on learning

What `transquant.progressive` does with a few hundred unlabelled samples and little more than a thousand small steps, with all the
data and steps there are, any loss, and a price of bits: free rows become such as take fewer. Its nearest relative is incremental
network quantization (Zhou et al. 2017, arXiv 1702.03044); docs/method.md says where it differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import cos, pi
from typing import Any

import torch
from torch import nn

from transquant import bitstream, codec, modules
from transquant.calibrating import calibrate
from transquant.choices import IDENTITY, Choice
from transquant.encoder import Encoder, Source
from transquant.entropy.lanes import encode_planes
from transquant.guard import unchanged
from transquant.modules.run import Forward, Output
from transquant.quantizers.feedback import Rounding
from transquant.records import CodedTensor
from transquant.row_coding import RowCoder
from transquant.training.network import SoftNetwork
from transquant.training.rate_plan import RatePlan, share_of_rows
from transquant.training.rows import RowsWeight
from transquant.training.soft import integers
from transquant.training.template import Template
from transquant.workers import workers

GROUPS = 80  # of rows, about
LEAST = 8  # steps between two of them
SETTLED = 0.97  # share of the training at which the last rows are fixed
AIM = 0.9975  # of the asked size, while vectors still learn
FINER = 1.12  # times the target's size is the template's: free rows learn to take less


class ProgressiveNetwork(SoftNetwork):
    """`soft` are `RowsWeight`s; `rates`: the plan of what groups take, made at the first look; `rest`: bytes of all but weights."""

    soft: dict[str, RowsWeight]  # type: ignore[assignment]
    rates: RatePlan | None = None
    rest: float = 0.0

    def give(self, coders: Mapping[str, RowCoder]) -> None:
        """How rows are quantized, by weight; those without keep the template's symbols."""
        for name, weight in self.soft.items():
            weight.give(coders.get(name))

    @property
    def aims(self) -> tuple[float, float]:
        """Only vectors change after that."""
        return AIM, (1 - AIM)

    @property
    def share(self) -> float:
        """Rates stay until the last rows are fixed, since each group needs them as much; then they fall to zero."""
        late = (self.progress - self.schedule.settled) / (1 - self.schedule.settled)
        return 0.5 * (1 + cos(pi * min(max(late, 0.0), 1.0)))

    @property
    def every(self) -> int:
        """Steps between two groups."""
        return max(self._last // (GROUPS - 1), LEAST) if self.schedule.steps else super().every

    @property
    def groups(self) -> int:
        """Groups of rows; the last one is fixed by `settle`."""
        return self._last // self.every + 1

    def look(self) -> None:
        """Count the code lengths; `bytes` are those of the file that is to be expected."""
        if self.settled:
            super().look()
            return
        for name in self.soft:
            integers(self.originals(name)[0])  # a training that has diverged ends here
        self.lengths.count({name: weight.expected() for name, weight in self.soft.items()})
        if self.rates is None:
            assert self.target is not None
            weights = {name: weight.tensor for name, weight in self.soft.items()}
            self.rest = len(self._file(weights)) - self._size(weights.values())
            self.rates = RatePlan.of(self.groups, 8 * (AIM * self.target - self.rest) / self._values())
        self.bytes = round(self.rest + self.rates.expected() * self._values() / 8)

    def keep(self) -> None:
        """Fix the next group, unless it is the last."""
        if self.settled or self.rates is None or not self.schedule.steps or self.rates.group >= self.groups - 1:
            return
        self._priced(self.rates)
        self.held = (self.rates.group + 1) / self.groups
        for name, weight in self.soft.items():
            weight.hold(share_of_rows(self.held), *self.originals(name))
        self.rates.measure(8 * self._size(part for w in self.soft.values() if (part := w.part())) / self._values())
        self._priced(self.rates)

    def state(self) -> dict[str, Any]:
        """Also what is known of each weight's inputs and outputs: calibration is not repeated."""
        weights: dict[str, Any] = {}
        for name, weight in self.soft.items():
            coder, counts = weight.coder, weight.counts
            weights[name] = {
                "counts": None if counts is None else torch.from_numpy(counts),
                "bit": None if coder is None else coder.bit,
                "dead_zone": None if coder is None else coder.rounding.dead_zone,
                "moments": [] if coder is None else [[torch.from_numpy(m) for m in pair] for pair in coder.moments],
            }
        rates = None if self.rates is None else self.rates.state()
        return super().state() | {"rates": rates, "rest": self.rest, "weights": weights}

    def load(self, state: Mapping[str, Any]) -> None:
        """The mirror of `state`."""
        super().load({**state, "held": 0.0, "settled": False})  # rows come with the module
        self.held, self.settled, self.rest = float(state["held"]), bool(state["settled"]), float(state["rest"])
        for name, weight in self.soft.items():
            own = state["weights"][name]
            weight.counts = None if own["counts"] is None else own["counts"].numpy()
            if own["bit"] is None:
                weight.give(None)
            else:
                moments = [(a.numpy(), g.numpy()) for a, g in own["moments"]]
                rounding = Rounding(own["dead_zone"], weight.tensor.entry.recon_offsets)
                weight.give(RowCoder(weight.tensor, moments, None, own["bit"], self.template.container.step, rounding))
        if state["rates"] is not None:
            self.rates = RatePlan(**state["rates"])
            self._priced(self.rates)

    @property
    def _last(self) -> int:
        """The step at which the last rows are fixed."""
        return int(self.schedule.settled * self.schedule.steps)

    def _priced(self, rates: RatePlan) -> None:
        self.price.memory = rates.correction
        for weight in self.soft.values():
            weight.log_price = rates.log_price

    def _values(self) -> int:
        return sum(weight.tensor.symbols.size for weight in self.soft.values())

    def _size(self, tensors: Iterable[CodedTensor]) -> int:
        """Bytes of some weights, or of rows of them, in one file."""
        parts = [(tensor.entry, tensor) for tensor in tensors]
        step, coder = self.template.container.step, self.template.coder
        return len(bitstream.encode(step, parts, {}, lambda jobs: (encode_planes(*job) for job in jobs), coder).data)


def coders_of(
    model: nn.Module, calibration: Iterable[Any] | None, template: Template, start: codec.CompressedModel, forward: Forward | None,
    output: Output | None, seed: int,
) -> dict[str, RowCoder]:  # fmt: skip
    """By weight, of a float network and what it has been compressed to: statistics of the samples as `compress` takes them."""
    choice, c, plan = start.report.settings.get("choice", Choice()), template.size(0), template.plan
    coders: dict[str, RowCoder] = {}
    with torch.inference_mode(False), unchanged(model), workers() as pool:
        source = Source(*modules.gather(plan, model.state_dict()))
        seen = calibrate(
            model, calibration, plan, source, "auto", forward, output, seed, pool, lambda *_: None, 0, None, False, False, False
        )  # fmt: skip
        layers = Encoder(plan, source, seen.stats, pool).layers
        for name, tensor in template.weights.items():
            stats = layers[name]
            if stats.input_moment.any() and stats.output_moment.any():
                step = template.container.step
                coders[name] = RowCoder.of(tensor, source.values[name], stats, c, step, choice, IDENTITY)
    return coders
