"""Static quantization of layers' inputs: histograms → a quantizer for each depth → one multiplier → what the file says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

from transquant.allocation.activations import LEAST, MOST, input_table, share_bits
from transquant.errors import InputError
from transquant.records import Activation, Statistics
from transquant.workers import Workers


@dataclass(frozen=True, slots=True)
class ActivationPlan:
    """Quantizers of inputs by weight, their mean bits a value, and the sum of their predicted distortions."""

    quantizers: Mapping[str, Activation]
    mean_bits: float
    predicted: float


def parse_activations(bits: object, calibrated: bool) -> float | None:
    """Bits a value as asked for, checked. Raises InputError."""
    if bits is None:
        return None
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not isfinite(bits) or not LEAST <= bits <= MOST:
        raise InputError(f"activations is {bits!r}, allowed are {LEAST} to {MOST} bits a value on average, or None")
    if not calibrated:
        raise InputError("activations need calibration data and a metric of the output: ranges of inputs are learned from samples")
    return float(bits)


def plan_activations(stats: Statistics, mean_bits: float, pool: Workers) -> ActivationPlan:
    """Quantizers of all inputs that calibration has seen. Raises InputError where there are none."""
    if not stats.inputs:
        raise InputError("no coded layer of this model has an input that can be quantized: activations must be None")
    names = list(stats.inputs)
    tables = dict(zip(names, pool.map(input_table, stats.inputs.values()), strict=True))
    depths = share_bits(tables, mean_bits)
    values = sum(t.values for t in tables.values())
    return ActivationPlan(
        {name: tables[name].quantizers[bits - LEAST] for name, bits in depths.items()},
        sum(bits * tables[name].values for name, bits in depths.items()) / values,
        float(sum(tables[name].errors[bits - LEAST] for name, bits in depths.items())),
    )
