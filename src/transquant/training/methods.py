"""The methods by name: how the weights of a template become soft, and what each can be told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transquant.errors import InputError
from transquant.records import WeightSpec
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


METHODS: dict[str, Method] = {
    "transform": Method(_transform),
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
