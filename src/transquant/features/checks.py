"""What coders of feature maps ask of the values that they are given, and of a stored state, which may say anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from transquant.errors import CorruptFile, InputError
from transquant.features.records import FloatMap, Point

LARGEST = 1e30  # value of a map, so that sums over channels are float32 too
LEAST_STEP, MOST_STEP = 1e-30, 1e34  # of a quantizer, so that its inverse is


def finite(values: FloatMap, point_name: str) -> FloatMap:
    """The values, if there is no NaN, no infinity and none above ±1e30 among them. Raises InputError."""
    low, high = values.min(initial=0), values.max(initial=0)
    if not (low >= -LARGEST and high <= LARGEST):  # both are NaN where a value is
        what = "NaN" if np.isnan(low) else "infinite" if np.isinf(low) or np.isinf(high) else "too large"
        raise InputError(f"the feature map of {point_name!r} has {what} values, allowed are finite ones up to ±{LARGEST:g}")
    return values


def map_of(values: FloatMap, channels: int, point_name: str) -> FloatMap:
    """The values as contiguous float32 (C, H, W), finite. Raises InputError."""
    if values.ndim != 3 or len(values) != channels:
        given = " x ".join(map(str, values.shape))
        raise InputError(
            f"the feature map of {point_name!r} is of shape {given}, expected are {channels} channels x height x width"
        )
    return finite(np.ascontiguousarray(values, np.float32), point_name)


def samples_of(samples: FloatMap, point: Point, c: float) -> FloatMap:
    """Samples that a fit is given, float32 (N, C, H, W), and its scalar: at least one value, finite. Raises InputError."""
    if samples.ndim != 4 or samples.shape[1] != point.channels or not samples.size:
        given = " x ".join(map(str, samples.shape))
        raise InputError(
            f"the feature maps of {point.name!r} are of shape {given}, expected are samples x {point.channels} x height x width"
        )
    if not (math.isfinite(c) and c > 0):
        raise InputError(f"the scalar of feature maps is {c}, allowed are numbers above 0")
    return finite(np.ascontiguousarray(samples, np.float32), point.name)


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
