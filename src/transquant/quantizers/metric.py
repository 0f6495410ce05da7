"""The metric of a layer, regularised and factored for the feedback.

Plain feedback wastes bits and makes huge errors in directions that the water level covers. In the MMSE form the metric is
G ⊗ A + τ I, τ = θ / σ² (θ = c²/12 the water level, σ² the mean square of the weights). That is no Kronecker product; we
take (G + r·ḡ I) ⊗ (A + r·ā I) with the same trace, where ā, ḡ are the mean diagonal entries:

    2r + r² = τ / (ā ḡ)

and add fixed dampings α, γ (relative to ā, ḡ) for the sampling error, chosen on held-back calibration samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from transquant.records import FloatArray, LayerStats

MOST_NOISE = 1e4  # τ / (ā ḡ), far above the energy of the weights: from there on steps are free to grow, down to nothing
LEAST_SPREAD = 1e-6  # of the inputs around their mean, relative to their energy


@dataclass(frozen=True, slots=True)
class Damping:
    """Relative dampings: A + α ā I, G + γ ḡ I; `noise` scales τ."""

    alpha: float = 0.02
    gamma: float = 0.05
    noise: float = 1.0


@dataclass(frozen=True, slots=True)
class Factor:
    """T D Tᵀ of a regularised moment of side n: `unit` unit triangular, one (m, m) for each diagonal block, None for a
    moment that is diagonal; `diagonal` float64 (n,)."""

    unit: tuple[FloatArray, ...] | None
    diagonal: FloatArray


def noise_level(damping: Damping, water_level: float, variance: float, mean_in: float, mean_out: float) -> float:
    """r of the module's formula; 0 where a moment or the weights vanish."""
    scale = variance * mean_in * mean_out
    if scale <= 0 or damping.noise <= 0:
        return 0.0
    return float(np.sqrt(1 + min(damping.noise * water_level / scale, MOST_NOISE)) - 1)


def centred(stats: LayerStats) -> LayerStats:
    """Input moments about the mean: where a layer has a bias, it makes up for the mean of the error, (W − Ŵ)·E[x]."""
    if stats.input_mean is None:
        return stats
    mean, moment = stats.input_mean, stats.input_moment
    energy = mean_squares(moment)
    if np.any(energy - np.mean(mean**2, 1) <= LEAST_SPREAD * energy):  # one sample, or all alike: the mean is all there is
        return replace(stats, input_mean=None)
    if moment.ndim == 2:  # diagonals
        return replace(stats, input_moment=np.maximum(moment - mean**2, 0))
    if moment.ndim == 4:  # diagonal blocks
        mean = mean.reshape(moment.shape[:3])
    return replace(stats, input_moment=moment - mean[..., :, None] * mean[..., None, :])


def mean_squares(moment: FloatArray) -> FloatArray:
    """Mean diagonal entry of each group, float64 (g,)."""
    diagonal = moment if moment.ndim == 2 else np.einsum("...ii->...i", moment)
    means: FloatArray = diagonal.reshape(len(moment), -1).mean(1)
    return means


def mean_diagonal(moment: FloatArray) -> float:
    """Mean diagonal entry of a moment (n,), (n, n) or (b, m, m)."""
    return float(moment.mean() if moment.ndim == 1 else np.einsum("...ii->...i", moment).mean())


def diagonal(moment: FloatArray) -> FloatArray:
    """Diagonal float64 (n,) of a moment (n,), (n, n) or (b, m, m), bounded from below as factors are."""
    values = moment if moment.ndim == 1 else np.einsum("...ii->...i", moment).reshape(-1)
    bounded: FloatArray = np.maximum(values, values.mean() * 1e-12 + 1e-300)
    return bounded


def regularise(moment: FloatArray, amount: float) -> FloatArray:
    """moment + amount · (mean diagonal) · I; moment (n,), (n, n) or (b, m, m)."""
    extra = amount * mean_diagonal(moment)
    if moment.ndim == 1:
        return moment + extra
    raised = moment.copy()
    np.einsum("...ii->...i", raised)[...] += extra
    return raised


def factor(moment: FloatArray, upper: bool = False) -> Factor:
    """L D Lᵀ of a moment (n,), (n, n) or (b, m, m), or U D Uᵀ.

    A moment that is not positive definite in float64 gets more damping, a factor of ten at a time."""
    if moment.ndim == 1:
        return Factor(None, diagonal(moment))
    if not mean_diagonal(moment) > 0:  # says nothing
        return Factor(None, np.ones(moment.shape[0] if moment.ndim == 2 else moment.shape[0] * moment.shape[1]))
    extra = 0.0
    while True:
        damped = torch.from_numpy(regularise(moment, extra) if extra else moment).reshape(-1, *moment.shape[-2:])
        lower, failed = torch.linalg.cholesky_ex(damped.flip(1, 2) if upper else damped)
        roots = torch.diagonal(lower, dim1=1, dim2=2)
        if not bool(failed.any()) and bool((roots > 0).all()) and bool(torch.isfinite(roots).all()):
            unit = lower / roots[:, None, :]
            if upper:
                unit, roots = unit.flip(1, 2), roots.flip(1)
            return Factor(tuple(np.ascontiguousarray(u) for u in unit.numpy()), (roots**2).reshape(-1).numpy())
        extra = max(10 * extra, 1e-8)


def quadratic_form(error: FloatArray, input_moment: FloatArray, output_moment: FloatArray) -> float:
    """tr(G E A Eᵀ); error (o, n), A (n,), (n, n) or (b, m, m), G (o,) or (o, o)."""
    e, a, g = (torch.from_numpy(np.ascontiguousarray(x)) for x in (error, input_moment, output_moment))
    if a.ndim == 3:
        right = (e.reshape(len(e), len(a), -1).transpose(0, 1) @ a).transpose(0, 1).reshape(e.shape)
    else:
        right = e * a if a.ndim == 1 else e @ a
    left = e * g[:, None] if g.ndim == 1 else g @ e
    return float(left.mul_(right).sum())  # in place: matrices are large
