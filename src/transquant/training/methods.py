"""The methods by name: how the weights of a template become soft, and what each can be told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transquant.errors import InputError
from transquant.records import WeightSpec
from transquant.training.crq import HARD, STRENGTH, ClusteredWeight
from transquant.training.diffq import GROUPS, MOST, NOISES, NoisyWeight
from transquant.training.rows import RowsWeight
from transquant.training.soft import SoftWeight
from transquant.training.template import Template
from transquant.training.transform import TransformWeight
from transquant.training.uniform import KEPT_DEPTH, UniformWeight

STATES = 4, 8, 16, 32, 64  # of a trellis
ENDS = "first", "last"  # weights that networks are most sensitive to, and that are small

Soften = Callable[[Template, Mapping[str, WeightSpec], float, Mapping[str, Any]], dict[str, SoftWeight]]


@dataclass(frozen=True, slots=True)
class Method:
    """`soften(template, specs, bits, options)`: soft weights by name, of those in `specs`; `options`: names and defaults of what
    `prepare` takes for this method alone. `sized`: `bits` is 8 · bytes of the file / parameters, which the training meets; else
    it is a depth, and the file is as large as it gets. `by_rows`: the network is a `ProgressiveNetwork`, whose template may have a
    trellis, and no transform."""

    soften: Soften
    options: Mapping[str, Any] = field(default_factory=dict)
    sized: bool = True
    by_rows: bool = False


def _transform(
    template: Template, specs: Mapping[str, WeightSpec], bits: float, options: Mapping[str, Any]
) -> dict[str, SoftWeight]:
    if not isinstance(options["gradual"], bool):
        raise InputError(f"gradual is {options['gradual']!r}, allowed are True and False")
    return {name: TransformWeight(template.weights[name], template.container.step) for name in specs}


def _rows(template: Template, specs: Mapping[str, WeightSpec], bits: float, options: Mapping[str, Any]) -> dict[str, SoftWeight]:
    states = options["states"]
    if isinstance(states, bool) or states not in STATES:
        raise InputError(f"states is {states!r}, allowed are {', '.join(map(str, STATES))}")
    bits = STATES.index(states) + 2
    return {name: RowsWeight(template.weights[name], template.container.step, bits) for name in specs}


def _diffq(template: Template, specs: Mapping[str, WeightSpec], bits: float, options: Mapping[str, Any]) -> dict[str, SoftWeight]:
    group, noise, begin, rounded = (options[key] for key in ("group", "noise", "init_bits", "rounded"))
    if isinstance(group, bool) or not isinstance(group, int) or group not in GROUPS:
        raise InputError(f"group is {group!r}, allowed are {', '.join(map(str, GROUPS))}")
    if noise not in NOISES:
        raise InputError(f"noise is {noise!r}, allowed are {', '.join(map(repr, NOISES))}")
    if begin is not None and (isinstance(begin, bool) or not isinstance(begin, int | float) or not 0 < begin < MOST):
        raise InputError(f"init_bits is {begin!r}, allowed are None and numbers above 0 and below {MOST:g}")
    if isinstance(rounded, bool) or not isinstance(rounded, int | float) or not 0 <= rounded <= 1:
        raise InputError(f"rounded is {rounded!r}, allowed are shares of the training, 0 to 1")
    return {name: NoisyWeight(template.weights[name], template.container.step, group, noise, begin, rounded) for name in specs}


def _clustered(
    template: Template, specs: Mapping[str, WeightSpec], bits: float, options: Mapping[str, Any]
) -> dict[str, SoftWeight]:
    levels, strength, hard = options["levels"], options["strength"], options["hard"]
    if isinstance(levels, bool) or not isinstance(levels, int) or levels % 2 == 0 or not 3 <= levels <= 31:
        raise InputError(f"levels is {levels!r}, allowed are odd numbers from 3 to 31")
    if not isinstance(strength, int | float) or not 0 <= strength < float("inf"):
        raise InputError(f"strength is {strength!r}, allowed are finite numbers from 0")
    if isinstance(hard, bool) or not isinstance(hard, int | float) or not 0 <= hard <= 1:
        raise InputError(f"hard is {hard!r}, allowed are shares of the training from 0 to 1")
    kept, step = _kept(specs, options["keep"]), template.container.step
    return {
        name: UniformWeight(tensor, step) if name in kept else ClusteredWeight(tensor, step, levels, float(strength), float(hard))
        for name, tensor in ((name, template.weights[name]) for name in specs)
    }


def _uniform(learned: bool) -> Soften:
    def soften(
        template: Template, specs: Mapping[str, WeightSpec], bits: float, options: Mapping[str, Any]
    ) -> dict[str, SoftWeight]:
        kept, weights, step = _kept(specs, options["keep"]), template.weights, template.container.step
        return {n: UniformWeight(weights[n], step, KEPT_DEPTH if n in kept else int(bits), learned) for n in specs}

    return soften


def _kept(specs: Mapping[str, WeightSpec], keep: Any) -> set[str]:
    """Names of the weights that an option `keep` means."""
    names = list(specs)
    known = {"first": names[0], "last": names[-1]} | {name: name for name in names} if names else {}
    if isinstance(keep, str) or not isinstance(keep, Sequence) or any(not isinstance(k, str) or k not in known for k in keep):
        raise InputError(f"keep is {keep!r}, allowed is a list of 'first', 'last' and names of weights")
    return {known[k] for k in keep}


METHODS: dict[str, Method] = {
    "transform": Method(_transform, {"gradual": False}),
    "progressive": Method(_rows, {"states": 16}, by_rows=True),
    "diffq": Method(_diffq, {"group": 8, "noise": "uniform", "init_bits": None, "rounded": 0.5}),
    "crq": Method(_clustered, {"levels": 3, "strength": STRENGTH, "hard": HARD, "keep": ENDS}),
    "qat": Method(_uniform(learned=False), {"keep": ENDS}, sized=False),
    "lsq": Method(_uniform(learned=True), {"keep": ENDS}, sized=False),
}


def method_of(name: str, options: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
    """A method, and its options with defaults. Raises InputError."""
    if not isinstance(name, str) or name not in METHODS:
        raise InputError(f"method is {name!r}, allowed are {', '.join(map(repr, METHODS))}")
    method = METHODS[name]
    for key in options:
        if key not in method.options:
            allowed = ", ".join(method.options) or "none"
            raise InputError(f"method {name!r} has no option {key!r}, its options are: {allowed}")
    return method, {**method.options, **options}
