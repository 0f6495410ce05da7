"""User rules on top of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from transquant.errors import InputError
from transquant.records import Plan, RawSpec, VectorSpec, WeightSpec


def apply_overrides(plan: Plan, overrides: Mapping[str, Any] | None) -> Plan:
    """The plan with rules {glob pattern on state-dict keys: "exact"} applied: matching tensors are stored exactly.

    Raises InputError for a rule that is unknown, a pattern that matches nothing, and a plan with nothing left to code."""
    specs = list(plan.specs)
    for pattern, rule in (overrides or {}).items():
        if rule != "exact":
            raise InputError(f"the override of {pattern!r} is {rule!r}, allowed is 'exact'")
        hits = [k for k, s in enumerate(specs) if isinstance(s, WeightSpec | VectorSpec) and fnmatchcase(s.name, pattern)]
        if not hits:
            raise InputError(f"the override pattern {pattern!r} matches no coded tensor; names look like {plan.specs[0].name!r}")
        for k in hits:
            spec = specs[k]
            assert isinstance(spec, WeightSpec | VectorSpec)
            specs[k] = RawSpec(spec.name, spec.shape, spec.dtype, "override")
    if not any(isinstance(s, WeightSpec) for s in specs):
        raise InputError("the overrides leave no weight to code")
    return replace(plan, specs=tuple(specs))
