"""Step sizes from the diagonals of the factored metric.

At high rate every coefficient of sensitivity h takes the step Δ = c/√h with the same c everywhere (design: allocation), so
its share of the distortion is c²/12. A file cannot afford a step an entry: a tensor has one quarter-octave index, and
optionally half-octave exponents a row and a column group. `spread` moves the rows' exponents only part of the way to
1/√h: at low rate the water level covers weak rows, and their steps should differ less than high-rate theory says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from transquant.grid import MAX_EXPONENT, MAX_QP, nearest_qp
from transquant.records import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class Grouping:
    """Which exponents a matrix sends, and how far they follow the sensitivities (0 not at all, 1 all the way)."""

    groups: Literal["", "r", "c", "rc"] = "rc"
    spread: float = 0.5


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Steps of one tensor relative to the global step: index `qp` and exponents, int32 (O,) and (n / taps,) or None."""

    qp: int
    row_exponents: IntArray | None
    column_exponents: IntArray | None


def matrix_steps(
    output_diagonal: FloatArray, input_diagonal: FloatArray, taps: int, grouping: Grouping, dead: NDArray[np.bool_] | None = None
) -> StepPlan:  # fmt: skip
    """Steps of a weight matrix from D_g, float64 (g, o), and D_a, float64 (g, n). `dead`, (n,): columns that are not
    used, which say nothing about the others' steps."""
    log_in = np.log2(input_diagonal)
    if dead is not None and dead.any() and not dead.all():
        log_in = np.where(dead, log_in[:, ~dead].mean(1, keepdims=True), log_in)
    rows = (np.log2(output_diagonal) + log_in.mean(1, keepdims=True)).reshape(-1)
    mean = float(rows.mean())
    columns = (log_in - log_in.mean(1, keepdims=True)).mean(0).reshape(-1, taps).mean(1)
    return StepPlan(
        nearest_qp(2 ** (-mean / 2)),
        _exponents(rows - mean, grouping.spread) if "r" in grouping.groups else None,
        _exponents(columns, grouping.spread) if "c" in grouping.groups else None,
    )


def silenced(plan: StepPlan, dead: NDArray[np.bool_]) -> StepPlan:
    """In a trellis symbol 0 has a value: in column groups that are not used it becomes as small as can be, and the cheapest path
    is as good as any there."""
    if not dead.any() or dead.all():
        return plan
    exponents = np.zeros(len(dead), np.int32) if plan.column_exponents is None else plan.column_exponents
    return replace(plan, column_exponents=np.where(dead, -MAX_EXPONENT, exponents).astype(np.int32))


def row_plan(log_steps: FloatArray) -> StepPlan:
    """Steps of rows that are known, to the nearest half octaves: log2 of them relative to the global step, float64 (O,); infinite
    where every symbol is to be 0."""
    finite = np.isfinite(log_steps)
    qp = int(np.clip(np.rint(4 * log_steps[finite].mean()), -MAX_QP, MAX_QP)) if finite.any() else 0
    exponents = np.where(finite, np.rint((4 * np.where(finite, log_steps, 0.0) - qp) / 2), MAX_EXPONENT)
    clipped = np.clip(exponents, -MAX_EXPONENT, MAX_EXPONENT).astype(np.int32)
    return StepPlan(qp, clipped if clipped.any() else None, None)


def _exponents(log_sensitivity: FloatArray, spread: float) -> IntArray | None:
    """Half octaves of step from log2 h around its mean; None where all are zero."""
    exponents = np.clip(np.rint(-spread * log_sensitivity), -MAX_EXPONENT, MAX_EXPONENT).astype(np.int32)
    return exponents if exponents.any() else None


def vector_qp(sensitivity: FloatArray) -> int:
    """Step index of a vector with one step: from the mean of its sensitivities, float64 of any shape."""
    return nearest_qp(1 / float(np.sqrt(np.mean(sensitivity))))


def first_guess(target_bits: float, variances: FloatArray, sensitivities: FloatArray, counts: FloatArray) -> float:
    """The scalar c at which Σ counts · ½ log2(1 + 17 σ² h / c²) meets `target_bits`: where the search starts.

    17 ≈ 2πe puts the high-rate entropy of a uniform quantizer on the curve; arrays float64 (tensors,)."""
    low, high = -120.0, 60.0
    for _ in range(60):
        middle = (low + high) / 2
        rate = 0.5 * np.log2(1 + 17 * variances * sensitivities / 4.0**middle) * counts
        if rate.sum() > target_bits:
            low = middle
        else:
            high = middle
    return float(2.0 ** ((low + high) / 2))
