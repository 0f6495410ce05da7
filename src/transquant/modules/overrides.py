"""User rules on top of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from transquant.errors import InputError
from transquant.records import BatchNormSpec, Plan, RawSpec, Spec, VectorSpec, WeightSpec

BATCHNORM = ("weight", "bias", "running_mean", "running_var")


def apply_overrides(plan: Plan, overrides: Mapping[str, Any] | None) -> Plan:
    """The plan with rules {glob pattern on state-dict keys: "exact"} applied: matching tensors are stored exactly.

    Raises InputError for a rule that is unknown, a pattern that matches nothing, and a plan with nothing left to code."""
    specs = list(plan.specs)
    for pattern, rule in (overrides or {}).items():
        if rule != "exact":
            raise InputError(f"the override of {pattern!r} is {rule!r}, allowed is 'exact'")
        hits = [k for k, s in enumerate(specs) if _matches(s, pattern)]
        if not hits:
            raise InputError(f"the override pattern {pattern!r} matches no coded tensor; names look like {plan.specs[0].name!r}")
        for k in reversed(hits):
            specs[k : k + 1] = _exact(specs[k])
    if not any(isinstance(s, WeightSpec) for s in specs):
        raise InputError("the overrides leave no weight to code")
    return replace(plan, specs=tuple(specs))


def _matches(spec: Spec, pattern: str) -> bool:
    """Whether a pattern hits a coded tensor, or any tensor of a BatchNorm."""
    if isinstance(spec, BatchNormSpec):
        return any(fnmatchcase(spec.key(k), pattern) for k in BATCHNORM)
    return isinstance(spec, WeightSpec | VectorSpec) and fnmatchcase(spec.name, pattern)


def _exact(spec: Spec) -> list[RawSpec]:
    if isinstance(spec, BatchNormSpec):
        count = [] if spec.batches_tracked is None else [RawSpec(spec.key("num_batches_tracked"), (), "int64", "override")]
        return [RawSpec(spec.key(k), (spec.channels,), spec.dtype, "override") for k in BATCHNORM] + count
    assert isinstance(spec, WeightSpec | VectorSpec)
    return [RawSpec(spec.name, spec.shape, spec.dtype, "override")]
