"""Retraining: transform quantization, DiffQ, CRQ and their baselines, one protocol (docs/training.md).

network = training.prepare(model, calibration, method="transform", bits=1.0, steps=7800)
… loss + network.penalty() …
compressed = training.harden(model)

or all of it, with checkpoints: training.fit(model, (images, labels), bits=1.0, epochs=20).compressed
"""

from __future__ import annotations

from transquant.training.fit import fit
from transquant.training.history import Epoch, FitResult, Moment
from transquant.training.network import SoftNetwork
from transquant.training.prepare import harden, prepare, soft_network

__all__ = ["Epoch", "FitResult", "Moment", "SoftNetwork", "fit", "harden", "prepare", "soft_network"]
