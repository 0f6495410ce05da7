"""A network whose weights are soft, and what it is worth at any moment: its bits, its file, the price of a bit.

prepare ─ SoftNetwork ─┬─ penalty ─ the loss
                       ├─ price ─ follows the size of the file
                       ├─ settle: symbols stay, all else goes on learning
                       └─ file, at the asked size ─ harden
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import cos, exp, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from transquant import modules
from transquant.errors import InputError, TargetError
from transquant.grid import global_step
from transquant.records import CodedTensor
from transquant.training.code_length import CodeLengths
from transquant.training.equivalent import one_bias
from transquant.training.price import Price
from transquant.training.soft import DIVERGED, SoftWeight
from transquant.training.template import Template

EVERY, LOOKS = 25, 40  # steps between two looks at the file, at most; looks that a training has, at least where it has the steps
SLACK = 0.01  # by how much a file may be smaller than asked
SMALL = 64  # bytes that a tiny file may be smaller than asked, as in `Target.slack`
AIM = 0.996  # of the asked size, while vectors still learn
NEAR = 0.9985  # the same where symbols settle little by little: what has settled cannot be changed at the end
LEAD = 0.03  # by how much more is wanted when they begin to: a price that falls brings few of their zeros back
RATE = 0.01  # steps a step of Adam
SHIFTS = 14  # halvings of the interval of shifts
_log = logging.getLogger("transquant")


@dataclass(slots=True)
class Fate:
    """What has become of a training: steps that were made, and whether anybody has asked for the file or keeps checkpoints."""

    steps: int = 0
    kept: bool = False


def _lost(fate: Fate) -> None:
    if fate.steps and not fate.kept:
        _log.warning("a prepared model was trained for %d steps and given up without training.harden: there is no file", fate.steps)


@dataclass(frozen=True, slots=True)
class Schedule:
    """`steps`: of the optimizer, in all; 0 where the caller does not say. The wanted size falls from `begin` times the target to
    the target until the share `reached`; symbols settle at the share `settled`, or little by little from `settling` on."""

    steps: int = 0
    begin: float = 1.0
    reached: float = 0.5
    settling: float = 1.0
    settled: float = 0.85

    @property
    def gradual(self) -> bool:
        """Whether symbols settle little by little."""
        return self.steps > 0 and self.settling < self.settled

    def held(self, progress: float) -> float:
        """The share of the symbols that stays at a share of the training, before they have settled."""
        return min(max((progress - self.settling) / (self.settled - self.settling), 0.0), 1.0) if self.gradual else 0.0


class SoftNetwork:
    """Of a prepared module. `target`: bytes of the file, None where the method has a depth instead. `places`: by weight, the
    modules and attributes that use it. `step`: of the optimizer, as `penalty` counts; `bytes`: of the file at the last look."""

    def __init__(
        self, model: nn.Module, template: Template, soft: Mapping[str, SoftWeight],
        places: Mapping[str, Sequence[tuple[nn.Module, str]]], target: float | None, price: Price, schedule: Schedule,
        method: str, seed: int,
    ) -> None:  # fmt: skip
        self.template, self.soft, self.places, self.target = template, dict(soft), dict(places), target
        self.price, self.schedule, self.method, self.seed = price, schedule, method, seed
        self.lengths, self.step, self.held, self.settled, self.bytes = CodeLengths(), 0, 0.0, False, 0
        self.model, self.fate = [model], Fate()
        weakref.finalize(self, _lost, self.fate)
        for weight in self.soft.values():
            weight.owner = self

    def originals(self, name: str) -> tuple[Tensor, ...]:
        """The parameters of a weight. Raises InputError where the model has been hardened."""
        module, attribute = self.places[name][0]
        if not parametrize.is_parametrized(module, attribute):
            raise InputError(f"weight {name!r} is no longer soft: the model has been hardened, or changed; prepare it again")
        return tuple(parameter for _, parameter in originals(module, attribute))

    @property
    def progress(self) -> float:
        """Share of the training that is over, 0 where nobody has said how long it is."""
        return min(self.step / self.schedule.steps, 1.0) if self.schedule.steps else 0.0

    @property
    def share(self) -> float:
        """Of the learning rates, what is left in this step: one cosine to zero."""
        return 0.5 * (1 + cos(pi * self.progress))

    @property
    def every(self) -> int:
        """Steps between two looks at the file."""
        return max(min(EVERY, self.schedule.steps // LOOKS), 1) if self.schedule.steps else EVERY

    def penalty(self) -> Tensor:
        """What to add to the loss, a mean over samples in nats or whatever unit the metric has, at every step of the optimizer
        once: the price of the bits, and what the method asks of its weights. Counts the steps and looks at the file now and then.
        Raises TargetError where the size cannot be met when symbols settle."""
        if self.step % self.every == 0:
            self.look()
            self.keep()
        if self.schedule.steps and not self.settled and self.step >= self.schedule.settled * self.schedule.steps:
            self.settle()
        self.step += 1
        self.fate.steps += 1
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
        aim, lead = (NEAR, LEAD) if self.schedule.gradual else (AIM, 0.0)
        lead *= max(1 - self.progress / self.schedule.settled, 0.0)
        over = min(self.progress / self.schedule.reached, 1.0) if self.schedule.reached else 1.0
        return aim * self.target * max(self.schedule.begin + (1 - self.schedule.begin) * over, 1 + lead)

    def look(self) -> None:
        """Encode the file as it is now; the price and the code lengths follow it."""
        coded = self.coded(0.0)
        self.lengths.count({name: tensor.symbols for name, tensor in coded.items()})
        self.bytes = len(self._file(coded))
        if self.target is not None and not self.settled:
            self.price.measure(self.bytes, self.wanted())
            self._turn()

    def _turn(self) -> None:
        """Steps become finer where the file is too small, while all symbols can change."""
        if self.held == 0 and all(weight.follows for weight in self.soft.values()) and (change := self.price.turn()):
            self.rescale(global_step(self.template.size(0) * exp(change)))

    def rescale(self, step: tuple[int, int]) -> None:
        """All steps of the file go with its global step; weights stay what they were, but for rounding."""
        self.template = self.template.stepped(step)
        for name, weight in self.soft.items():
            weight.rescale(step, *self.originals(name))

    def keep(self) -> None:
        """After a look: as many symbols stay as the schedule says, but while the file is too large: they cannot become smaller."""
        if self.target is None or self.bytes <= (1 + SLACK) * self.wanted():
            self.hold(self.schedule.held(self.progress))

    def hold(self, share: float) -> None:
        """Let a share of the symbols stay as they are, where it is more than before and they have not settled."""
        if share > self.held and not self.settled:
            for name, weight in self.soft.items():
                weight.hold(share, *self.originals(name))
            self.held = share

    @property
    def aims(self) -> tuple[float, float]:
        """Of the asked size, what is wanted when symbols settle, and by how much that may be missed."""
        return ((1 + NEAR) / 2, SLACK - (1 - NEAR)) if self.schedule.gradual else (AIM, SLACK / 2)

    def settle(self) -> None:
        """Symbols stay as they are at the asked size."""
        aim, slack = self.aims
        shift = 0.0 if self.target is None else self.shift_for(aim * self.target, slack)
        for name, weight in self.soft.items():
            weight.settle(shift, *self.originals(name))
        self.settled = True
        self.look()

    def coded(self, shift: float) -> dict[str, CodedTensor]:
        """All weights as the file has them. Raises InputError where one is no longer a number."""
        with torch.no_grad():
            for name in self.soft:
                if not all(bool(parameter.isfinite().all()) for parameter in self.originals(name)):
                    raise InputError(f"weight {name!r} is no longer a finite number: {DIVERGED}")
            return {name: weight.code(shift, *self.originals(name)) for name, weight in self.soft.items()}

    def shift_for(self, target: float, slack: float = SLACK) -> float:
        """0 where the file has at most so many bytes and hardly fewer, by the share `slack`; else the least shift with which it has
        at most so many. Raises TargetError."""
        sizes: dict[float, int] = {}

        def size(shift: float) -> int:
            sizes[shift] = len(self._file(self.coded(shift)))
            return sizes[shift]

        if (1 - slack) * target <= size(0.0) <= target:
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
        self.fate.kept = True
        shift = 0.0 if self.target is None else self.shift_for(self.target)
        data = self._file(self.coded(shift))
        if self.target is not None and self.target - len(data) > max(SLACK * self.target, SMALL):
            _log.warning("the file has %d bytes where %d were asked for: the weights have no use for more", len(data), self.target)
        return data

    def parameter_groups(self, rate: float = RATE, vector_rate: float | None = None) -> list[dict[str, Any]]:
        """Groups for an Adam optimizer: weights at `rate`, in their steps, what methods learn beside them at rates of its own, all
        other parameters at `vector_rate` (None: a tenth of `rate`); none with weight decay."""
        groups: dict[float, list[nn.Parameter]] = {}
        own: set[int] = set()
        for name, weight in self.soft.items():
            for parameter, given in zip(self.originals(name), weight.rates, strict=False):
                groups.setdefault(rate if given is None else given, []).append(parameter)  # type: ignore[arg-type]
                own.add(id(parameter))
        rest = [p for p in self._module().parameters() if id(p) not in own and p.requires_grad]
        found: list[dict[str, Any]] = [{"params": some, "lr": lr, "weight_decay": 0.0} for lr, some in groups.items()]
        if rest:
            found.append({"params": rest, "lr": rate / 10 if vector_rate is None else vector_rate, "weight_decay": 0.0})
        return found

    def check(self, model: nn.Module) -> None:
        """Raises InputError where the model is not as it was prepared, but for the values of its tensors."""
        if model is not self._module():
            raise InputError("the model is not the module that was prepared, but one around or inside of it: harden that one")
        present = set(map(id, model.modules()))
        for name, uses in self.places.items():
            if not all(id(m) in present and parametrize.is_parametrized(m, a) for m, a in uses):
                raise InputError(f"the model has been changed since it was prepared: weight {name!r} is no longer where it was")
        soft = set(self.soft) | {name for name, of in self.template.aliases().items() if of in self.soft}
        known = set(modules.names_of(self.template.plan)) - soft
        found = set(self.plain_state()) - soft
        if known != found:
            names = ", ".join(sorted(known ^ found)[:3])
            raise InputError(f"the model has been changed since it was prepared: it differs in {names}")

    def _module(self) -> nn.Module:
        return self.model[0]

    def _file(self, weights: Mapping[str, CodedTensor]) -> bytes:
        state = one_bias(self._module(), self.template.plan, self.plain_state())
        return self.template.file(weights, state, {"training": self.method})

    def plain_state(self) -> dict[str, Tensor]:
        """The state dict under the names it had before, without the soft weights."""
        state = {k: v for k, v in self._module().state_dict().items() if ".parametrizations." not in f".{k}"}
        aliases = self.template.aliases()
        return state | {name: state[of] for name, of in aliases.items() if of in state}

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the module's and the optimizer's: numbers, and tensors by name."""
        numbers = {"step": self.step, "settled": self.settled, "memory": self.price.memory, "error": self.price.error}
        return {
            **numbers,
            "held": self.held,
            "bytes": self.bytes,
            "global_step": self.template.container.step,
            "lengths": self.lengths.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """The mirror of `state`; before the module's own state dict is loaded."""
        self.step, self.settled, self.bytes = int(state["step"]), False, int(state["bytes"])
        self.price.memory, self.price.error = float(state["memory"]), float(state["error"])
        self.lengths.load(state["lengths"])
        mantissa, exponent = map(int, state["global_step"])
        if (mantissa, exponent) != self.template.container.step:
            self.rescale((mantissa, exponent))
        self.held = 0.0
        self.hold(float(state["held"]))  # which ones; what their symbols are comes with the module
        if settled := bool(state["settled"]):
            for name, weight in self.soft.items():
                weight.settle(0.0, *self.originals(name))
        self.settled = settled


def originals(module: nn.Module, attribute: str) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a soft weight, by their names in the parametrization."""
    found = module.get_submodule(f"parametrizations.{attribute}")
    return [(key, p) for key, p in found.named_parameters(recurse=False) if key.startswith("original")]
