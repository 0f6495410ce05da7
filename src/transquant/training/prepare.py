"""A module's weights become soft, and hard again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import log
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from transquant import codec, modules
from transquant.errors import InputError
from transquant.records import WeightSpec
from transquant.targets import parse_target
from transquant.training.network import Schedule, SoftNetwork
from transquant.training.price import Price
from transquant.training.soft import SoftWeight
from transquant.training.template import Template
from transquant.training.transform import TransformWeight
from transquant.weights import lagrangian

FINER = 1.0


def prepare(
    model: nn.Module, calibration: Iterable[Any] | None = None, *, method: str = "transform", bits: float, steps: int = 0,
    finer: float = FINER, begin: float = 1.0, **options: Any,
) -> SoftNetwork:  # fmt: skip
    plan = modules.plan_model(model)
    start = codec.compress(model, calibration, bits=bits * finer, trellis=False, **options)
    template = Template.of(plan, start.data)
    specs = {s.name: s for s in plan.specs if isinstance(s, WeightSpec)}
    soft = {n: TransformWeight(t, template.container.step) for n, t in template.weights.items() if n in specs}
    owners = dict(model.named_modules())
    places = {n: (owners[specs[n].module], specs[n].attribute) for n in soft}
    for name, weight in soft.items():
        parametrize.register_parametrization(*places[name], weight)
    target = bits * plan.num_parameters / 8
    price = Price(lagrangian(start.report.settings["c"]))
    return SoftNetwork(model, template, soft, places, target, price, Schedule(steps, begin), method)
