"""Weights with which a symbol is predicted from its neighbours: least squares on calibration maps, in units of 1/256."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from transquant.features.contexts import AROUND, REFERENCES, TAPS, Predictor
from transquant.features.records import IntMap

UNIT = 256
PIXELS = 12_000  # that weights are learned from
OFFSETS = ((0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0))  # (dy, dx) of the neighbours in a plane
REFERENCE_OFFSETS = ((0, 0), (0, -1), (-1, 0))
RIDGE = 1e-4
Float64 = NDArray[np.float64]


def shifted(maps: NDArray[np.float32], dy: int, dx: int) -> NDArray[np.float32]:
    """What lies (dy, dx) from each pixel, dy at most 0; zeros outside."""
    result = np.zeros_like(maps)
    height, width = maps.shape[-2:]
    if -dy >= height or abs(dx) >= width:
        return result
    to, source = slice(max(-dx, 0), width - max(dx, 0)), slice(max(dx, 0), width - max(-dx, 0))
    result[..., -dy:, to] = maps[..., : height + dy, source]
    return result


def fit_predictor(symbols: IntMap, nonnegative: bool) -> Predictor:
    """A predictor for the planes of maps int32 (N, K, H, W)."""
    num, planes, height, width = symbols.shape
    bounded = np.clip(symbols, -255, 255).astype(np.float32)
    rng = np.random.default_rng(0)
    pixels = rng.choice(num * height * width, min(num * height * width, PIXELS), replace=False)

    def taken(maps: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.ascontiguousarray(maps.transpose(1, 0, 2, 3).reshape(planes, -1)[:, pixels])

    at = {offset: taken(shifted(bounded, *offset)) for offset in ((0, 0), *OFFSETS)}
    target = at[0, 0].astype(np.float64)
    near = np.stack([np.ones_like(target), *(at[o].astype(np.float64) for o in OFFSETS)], 1)  # (K, 7, P)
    alone = _solve(near, target)
    references = _references(target - np.einsum("kf,kfp->kp", alone, near), target)
    mean = np.zeros((planes, 1 + AROUND + REFERENCES * TAPS))
    for k in range(planes):
        rows = [near[k], *(at[o][r][None].astype(np.float64) for r in references[k] if r >= 0 for o in REFERENCE_OFFSETS)]
        features = np.concatenate(rows)
        weights = _solve(features[None], target[k][None])[0]
        mean[k, : len(weights)] = weights
    whole = _rests(bounded, mean, references, nonnegative)
    around = [taken(shifted(whole, *o)).astype(np.float64) for o in OFFSETS[:4]]
    own = taken(whole).astype(np.float64)
    scale = np.zeros((planes, 1 + 4 + REFERENCES))
    for k in range(planes):
        rows = [np.ones((1, len(pixels))), *(a[k][None] for a in around), *(own[r][None] for r in references[k] if r >= 0)]
        features = np.concatenate(rows)
        weights = np.maximum(_solve(features[None], own[k][None])[0], 0)
        weights *= own[k].mean() / max(float((weights @ features).mean()), 1e-9)
        scale[k, : len(weights)] = weights
    return Predictor(_integers(mean), _integers(scale), references.astype(np.int16), nonnegative)


def _rests(maps: NDArray[np.float32], mean: Float64, references: NDArray[np.int64], nonnegative: bool) -> NDArray[np.float32]:
    """|symbol − p| everywhere, float32 (N, K, H, W)."""
    result = np.empty_like(maps)
    for k in range(maps.shape[1]):
        mu = np.full(maps[:, k].shape, mean[k, 0], np.float32)
        for weight, offset in zip(mean[k, 1 : 1 + AROUND], OFFSETS, strict=True):
            mu += np.float32(weight) * shifted(maps[:, k], *offset)
        taps = [(r, o) for r in references[k] if r >= 0 for o in REFERENCE_OFFSETS]
        for weight, (reference, offset) in zip(mean[k, 1 + AROUND :], taps, strict=False):
            mu += np.float32(weight) * shifted(maps[:, reference], *offset)
        p = np.rint(np.maximum(mu, 0) if nonnegative else mu)
        result[:, k] = np.abs(maps[:, k] - p)
    return result


def _references(rest: Float64, target: Float64) -> NDArray[np.int64]:
    """For each plane the earlier ones that go best with what its neighbours leave open: int64 (K, 2), -1 for none."""
    planes = len(target)
    centred = target - target.mean(1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1) + 1e-9
    cross: Float64 = np.abs((rest - rest.mean(1, keepdims=True)) @ centred.T) / norms
    cross /= np.linalg.norm(rest, axis=1)[:, None] + 1e-9
    result = np.full((planes, REFERENCES), -1)
    for k in range(1, planes):
        best = np.argsort(-cross[k, :k], kind="stable")[:REFERENCES]
        best = best[cross[k, best] > 0.05]
        result[k, : len(best)] = best
    return result


def _solve(features: Float64, target: Float64) -> Float64:
    """Least squares for each of (K, F, P) features and (K, P) targets: (K, F)."""
    gram = features @ features.transpose(0, 2, 1)
    gram = gram + np.eye(gram.shape[1]) * (RIDGE * gram[:, :1, :1] + 1e-9)
    return np.asarray(np.linalg.solve(gram, features @ target[:, :, None])[:, :, 0], np.float64)


def _integers(weights: Float64) -> NDArray[np.int16]:
    return np.clip(np.rint(UNIT * weights), -32767, 32767).astype(np.int16)
