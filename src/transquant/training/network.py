"""A network whose weights are soft, and what it is worth at any moment: its bits, its file, the price of a bit.

    prepare ─ SoftNetwork ─┬─ penalty ─ the loss
                           ├─ price ─ follows the size of the file
                           ├─ settle: symbols stay, all else goes on learning
                           └─ file, at the asked size ─ harden
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from transquant.errors import InputError, TargetError
from transquant.records import CodedTensor
from transquant.training.code_length import CodeLengths
from transquant.training.price import Price
from transquant.training.soft import SoftWeight
from transquant.training.template import Template

EVERY = 25  # steps between two looks at the file
SLACK = 0.01  # by how much a file may be smaller than asked
AIM = 0.996  # of the asked size, while vectors still learn
SHIFTS = 14  # halvings of the interval of shifts


@dataclass(frozen=True, slots=True)
class Schedule:
    """`steps`: of the optimizer, in all; 0 where the caller does not say. The wanted size falls from `begin` times the target to
    the target until the share `reached`; symbols settle at the share `settled`."""

    steps: int = 0
    begin: float = 1.0
    reached: float = 0.5
    settled: float = 0.85


class SoftNetwork:
    """`target`: bytes of the file, None where the method has a depth instead. `places`: by weight, the module and the attribute
    that use it first."""

    def __init__(
        self, model: nn.Module, template: Template, soft: Mapping[str, SoftWeight], places: Mapping[str, tuple[nn.Module, str]],
        target: float | None, price: Price, schedule: Schedule, method: str,
    ) -> None:  # fmt: skip
        self.template, self.soft, self.places, self.target = template, dict(soft), dict(places), target
        self.price, self.schedule, self.method = price, schedule, method
        self.lengths, self.step, self.settled, self.bytes = CodeLengths(), 0, False, 0
        self._state = model.state_dict  # of the prepared module
        for weight in self.soft.values():
            weight.owner = self

    def originals(self, name: str) -> tuple[Tensor, ...]:
        """The parameters of a weight."""
        module, attribute = self.places[name]
        found = module.parametrizations[attribute]  # type: ignore[index, union-attr]
        return tuple(p for key, p in found.named_parameters(recurse=False) if key.startswith("original"))

    @property
    def progress(self) -> float:
        """Share of the training that is over, 0 where nobody has said how long it is."""
        return min(self.step / self.schedule.steps, 1.0) if self.schedule.steps else 0.0

    def penalty(self) -> Tensor:
        """What to add to the loss, a mean over samples in nats or whatever unit the metric has, at every step of the optimizer
        once: the price of the bits, and what the method asks of its weights. Counts the steps and looks at the file now and then.
        Raises TargetError where the size cannot be met when symbols settle."""
        if self.step % EVERY == 0:
            self.look()
        if self.schedule.steps and not self.settled and self.step >= self.schedule.settled * self.schedule.steps:
            self.settle()
        self.step += 1
        total = torch.zeros(())
        for name, weight in self.soft.items():
            given = self.originals(name)
            extra = weight.loss(self.progress, *given)
            if extra is not None:
                total = total + extra
            if self.target is not None and not self.settled:
                total = total + self.price.now * weight.bits(self.lengths, *given)
        return total

    def wanted(self) -> float:
        """Bytes that are wanted now."""
        assert self.target is not None
        over = min(self.progress / self.schedule.reached, 1.0) if self.schedule.reached else 1.0
        return AIM * self.target * (self.schedule.begin + (1 - self.schedule.begin) * over)

    def look(self) -> None:
        """Encode the file as it is now; the price and the code lengths follow it."""
        coded = self.coded(0.0)
        self.lengths.count({name: tensor.symbols for name, tensor in coded.items()})
        self.bytes = len(self._file(coded))
        if self.target is not None and not self.settled:
            self.price.measure(self.bytes, self.wanted())

    def settle(self) -> None:
        """Symbols stay as they are at the asked size."""
        shift = 0.0 if self.target is None else self.shift_for(AIM * self.target)
        for name, weight in self.soft.items():
            weight.settle(shift, *self.originals(name))
        self.settled = True
        self.look()

    def coded(self, shift: float) -> dict[str, CodedTensor]:
        """All weights as the file has them."""
        with torch.no_grad():
            return {name: weight.code(shift, *self.originals(name)) for name, weight in self.soft.items()}

    def shift_for(self, target: float) -> float:
        """The least shift whose file has at most so many bytes. Raises TargetError."""
        sizes: dict[float, int] = {}

        def size(shift: float) -> int:
            sizes[shift] = len(self._file(self.coded(shift)))
            return sizes[shift]

        if (1 - SLACK) * target <= size(0.0) <= target:
            return 0.0
        low, high = (0.0, 4.0) if sizes[0.0] > target else (-0.45, 0.0)
        if sizes[0.0] > target and size(high) > target:
            raise TargetError(f"a file of {target:.0f} bytes cannot be reached: the smallest takes {sizes[high]} bytes")
        for _ in range(SHIFTS):
            middle = (low + high) / 2
            low, high = (middle, high) if size(middle) > target else (low, middle)
            if (1 - SLACK / 4) * target <= sizes[middle] <= target:
                return middle
        return high

    def file(self) -> bytes:
        """The file at the asked size. Raises TargetError."""
        shift = 0.0 if self.target is None else self.shift_for(self.target)
        return self._file(self.coded(shift))

    def parameter_groups(self, rate: float, vector_rate: float | None = None) -> list[dict[str, Any]]:
        """Groups for an Adam optimizer: weights at `rate` steps a step, all other parameters at `vector_rate`
        (None: a tenth of it), neither with weight decay."""
        own = {id(p): p for name in self.soft for p in self.originals(name)}
        rest = [p for p in self._module().parameters() if id(p) not in own and p.requires_grad]
        return [
            {"params": list(own.values()), "lr": rate, "weight_decay": 0.0},
            {"params": rest, "lr": rate / 10 if vector_rate is None else vector_rate, "weight_decay": 0.0},
        ]

    def _module(self) -> nn.Module:
        return self._state.__self__  # type: ignore[no-any-return, attr-defined]

    def _file(self, weights: Mapping[str, CodedTensor]) -> bytes:
        return self.template.file(weights, self.plain_state(), {"training": self.method})

    def plain_state(self) -> dict[str, Tensor]:
        """The state dict under the names it had before, without the soft weights."""
        state = {k: v for k, v in self._module().state_dict().items() if ".parametrizations." not in f".{k}"}
        aliases = self.template.aliases()
        return state | {name: state[of] for name, of in aliases.items() if of in state}
