"""Rounding with the errors of what has been rounded fed forward, over channels and over pixels, compiled.

With second moments G of the gradient over channels and A over pixels an error e costs about tr(G e A eᵀ). G = U D Uᵀ (U unit
upper) turns e into e_k + Σ_{j<k} U[j, k] e_j, and the gradient's prediction a from a pixel's later neighbours turns that into
residuals r_i = e_i + Σ a r_{i − neighbour} whose cost is Σ d r²: error diffusion (Floyd and Steinberg 1976) with the weights that
the end-to-end metric asks for. A value is rounded so that its own residual is least. No basis is sent, and a decoder needs none
of this.
"""

from __future__ import annotations

import numba as nb
import numpy as np
from numpy.typing import NDArray

from transquant.features.records import FloatMap, IntMap

LIMIT = 2.0  # of a residual, in steps: where a map cannot go below zero, what is owed stays finite
LARGEST = 1 << 20  # of a symbol

Float64 = NDArray[np.float64]


@nb.njit(cache=True, nogil=True)
def round_map(values, steps, across, around, low, high, symbols):  # type: ignore[no-untyped-def]
    """float32 (K, H, W) → int32 `symbols` within [low, high]. `steps` float32 (K,); `across` float32 (K, K), rows of earlier
    channels' weights; `around` float32 (K, 4): weights of the residuals left, above, above left, above right."""
    channels, height, width = values.shape
    errors = np.zeros((channels, height * width), np.float32)
    carried = np.empty(height * width, np.float32)
    residual = np.zeros((2, width + 2), np.float32)
    limit = np.float32(LIMIT)
    for k in range(channels):
        inverse, step = np.float32(1) / steps[k], steps[k]
        carried[:] = 0
        for j in range(min(k, across.shape[1])):  # (K, 0) feeds none on
            weight = across[k, j]
            if weight != 0:
                for p in range(height * width):
                    carried[p] += weight * errors[j, p]
        left, above, above_left, above_right = around[k, 0], around[k, 1], around[k, 2], around[k, 3]
        residual[:] = 0
        for y in range(height):
            now, before = residual[y & 1], residual[1 - (y & 1)]
            for x in range(width):
                p = y * width + x
                owed = above * before[x + 1] + above_left * before[x] + above_right * before[x + 2]
                wanted = (values[k, y, x] + carried[p]) * inverse + owed + left * now[x]
                symbol = min(max(np.rint(wanted), low), high)
                symbols[k, y, x] = np.int32(symbol)
                now[x + 1] = min(max(wanted - symbol, -limit), limit)
                errors[k, p] = min(max(values[k, y, x] - symbol * step, -limit * step), limit * step)


def factor_channels(moment: Float64, damping: float) -> tuple[Float64, Float64]:
    """(d (C,), U strictly: row k has the weights of channels before it, (C, C)) of a damped moment G = U D Uᵀ."""
    diagonal = np.diag(moment)
    damped = moment + np.diag(damping * diagonal + 1e-3 * diagonal.mean() + 1e-30)
    lower = np.linalg.cholesky(damped[::-1, ::-1])
    upper = lower[::-1, ::-1]
    scale = np.diag(upper)
    return scale**2, np.tril((upper / scale).T, -1)


def predict_pixels(neighbours: Float64, damping: float) -> tuple[Float64, Float64]:
    """(share of the gradient's energy that later neighbours do not predict (C,), weights (C, 4)) from moments (C, 5, 5)."""
    energy = neighbours[:, 0, 0]
    extra = damping * energy + 1e-6 * energy.mean() + 1e-30
    damped = neighbours + extra[:, None, None] * np.eye(5)
    weights = np.linalg.solve(damped[:, 1:, 1:], damped[:, 1:, :1])[:, :, 0]
    share = 1 - np.einsum("ci,ci->c", weights, damped[:, 1:, 0]) / damped[:, 0, 0]
    return np.clip(share, 1e-3, 1.0), weights


@nb.njit(cache=True, nogil=True)
def whitened(errors, weights):  # type: ignore[no-untyped-def]
    """Residuals of errors float64 (K, H, W) over pixels, by the same weights (4,) in all channels."""
    channels, height, width = errors.shape
    result = np.zeros((channels, height + 1, width + 2))
    for k in range(channels):
        for y in range(height):
            for x in range(width):
                above = weights[1] * result[k, y, x + 1] + weights[2] * result[k, y, x] + weights[3] * result[k, y, x + 2]
                result[k, y + 1, x + 1] = errors[k, y, x] + weights[0] * result[k, y + 1, x] + above
    return result[:, 1:, 1:-1]


def rounded(values: FloatMap, steps: FloatMap, across: FloatMap, around: FloatMap, nonnegative: bool) -> IntMap:
    """float32 (K, H, W) → symbols int32 (K, H, W)."""
    symbols = np.empty(values.shape, np.int32)
    low = np.float32(0 if nonnegative else -LARGEST)
    round_map(np.ascontiguousarray(values, np.float32), steps, across, around, low, np.float32(LARGEST), symbols)
    return symbols
