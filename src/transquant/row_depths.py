"""Depths that a caller gives to rows of weights, instead of the steps that the allocation would give them.

A row of b bits has the step R·2^(1−b), R its largest magnitude, times one factor for the whole file. So depths say how rows
compare, and the scalar c, which the factor is proportional to, is still free to meet a size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from transquant.errors import InputError
from transquant.quantizers.metric import diagonal
from transquant.records import MAX_DEPTH, FloatArray, LayerStats, Plan, WeightSpec


@dataclass(frozen=True, slots=True)
class RowSteps:
    """`steps`: by weight, float64 (O,), log2 of rows' steps at c = 1; infinite where every value is 0. `unit`: the c at which the
    factor is 1, so that rows have the very depths that were asked for."""

    steps: Mapping[str, FloatArray]
    unit: float


def parse_depths(plan: Plan, depths: Mapping[str, Any] | None) -> dict[str, FloatArray]:
    """Depths by weight, float64 (O,). Raises InputError for names, shapes and numbers that make no sense."""
    specs = {s.name: s for s in plan.specs if isinstance(s, WeightSpec)}
    return {name: _checked(name, rows, specs) for name, rows in (depths or {}).items()}


def row_steps(depths: Mapping[str, FloatArray], values: Mapping[str, FloatArray], layers: Mapping[str, LayerStats]) -> RowSteps:
    """Steps of the rows of all weights that `depths` names; `values` (O, n). At one c the weights' steps are as fine, on average,
    as the allocation would make them: what else depends on c (vectors, the regularisation) is in keeping with them."""
    steps, total, count = dict[str, FloatArray](), 0.0, 0
    for name, rows in depths.items():
        peaks = np.abs(values[name]).max(1)
        peaks = np.where(peaks > 0, peaks, peaks.max(initial=0.0) or 1.0)
        steps[name] = np.where(rows > 0, np.log2(peaks) + 1 - rows, np.inf)
        level = row_sensitivities(layers[name])
        used = (rows > 0) & (level > 0)
        total += values[name].shape[1] * float((steps[name] + 0.5 * np.log2(np.where(used, level, 1.0)))[used].sum())
        count += values[name].shape[1] * int(used.sum())
    mean = total / max(count, 1)
    return RowSteps({name: rows - mean for name, rows in steps.items()}, float(2.0**mean))


def row_sensitivities(stats: LayerStats) -> FloatArray:
    """What the square of an error costs in each row, mean over its columns: float64 (O,)."""
    pairs = zip(stats.input_moment, stats.output_moment, strict=True)
    return np.concatenate([diagonal(g) * float(diagonal(a).mean()) if a.any() and g.any() else np.zeros(len(g)) for a, g in pairs])


def _checked(name: str, rows: Any, specs: Mapping[str, WeightSpec]) -> FloatArray:
    if name not in specs:
        raise InputError(f"depths has {name!r}, allowed are names of coded weights such as {next(iter(specs))!r}")
    try:
        depths = np.broadcast_to(np.asarray(rows, np.float64), (specs[name].shape[0],))
    except (TypeError, ValueError):
        height = specs[name].shape[0]
        raise InputError(f"depths of {name!r} are no numbers of shape ({height},), allowed is one a row, or one for all") from None
    if not (np.isfinite(depths).all() and (depths >= 0).all() and (depths <= MAX_DEPTH).all()):
        raise InputError(f"depths of {name!r} reach from {depths.min()} to {depths.max()}, allowed are 0 to {MAX_DEPTH}")
    return depths
