"""Linear algebra on float64 arrays that gives the same bits whatever the number of threads.

numpy's BLAS shares a product or a decomposition between as many threads as the environment says, and the last bits follow
that number. torch's runs on the threads that `workers` allows: one.
"""

from __future__ import annotations

import numpy as np
import torch

from transquant.records import FloatArray


def product(first: FloatArray, second: FloatArray) -> FloatArray:
    """Matrix product, float64 (p, q) of (p, m) and (m, q)."""
    return _array(_tensor(first) @ _tensor(second))


def congruence(basis: FloatArray, moment: FloatArray) -> FloatArray:
    """Bᵀ M B, float64 (r, r) of B (n, r) and M (n, n)."""
    b = _tensor(basis)
    return _array(b.T @ _tensor(moment) @ b)


def inverse(matrix: FloatArray) -> FloatArray:
    """Inverse float64 (r, r)."""
    return _array(torch.linalg.inv(_tensor(matrix)))


def eigenvectors(moment: FloatArray) -> FloatArray:
    """Eigenvectors float64 (r, r) of a symmetric matrix, in columns, in order of falling eigenvalues."""
    return _array(torch.linalg.eigh(_tensor(moment))[1].flip(1))


def eigenvalues(moment: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Eigenvalues float64 (r,) of a symmetric matrix, falling, and its eigenvectors (r, r) in columns."""
    values, vectors = torch.linalg.eigh(_tensor(moment))
    return _array(values.flip(0)), _array(vectors.flip(1))


def lower_factor(moment: FloatArray) -> FloatArray:
    """L (r, r) with L Lᵀ = M, positive definite."""
    return _array(torch.linalg.cholesky(_tensor(moment)))


def solve(matrix: FloatArray, right: FloatArray) -> FloatArray:
    """X (r, m) with M X = R."""
    return _array(torch.linalg.solve(_tensor(matrix), _tensor(right)))


def condition(matrix: FloatArray) -> float:
    """Largest over smallest singular value; inf for a singular matrix."""
    values = torch.linalg.svdvals(_tensor(matrix))
    return float(values[0] / values[-1]) if float(values[-1]) > 0 else float("inf")


def _tensor(array: FloatArray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float64))


def _array(tensor: torch.Tensor) -> FloatArray:
    return np.ascontiguousarray(tensor.numpy())
