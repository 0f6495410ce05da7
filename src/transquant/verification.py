"""Rate–distortion curves measured group by group: does the closed form say what the network does?

As in Young et al. (arXiv 2009.01174, section 5) one group at a time is quantized, all else stays float, and the network is
run; here the groups are runs of input channels, and the closed form is tr(G E A Eᵀ) of the group's error E.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from transquant.choices import Choice
from transquant.encoder import Encoder
from transquant.grid import global_step
from transquant.quantizers.metric import quadratic_form
from transquant.records import FloatArray, LayerStats, WeightSpec
from transquant.report import VerifiedPoint
from transquant.stats import Reference
from transquant.transform_choice import count_bits
from transquant.weights import code_weight, dequantized

GROUPS = 8  # of a layer, at most
FACTORS = (1.0, 2.0, 4.0)  # of the scalar c: the points of a curve


def verify(
    encoder: Encoder, reference: Reference, c: float, choice: Choice, progress: Callable[[int, int], None]
) -> tuple[VerifiedPoint, ...]:
    """Curves of all measured layers around scalar c; three rates, up to eight groups of input channels each."""
    specs = [s for s in encoder.plan.specs if isinstance(s, WeightSpec) and encoder.stats.layers[s.name].samples]
    points: list[VerifiedPoint] = []
    for done, spec in enumerate(specs):
        progress(done, len(specs))
        points += _curve(encoder, reference, spec, c, choice)
    progress(len(specs), len(specs))
    return tuple(points)


def _curve(encoder: Encoder, reference: Reference, spec: WeightSpec, c: float, choice: Choice) -> Iterator[VerifiedPoint]:
    weight, stats = encoder.source.values[spec.name], encoder.stats.layers[spec.name]
    if not (stats.input_moment.any() and stats.output_moment.any()):
        return
    channels, taps = spec.shape[1], int(np.prod(spec.shape[2:]))
    edges = np.unique(np.linspace(0, channels, min(GROUPS, channels) + 1).astype(int))
    for factor in FACTORS:
        step = global_step(c * factor)
        rows = encoder.row_steps.get(spec.name)
        coded = code_weight(spec, weight, stats, c * factor, step, choice, encoder.transform(spec), encoder.method, rows)
        error = weight - dequantized(coded.tensor, step)
        for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            part = np.zeros_like(error)
            columns = slice(first * taps, last * taps)
            part[:, columns] = error[:, columns]
            state = {spec.name: torch.from_numpy((weight - part).reshape(spec.shape)).float()}
            yield VerifiedPoint(
                spec.name, first, last - 1, count_bits(coded.tensor) / weight.size, _predicted(part, stats),
                reference.distortion(state),
            )  # fmt: skip


def _predicted(error: FloatArray, stats: LayerStats) -> float:
    blocks = error.reshape(len(stats.input_moment), -1, error.shape[1])
    moments = zip(blocks, stats.input_moment, stats.output_moment, strict=True)
    return sum(quadratic_form(block, a, g) for block, a, g in moments)
