"""Statistics without calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from transquant.records import BatchNormSpec, FloatArray, LayerStats, Plan, Statistics, VectorSpec, WeightSpec

VECTOR_CARE = 256  # four bits more than a weight of the same relative size


def weight_statistics(plan: Plan, values: Mapping[str, FloatArray]) -> Statistics:
    """Statistics without calibration: D = Σ ‖ΔW‖² / Σ ‖W‖² over all weights, so that every weight has the same step. A value
    of a vector acts on a whole row at every position: its relative error counts as that of `VECTOR_CARE` weights. `values`
    as from `modules.gather`. (Steps in proportion to each tensor's own size are far worse: docs/method.md.)"""
    weights = [s for s in plan.specs if isinstance(s, WeightSpec)]
    energy = float(sum(np.sum(values[s.name] ** 2) for s in weights))
    count = sum(prod(s.shape) for s in weights)
    level = 1 / energy if energy > 0 else 0.0
    layers: dict[str, LayerStats] = {}
    vectors: dict[str, FloatArray] = {}

    def add_vector(key: str, vector: FloatArray, shape: tuple[int, ...]) -> None:
        square = float(np.mean(vector**2))
        vectors[key] = np.full(shape, VECTOR_CARE / count / square if square > 0 else 0.0)

    for spec in plan.specs:
        if isinstance(spec, WeightSpec):
            rows, columns = spec.shape[0], prod(spec.shape[1:])
            layers[spec.name] = LayerStats(np.ones((1, columns)), np.full((1, rows), level), 0, 0.0, 0.0)
        elif isinstance(spec, VectorSpec):
            add_vector(spec.name, values[spec.name], spec.shape)
        elif isinstance(spec, BatchNormSpec):
            for part, attribute in (("scale", "weight"), ("shift", "bias")):
                vector = values[f"{spec.name}.{part}"]
                add_vector(spec.key(attribute), vector, vector.shape)
    return Statistics(layers, vectors, "weights", 0)
