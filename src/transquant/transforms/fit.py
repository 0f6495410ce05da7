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
from transquant.transforms.algebra import congruence, eigenvectors, inverse, lower_factor, product, solve

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
