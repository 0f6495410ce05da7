"""The project's own coder of feature maps: end-to-end steps, rounding with feedback, symbols predicted from their neighbours.

    after the activation:   values ─────────────── feedback ─ symbols ─ contexts ─ bytes
    before it:              values ─ ELT (K ≤ C) ─ feedback ─ symbols ─ contexts ─ bytes

Step sizes are c/√d, d what an error costs at the output (feedback.py), with the same c at every point: one Lagrange multiplier.
The transform diagonalises the map's covariance and the gradient's moments together (Young et al. 2020, there for weights) and
leaves out components that are less than the step. Which of both costs less, D + λR on calibration samples, is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transquant.features.contexts import Predictor, Tables, count, decode, encode, fit_bins, learned
from transquant.features.feedback import factor_channels, predict_pixels, rounded, whitened
from transquant.features.prediction import fit_predictor
from transquant.features.records import Arrays, FloatMap, IntMap, Point, Sensitivity, Settings

CHANNEL_DAMPING, PIXEL_DAMPING = 0.1, 0.1
MOST_CHANNELS = 512  # above so many no error is fed to another channel
LEAST_COMPONENT = 0.35  # standard deviation, in steps, below which a component is left out
FLOOR = 0.003  # of the mean sensitivity: no channel's counts for less
SLOPE = 2 * log(2) / 12  # dD/dR at high rate, in units of c²


@dataclass(frozen=True, slots=True)
class Transform:
    """`analysis` float32 (K, C), `synthesis` float32 (C, K), `mean` float32 (C,) of what is transformed."""

    analysis: FloatMap
    synthesis: FloatMap
    mean: FloatMap


@dataclass(frozen=True)
class PredictiveCoder:
    """`steps` float32 (K,); `across` float32 (K, K), `around` float32 (K, 4): feedback, which only quantizing needs."""

    steps: FloatMap
    across: FloatMap
    around: FloatMap
    transform: Transform | None
    nonnegative: bool
    predictor: Predictor
    tables: Tables
    kind: str = field(default="predictive", init=False)

    @property
    def before(self) -> bool:
        """Whether it codes what goes into the activation."""
        return self.transform is not None

    @property
    def mode(self) -> str:
        """For the ledger."""
        return f"ELT {len(self.steps)}" if self.transform is not None else "after"

    def quantize(self, values: FloatMap) -> IntMap:
        """float32 (C, H, W) → int32 (K, H, W)."""
        if self.transform is not None:
            centred = values - self.transform.mean[:, None, None]
            values = np.tensordot(self.transform.analysis, centred, 1)
        return rounded(values, self.steps, self.across, self.around, self.nonnegative)

    def dequantize(self, symbols: IntMap) -> FloatMap:
        """int32 (K, H, W) → float32 (C, H, W)."""
        values = symbols.astype(np.float32) * self.steps[:, None, None]
        if self.transform is None:
            return values
        result: FloatMap = np.tensordot(self.transform.synthesis, values, 1) + self.transform.mean[:, None, None]
        return result

    def encode(self, symbols: IntMap) -> bytes:
        """The payload."""
        return encode(symbols, self.predictor, self.tables)

    def decode(self, data: bytes, height: int, width: int) -> IntMap:
        """The symbols of a payload. Raises CorruptFile."""
        return decode(data, (len(self.steps), height, width), self.predictor, self.tables)

    def ideal_bits(self, symbols: IntMap) -> float:
        """Information content under the tables."""
        seen = count(symbols, self.predictor, self.tables.bins)
        return float((seen[:, :-1] * self.tables.bits).sum() + seen[:, -1].sum())
