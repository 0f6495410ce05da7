"""The methods by name: how the weights of a template become soft, and what each can be told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transquant.errors import InputError
from transquant.records import WeightSpec
from transquant.training.diffq import GROUPS, MOST, NOISES, NoisyWeight
from transquant.training.soft import SoftWeight
from transquant.training.template import Template
from transquant.training.transform import TransformWeight

Soften = Callable[[Template, Mapping[str, WeightSpec], float, Mapping[str, Any]], dict[str, SoftWeight]]


@dataclass(frozen=True, slots=True)
class Method:
    """`soften(template, specs, bits, options)`: soft weights by name, of those in `specs`; `options`: names and defaults of what
    `prepare` takes for this method alone. `sized`: `bits` is 8 · bytes of the file / parameters, which the training meets; else
    it is a depth, and the file is as large as it gets."""

    soften: Soften
    options: Mapping[str, Any] = field(default_factory=dict)
    sized: bool = True


def _transform(
    template: Template, specs: Mapping[str, WeightSpec], bits: float, options: Mapping[str, Any]
) -> dict[str, SoftWeight]:
    return {name: TransformWeight(template.weights[name], template.container.step) for name in specs}


def _diffq(template: Template, specs: Mapping[str, WeightSpec], bits: float, options: Mapping[str, Any]) -> dict[str, SoftWeight]:
    group, noise, begin, rounded = (options[key] for key in ("group", "noise", "init_bits", "rounded"))
    if isinstance(group, bool) or group not in GROUPS:
        raise InputError(f"group is {group!r}, allowed are {', '.join(map(str, GROUPS))}")
    if noise not in NOISES:
        raise InputError(f"noise is {noise!r}, allowed are {', '.join(map(repr, NOISES))}")
    if begin is not None and (isinstance(begin, bool) or not isinstance(begin, int | float) or not 0 < begin < MOST):
        raise InputError(f"init_bits is {begin!r}, allowed are None and numbers above 0 and below {MOST:g}")
    if isinstance(rounded, bool) or not isinstance(rounded, int | float) or not 0 <= rounded <= 1:
        raise InputError(f"rounded is {rounded!r}, allowed are shares of the training, 0 to 1")
    return {name: NoisyWeight(template.weights[name], template.container.step, group, noise, begin, rounded) for name in specs}


METHODS: dict[str, Method] = {
    "transform": Method(_transform),
    "diffq": Method(_diffq, {"group": 8, "noise": "uniform", "init_bits": None, "rounded": 0.5}),
}


def method_of(name: str, options: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
    """A method, and its options with defaults. Raises InputError."""
    if name not in METHODS:
        raise InputError(f"method is {name!r}, allowed are {', '.join(map(repr, METHODS))}")
    method = METHODS[name]
    for key in options:
        if key not in method.options:
            allowed = ", ".join(method.options) or "none"
            raise InputError(f"method {name!r} has no option {key!r}, its options are: {allowed}")
    return method, {**method.options, **options}
