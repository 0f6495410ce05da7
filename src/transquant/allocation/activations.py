"""Bit depths of layers' inputs: the step and clipping of least weighted squared error for each depth, then one multiplier for all
(the core paper's rule, Young et al., arXiv 2009.01174, section 5).

A quantizer of b bits has levels (k − zero)·Δ, k = 0 … 2^b − 1. Its error over a histogram is Σ of h·(x − level)², which prefix sums
of h, h·x and h·x² give at once for many quantizers. Zero is always a level: padding, and what a ReLU leaves, costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from transquant.grid import global_step
from transquant.records import Activation, FloatArray, InputStats

LEAST, MOST = 2, 8  # bits
DEPTHS = range(LEAST, MOST + 1)
COARSE = 2.0 ** -(np.arange(33) / 4)  # parts of the range that are tried, eight octaves
FINE = 2.0 ** (np.arange(-4, 5) / 16)  # around the best of them


@dataclass(frozen=True, slots=True)
class InputTable:
    """Quantizers of one input by depth, and their predicted distortions, float64 (7,); `values` of the input, a sample."""

    quantizers: tuple[Activation, ...]
    errors: FloatArray
    values: float


def input_table(stats: InputStats) -> InputTable:
    """The best quantizers of a layer's input."""
    found = [best_quantizer(stats, bits) for bits in DEPTHS]
    return InputTable(tuple(q for q, _ in found), np.array([error for _, error in found]), stats.values)


def best_quantizer(stats: InputStats, bits: int) -> tuple[Activation, float]:
    """The quantizer of least predicted distortion, and that: both ends of the range are searched for, unless one is zero."""
    low, high = min(stats.low, 0.0), max(stats.high, 0.0)
    prefix = np.concatenate([np.zeros((3, 1)), np.cumsum(stats.sums, 1)], 1)
    ends = _products(low, COARSE), _products(high, COARSE)
    for _ in range(2):
        lows, highs = (a.reshape(-1) for a in np.meshgrid(*ends))
        steps, zeros = _quantizers(lows, highs, bits)
        errors = _errors(prefix, stats.exponent, steps, zeros, bits)
        best = int(np.argmin(errors))
        ends = _products(lows[best], FINE), _products(highs[best], FINE)
    mantissa, exponent = global_step(float(steps[best]))
    return Activation(bits, int(zeros[best]), mantissa, exponent), float(errors[best])


def distortion(stats: InputStats, quantizer: Activation) -> float:
    """Predicted distortion of a quantizer, in units of the metric."""
    prefix = np.concatenate([np.zeros((3, 1)), np.cumsum(stats.sums, 1)], 1)
    one = np.array([quantizer.scale]), np.array([float(quantizer.zero)])
    return float(_errors(prefix, stats.exponent, *one, quantizer.bits)[0])


def share_bits(tables: Mapping[str, InputTable], mean: float) -> dict[str, int]:
    """Depths of all inputs, at most `mean` bits a value on average: each takes the least D + λ·bits, with one λ for all. What then
    is left of the budget goes, bit by bit, where a bit saves most and still fits."""
    names = list(tables)
    counts = np.array([tables[n].values for n in names])
    errors = np.array([tables[n].errors for n in names])
    bits = np.array(DEPTHS)
    budget = mean * counts.sum() * (1 + 1e-12)

    def chosen(log_multiplier: float) -> np.ndarray:
        picked: np.ndarray = np.argmin(errors + 2.0**log_multiplier * counts[:, None] * bits, 1)
        return picked

    few, many = 200.0, -400.0
    if (counts * bits[chosen(many)]).sum() <= budget:
        few = many
    for _ in range(100):
        middle = (few + many) / 2
        if (counts * bits[chosen(middle)]).sum() <= budget:
            few = middle
        else:
            many = middle
    depths = chosen(few)
    while True:
        left = budget - (counts * bits[depths]).sum()
        gains = [(errors[k, d] - errors[k, d + 1]) / counts[k] if d + 1 < len(bits) and counts[k] <= left else -1.0
                 for k, d in enumerate(depths)]  # fmt: skip
        if not gains or max(gains) <= 0:
            break
        depths[int(np.argmax(gains))] += 1
    return {name: int(bits[d]) for name, d in zip(names, depths, strict=True)}


def _products(end: float, factors: FloatArray) -> FloatArray:
    """Candidates for one end of a range: parts of it, and zero."""
    return np.zeros(1) if end == 0 else np.append(end * factors, 0.0)


def _quantizers(lows: FloatArray, highs: FloatArray, bits: int) -> tuple[FloatArray, FloatArray]:
    """Steps, as a file can say them, and zeros of ranges."""
    most = 2**bits - 1
    width = highs - lows
    width[width <= 0] = max(float(width.max(initial=0.0)), 2.0**-100)
    grid = (global_step(float(max(w / most, 2.0**-118))) for w in width)
    steps = np.array([mantissa * 2.0**exponent for mantissa, exponent in grid])
    return steps, np.clip(np.rint(-lows / steps), 0, most)


def _errors(prefix: FloatArray, exponent: int, steps: FloatArray, zeros: FloatArray, bits: int) -> FloatArray:
    """Σ h·(x − level)² of quantizers, float64 (candidates,); values within a bin that a border cuts are shared evenly."""
    count, half = 2**bits, (prefix.shape[1] - 1) / 2
    offsets = np.arange(count) - zeros[:, None]
    places = np.clip((offsets[:, :-1] + 0.5) * steps[:, None] * 2.0**-exponent + half, 0, 2 * half)
    left = np.minimum(places.astype(np.int64), int(2 * half) - 1)
    share = places - left
    ends = np.zeros((3, len(steps), 1)), np.broadcast_to(prefix[:, None, -1:], (3, len(steps), 1))
    borders = prefix[:, left] + share * (prefix[:, left + 1] - prefix[:, left])
    zeroth, first, second = np.diff(np.concatenate([ends[0], borders, ends[1]], 2), axis=2)
    levels = offsets * steps[:, None]
    errors: FloatArray = np.maximum(second - 2 * levels * first + levels**2 * zeroth, 0.0).sum(1)
    return errors
