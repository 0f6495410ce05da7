"""Settings and arrays of a coder's state, checked: a codec file may say anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from transquant.errors import CorruptFile
from transquant.features.checks import LEAST_STEP, MOST_STEP


def stored_array(arrays: Mapping[str, np.ndarray], name: str, dtype: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """An array of a coder's state; None stands for any length. Raises CorruptFile where it is missing or another."""
    array = arrays.get(name)
    if array is None:
        raise CorruptFile(f"a coder of feature maps lacks its array {name!r}")
    fits = array.ndim == len(shape) and all(b is None or a == b for a, b in zip(array.shape, shape, strict=True))
    if array.dtype != np.dtype(dtype) or not fits:
        raise CorruptFile(f"the array {name!r} of a coder of feature maps is a {array.dtype} of shape {array.shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise CorruptFile(f"the array {name!r} of a coder of feature maps has values that are not finite")
    return array


def stored_integer(settings: Mapping[str, Any], name: str, low: int, high: int) -> int:
    """An integer of a coder's state. Raises CorruptFile where it is missing or out of range."""
    value = settings.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise CorruptFile(f"the setting {name!r} of a coder of feature maps is {value!r:.40}, allowed are {low} to {high}")
    return value


def stored_number(settings: Mapping[str, Any], name: str) -> float:
    """A finite number of a coder's state. Raises CorruptFile."""
    value = settings.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise CorruptFile(f"the setting {name!r} of a coder of feature maps is {value!r:.40}, expected is a finite number")
    return float(value)


def stored_step(settings: Mapping[str, Any]) -> float:
    """The setting "step". Raises CorruptFile where it is missing or none that a fit can choose."""
    step = stored_number(settings, "step")
    if not LEAST_STEP <= step <= MOST_STEP:
        raise CorruptFile(f"the step of a coder of feature maps is {step}, allowed are {LEAST_STEP} to {MOST_STEP}")
    return step


def stored_choice(settings: Mapping[str, Any], name: str, allowed: tuple[Any, ...]) -> Any:
    """One of a few values of a coder's state. Raises CorruptFile."""
    value = settings.get(name)
    if value not in allowed:
        raise CorruptFile(f"the setting {name!r} of a coder of feature maps is {value!r:.40}, allowed are {allowed}")
    return allowed[allowed.index(value)]
