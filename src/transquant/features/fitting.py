"""Fitting the predictive coder to one point: both ways of coding it, and which of them costs less, D + λR on calibration samples.

Step sizes are c/√d, d what an error costs at the output once feedback has done its work (feedback.py), with the same c at every
point: one Lagrange multiplier for the network, λ = −dD/dR = 2 ln 2 · c²/12.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import log

import numpy as np
from numpy.typing import NDArray

from transquant.features.checks import samples_of
from transquant.features.contexts import count, learned
from transquant.features.feedback import factor_channels, predict_pixels, whitened
from transquant.features.prediction import fit_predictor
from transquant.features.predictive import PredictiveCoder, Rounding, Transform
from transquant.features.records import FloatMap, Point, Sensitivity

CHANNEL_DAMPING, PIXEL_DAMPING = 0.1, 0.1  # of the gradient's moments, relative to their diagonal
TRANSFORM_DAMPING = (0.3, 1.0)  # of the same for the transform: relative to the diagonal, and to its mean
MOST_CHANNELS = 512  # above so many no error is fed to another channel
LEAST_COMPONENT = 0.35  # standard deviation, in steps, below which a component is left out
FLOOR = 0.003  # of the mean sensitivity: no channel's counts for less
SLOPE = 2 * log(2) / 12


@dataclass(frozen=True, slots=True)
class Fitted:
    """A coder with tables of its own, and what they were learned from: int64 (CLASSES · BINS, TOKENS + 1)."""

    coder: PredictiveCoder
    seen: NDArray[np.int64]


def fit_predictive(samples: FloatMap, point: Point, sensitivity: Sensitivity, c: float) -> Fitted:
    """The better coder for what goes into the activation of some samples, float32 (N, C, H, W) (its result, where it does not only
    clip), at scalar c. Raises InputError."""
    samples = samples_of(samples, point, c)
    wanted = point.activated(samples) if point.clips else samples
    best, least = None, np.inf
    for rounding, transform in _ways(point, sensitivity, c):
        values = wanted if transform is None else map(transform.analyze, samples)
        symbols = np.stack([rounding.quantize(v) for v in values])
        predictor = fit_predictor(symbols, rounding.nonnegative)
        seen = np.sum([count(s, predictor) for s in symbols], 0)
        coder = PredictiveCoder(point.name, point.channels, rounding, transform, predictor, learned(seen))
        rate = coder.tables.content(seen) / len(samples)
        cost = _distortion(coder, symbols, wanted, point, sensitivity) + SLOPE * c * c * rate
        if cost < least:
            best, least = Fitted(coder, seen), cost
    assert best is not None
    return best


def with_shared_tables(fitted: list[Fitted]) -> list[PredictiveCoder]:
    """Coders with the same tables at all points, apart for maps of any sign: a small codec file for a per cent of the bytes."""
    coders = [f.coder for f in fitted]
    for sign in (True, False):
        own = [k for k, f in enumerate(fitted) if f.coder.rounding.nonnegative == sign]
        if own:
            tables = learned(np.sum([fitted[k].seen for k in own], 0))
            for k in own:
                coders[k] = replace(coders[k], tables=tables)
    return coders


def _ways(point: Point, sensitivity: Sensitivity, c: float) -> Iterator[tuple[Rounding, Transform | None]]:
    share, around = predict_pixels(sensitivity.neighbours, PIXEL_DAMPING)
    moment, planes = sensitivity.channels, point.channels
    if planes <= MOST_CHANNELS:
        energy, across = factor_channels(moment, CHANNEL_DAMPING)
    else:
        energy, across = np.diag(moment), np.zeros((planes, 0))
    cost = energy * share
    cost = np.maximum(cost, FLOOR * cost.mean() + 1e-30)
    yield _rounding(c / np.sqrt(cost), across, around, point.clips), None
    if not point.clips or planes > MOST_CHANNELS:
        return
    diagonal = np.diag(moment)
    own, mean = TRANSFORM_DAMPING
    damped = moment + np.diag(own * diagonal + mean * diagonal.mean() + 1e-30)
    lower = np.linalg.cholesky(damped)
    values, vectors = np.linalg.eigh(lower.T @ sensitivity.covariance @ lower)
    step = c / np.sqrt(share.mean())
    kept = np.flatnonzero(np.sqrt(np.maximum(values, 0)) > LEAST_COMPONENT * step)[::-1]
    if not len(kept):
        kept = np.array([planes - 1])
    analysis = vectors[:, kept].T @ lower.T
    synthesis = np.linalg.solve(lower.T, vectors[:, kept])
    largest = np.abs(synthesis).max(0)  # float16 has no room for small ones beside it
    analysis, synthesis = analysis * largest[:, None], synthesis / largest
    short = [np.ascontiguousarray(m).astype(np.float16).astype(np.float32) for m in (analysis, synthesis)]
    transform = Transform(short[0], short[1], sensitivity.mean.astype(np.float32))
    both = np.tile(around.mean(0), (len(kept), 1))
    yield _rounding(step * largest, np.zeros((len(kept), 0)), both, False), transform


def _rounding(steps: NDArray[np.float64], across: NDArray[np.float64], around: NDArray[np.float64], nonnegative: bool) -> Rounding:
    """`across` (K, K), or (K, 0) for no feedback between components."""
    planes = len(steps)
    unit = np.abs(across).max(1, initial=1e-30) / 127
    weights = np.rint(across / unit[:, None])[np.tril_indices(planes, -1)] if across.shape[1] else np.zeros(0)
    return Rounding(
        steps.astype(np.float32), around.astype(np.float32), weights.astype(np.int8), unit.astype(np.float32), nonnegative
    )


def _distortion(
    coder: PredictiveCoder, symbols: NDArray[np.int32], wanted: FloatMap, point: Point, sensitivity: Sensitivity
) -> float:
    """Of a sample, to second order, with moments over channels and over pixels taken as independent of each other."""
    share, around = predict_pixels(sensitivity.neighbours, PIXEL_DAMPING)
    total = 0.0
    for own, map_ in zip(symbols, wanted, strict=True):
        values = coder.dequantize(own)
        error = (point.activated(values) if coder.before else values) - map_
        rest = whitened(error.astype(np.float64), around.mean(0)).reshape(len(error), -1)
        total += float(np.vdot(sensitivity.channels @ rest, rest))
    return float(share.mean()) * total / len(wanted)
