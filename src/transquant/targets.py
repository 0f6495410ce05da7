"""What a caller may ask for: exactly one target."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import floor, isfinite
from numbers import Real
from typing import Any, Literal

from transquant.errors import InputError, TargetError
from transquant.records import Plan

_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1024, "mib": 1024**2, "gib": 1024**3}
NAMES = ("bits", "size", "ratio", "distortion", "step", "max_drop")


@dataclass(frozen=True, slots=True)
class Target:
    """`kind` "bytes" (`value`: largest file), "distortion", "step", or "drop" (`value`: points, with `evaluate`)."""

    kind: Literal["bytes", "distortion", "step", "drop"]
    value: float
    evaluate: Callable[[Any], float] | None = None

    @property
    def slack(self) -> float:
        """Bytes that a file may stay below its size: 1 %, or 64 for tiny ones."""
        return max(0.01 * self.value, 64.0)


def parse_target(plan: Plan, given: dict[str, Any]) -> Target:
    """The one target among bits, size, ratio, distortion, step, max_drop (others None).

    Raises InputError unless exactly one is given and makes sense, TargetError for a size above the tensors' own."""
    chosen = {k: v for k, v in given.items() if v is not None}
    if len(chosen) != 1:
        found = " and ".join(chosen) or "none"
        raise InputError(f"give exactly one target of {', '.join(NAMES)}; given: {found}")
    ((name, value),) = chosen.items()
    if name == "max_drop":
        if not (isinstance(value, tuple | list) and len(value) == 2 and callable(value[0])):
            raise InputError("max_drop is a pair (evaluate, points), with evaluate(model) -> float, higher is better")
        return Target("drop", _positive(value[1], "the points of max_drop", zero=True), value[0])
    if name == "distortion":
        return Target("distortion", _positive(value, name))
    if name == "step":
        return Target("step", _positive(value, name))
    if name == "size":
        size = float(parse_size(value))
    elif name == "bits":
        size = _positive(value, "bits") * plan.num_parameters / 8
    else:
        size = plan.original_bytes / _positive(value, "ratio")
    size = floor(size + 1e-6)
    if size >= plan.original_bytes:
        raise TargetError(f"{name}={value} allows {size} bytes, but the tensors take only {plan.original_bytes} bytes as they are")
    return Target("bytes", size)


def parse_size(value: Any, what: str = "size") -> int:
    """Bytes from an integer or a text such as "64KB" (64,000) or "64KiB" (65,536). Raises InputError."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", value)
        if not match or match[2].lower() not in _UNITS:
            raise InputError(f"{what} is {value!r}, allowed are bytes or texts such as '64KB', '64KiB', '1.5MB'")
        value = int(float(match[1]) * _UNITS[match[2].lower()])
    return int(_positive(value, what))


def _positive(value: Any, what: str, zero: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value) or value < 0 or (value == 0 and not zero):
        raise InputError(f"{what} is {value!r}, allowed are {'numbers from 0 on' if zero else 'positive numbers'}")
    return float(value)
