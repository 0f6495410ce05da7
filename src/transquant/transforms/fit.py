"""Bases from second moments: KLT and ELT (Young et al., arXiv 2009.01174, sections 3 and 4).

X (r, m) are a weight's bands, H = X Xᵀ, and G (r, r) what an error of a band costs: D = tr(Eᵀ G E) for an error E of X.

KLT: eigenvectors of H, orthonormal; coefficients are uncorrelated.
ELT: S = L⁻ᵀ V with G = L Lᵀ and Lᵀ H L = V Λ Vᵀ, columns scaled to unit norm. Then S⁻¹ H S⁻ᵀ and Sᵀ G S are both diagonal:
coefficients are uncorrelated and their errors do not interact. By Hadamard Π σ²_b γ_b ≥ det H · det G for any invertible S,
with equality here. (The paper sums G over single weights' gradients; ours comes from the layer's moments.)

Both in order of falling energy; signs such that the largest entry of a column is positive.
"""

from __future__ import annotations

import numpy as np

from transquant.records import FloatArray
from transquant.transforms.algebra import congruence, eigenvalues, eigenvectors, inverse, lower_factor, product, solve

ELT_DAMPING = 1e-3  # of the mean diagonal entry of G


def klt(energy: FloatArray) -> FloatArray:
    """Synthesis matrix float64 (r, r) of H (r, r)."""
    return _with_signs(eigenvectors(energy))


def elt(energy: FloatArray, cost: FloatArray) -> FloatArray:
    """Synthesis matrix float64 (r, r) of H and G (r, r), both symmetric, G regularised by `ELT_DAMPING`."""
    mean = float(np.trace(cost)) / len(cost)
    if not mean > 0:
        return klt(energy)
    lower = lower_factor(cost / mean + ELT_DAMPING * np.eye(len(cost)))
    synthesis = solve(lower.T, eigenvectors(congruence(lower, energy)))
    synthesis = synthesis / np.linalg.norm(synthesis, axis=0)
    variances = _diagonals(inverse(synthesis), energy)
    return _with_signs(synthesis[:, np.argsort(-variances, kind="stable")])


def low_rank(bands: FloatArray, cost: FloatArray, others: FloatArray | None = None) -> tuple[FloatArray, FloatArray]:
    """The bases of least error at every rank, one in the other: (B, S), float64 (r, k) with unit-norm columns and (k,), for bands
    X (r, m), the cost G (r, r) of an error of a band and M (m, m) of the errors of one: of all matrices of rank K the nearest to X,
    tr(G E M Eᵀ), is in the span of B's first K columns, and errs by the sum of S² from K on (Eckart and Young for G^½ X M^½).
    `others` None stands for the identity. Both are regularised by `ELT_DAMPING`."""
    left = lower_factor(cost / np.trace(cost) * len(cost) + ELT_DAMPING * np.eye(len(cost))) * (np.trace(cost) / len(cost)) ** 0.5
    scaled = product(left.T, bands)
    if others is not None:
        mean = np.trace(others) / len(others)
        scaled = product(scaled, lower_factor(others / mean + ELT_DAMPING * np.eye(len(others)))) * mean**0.5
    values, vectors = eigenvalues(product(scaled, scaled.T))
    rank = min(scaled.shape)
    basis = solve(left.T, vectors)[:, :rank]
    return _with_signs(basis / np.linalg.norm(basis, axis=0)), np.sqrt(np.maximum(values[:rank], 0))


def coding_gain_bits(energy: FloatArray, cost: FloatArray, synthesis: FloatArray) -> float:
    """Bits a coefficient that a basis saves at high rate over no transform:
    ½ mean log2 of (H_bb G_bb) / (σ²_b γ_b)."""
    variances = _diagonals(inverse(synthesis), energy)
    costs = _diagonals(synthesis.T, cost)
    before = np.log2(np.diagonal(energy) * np.diagonal(cost))
    return float(0.5 * np.mean(before - np.log2(variances * costs)))


def _diagonals(rows: FloatArray, moment: FloatArray) -> FloatArray:
    """Diagonal of R M Rᵀ, float64 (r,)."""
    diagonal: FloatArray = (product(rows, moment) * rows).sum(1)
    return diagonal


def _with_signs(basis: FloatArray) -> FloatArray:
    largest = np.take_along_axis(basis, np.abs(basis).argmax(0)[None], 0)
    return np.ascontiguousarray(basis * np.where(largest < 0, -1.0, 1.0))
