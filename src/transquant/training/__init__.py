"""Retraining: transform quantization, DiffQ, CRQ and their baselines, one protocol (docs/training.md).

network = training.prepare(model, calibration, method="transform", bits=1.0, steps=7800)
… loss + network.penalty() …
compressed = training.harden(model)
"""

from __future__ import annotations

from transquant.training.network import SoftNetwork
from transquant.training.prepare import harden, prepare, soft_network

__all__ = ["SoftNetwork", "harden", "prepare", "soft_network"]
