"""Second moments by cross-validation: eigenvectors of most samples, energies that the others have along them.

A sample moment makes its large eigenvalues too large and its small ones too small, and feedback pushes errors exactly where
the small ones are. What *other* samples have along an eigenvector is an unbiased figure for it: with the samples in K folds,
S_k of one and V_k the eigenvectors of all but that, the moment is the mean of V_k diag(V_kᵀ S_k V_k) V_kᵀ. (Abadir, Distaso &
Žikeš, J. Econometrics 181(2), 2014; Lam, Annals of Statistics 44(3), 2016, shows that one split is optimal nonlinear
shrinkage in the limit.) The trace is the sample moment's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_SIDE = 4608  # above it eigenvectors take minutes: sample moments stay as they are


def mean_moment(sums: Sequence[Tensor], counts: Sequence[Tensor]) -> Tensor:
    """Sample moment: sums float64 (g, ...) over counts (g,)."""
    total, count = sum(sums[1:], start=sums[0]), sum(counts[1:], start=counts[0])
    return total / _like(count.clamp(min=1), total)


def cross_validated(sums: Sequence[Tensor], counts: Sequence[Tensor]) -> Tensor:
    """Moment of the folds' sums, float64 (g, n, n) or (g, b, m, m), over their counts (g,); the sample moment of what is
    diagonal, too large, or not in every fold."""
    if len(sums) < 2 or sums[0].ndim < 3 or sums[0].shape[-1] > MAX_SIDE or bool((torch.stack(list(counts)) <= 0).any()):
        return mean_moment(sums, counts)
    total = sum(sums[1:], start=sums[0])
    result = torch.zeros_like(total)
    for fold in sums:
        vectors = torch.linalg.eigh(total - fold)[1]
        energies = (fold @ vectors).mul_(vectors).sum(-2).clamp(min=0)
        result += (vectors * energies[..., None, :]) @ vectors.transpose(-1, -2)
    return result.div_(_like(sum(counts[1:], start=counts[0]), total))


def centre(sums: Tensor, totals: Tensor, count: Tensor, mean: Tensor) -> None:
    """Makes Σ (x − m)(x − m)ᵀ of `sums` Σ x xᵀ (g, n, n) or (g, b, m, m), in place; Σ x (g, n), their count (g,) and m (g, n)."""
    shape = sums.shape[:-1]
    total, about = totals.reshape(shape), mean.reshape(shape)
    cross = total[..., :, None] * about[..., None, :]
    sums.sub_(cross).sub_(cross.transpose(-1, -2)).add_(outer(about).mul_(_like(count, sums)))


def outer(vector: Tensor) -> Tensor:
    """v vᵀ over the last dimension."""
    return vector[..., :, None] * vector[..., None, :]


def _like(values: Tensor, moment: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (moment.ndim - 1))
