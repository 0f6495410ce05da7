"""Synthesis in exact integer arithmetic (FORMAT.md section 6). numpy only: the portable reader uses it.

Coefficients become integers up to 2²⁸, a basis holds integers up to 2¹⁵, at most 2¹⁰ of them are summed: no partial sum
exceeds 2⁵³, so a float64 matrix product is exact in whatever order a library adds.
"""

from __future__ import annotations

from functools import lru_cache
from math import frexp
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transquant.errors import CorruptFile
from transquant.records import CodedEntry, IntArray
from transquant.transforms.layout import Layout

COEFFICIENT_BITS = 28
DCT_BITS = 12


def synthesize(coeffs: NDArray[np.float32], basis: IntArray | None, entry: CodedEntry) -> NDArray[np.float32]:
    """The weight float32 (O, n) of dequantized coefficients (O, n); `basis` int32 (r, r), None for a DCT.

    Raises CorruptFile where a value does not fit float32."""
    layout = Layout.of(entry)
    if basis is None:
        basis = dct_basis(entry.shape[2:])
    _, exponent = frexp(float(np.abs(coeffs).max(initial=0.0)))
    scaled = np.rint(np.ldexp(layout.coded_bands(coeffs).astype(np.float64), COEFFICIENT_BITS - exponent))
    product = basis.astype(np.float64) @ scaled
    with np.errstate(over="ignore", under="ignore"):
        values: NDArray[np.float32] = np.ldexp(product, exponent - COEFFICIENT_BITS).astype(np.float32)
    if not np.isfinite(values).all():
        raise CorruptFile(f"a decoded value of tensor {entry.name!r} does not fit float32")
    return layout.weight(values)


@lru_cache(maxsize=32)
def dct_basis(kernel: tuple[int, ...]) -> IntArray:
    """Integer synthesis matrix int32 (K, K) of the orthonormal DCT-II over the dimensions of a kernel."""
    matrix: NDArray[Any] = np.ones((1, 1))
    for size in kernel:
        matrix = np.kron(matrix, dct_matrix(size))
    return np.rint(2.0**DCT_BITS * matrix).astype(np.int32)


def dct_matrix(size: int) -> NDArray[np.float64]:
    """Orthonormal DCT-II synthesis matrix M[j, b] = a_b cos(π (2j + 1) b / 2N), float64 (N, N)."""
    j, band = np.arange(size)[:, None], np.arange(size)[None, :]
    scale = np.where(band == 0, np.sqrt(1 / size), np.sqrt(2 / size))
    values: NDArray[np.float64] = np.asarray(scale * np.cos(np.pi * (2 * j + 1) * band / (2 * size)), np.float64)
    return values
