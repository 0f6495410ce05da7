"""What coders of feature maps ask of the values that they are given."""

from __future__ import annotations

import math

import numpy as np

from transquant.errors import InputError
from transquant.features.records import FloatMap, Point

LARGEST = 1e30  # value of a map, so that sums over channels are float32 too
LEAST_STEP, MOST_STEP = 1e-30, 1e32  # of a quantizer, so that its inverse is
MOST_C = 16.0  # above it nothing is left of any map


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
