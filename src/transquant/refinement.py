"""Layers in execution order: each is quantized towards what makes up for the errors of those before it.

    for each layer:  float network, network so far ─ paired inputs ─ targets W E[x x'ᵀ] E[x' x'ᵀ]⁻¹ ─ feedback ─ symbols

What the layers before have done wrong is known by then, sample by sample, and much of it can be told from the inputs
that are left. The same inputs say by how much the mean of each output has moved; a bias, or the shift of the BatchNorm that
follows, takes that back. No bytes are spent on either.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from transquant.choices import Choice
from transquant.encoder import FINEST, Draft, Encoder
from transquant.grid import on_grid
from transquant.records import FloatArray, Plan
from transquant.stats.paired import PairedNetworks, Pairs
from transquant.tuning import LARGE

FROM, ALL_FROM = 5, 7  # effort from which on layers go in order, and from which on with all samples
FEW = 512  # samples below that
DAMPING = 0.05  # towards the float weights


def samples_in_order(plan: Plan, effort: int) -> int:
    """On how many samples layers are quantized in execution order; 0: they are not. A rule on the work, not on time, so that files
    are the same on fast and slow machines."""
    if effort >= ALL_FROM:
        return 1 << 62
    return FEW if effort >= FROM and plan.work <= LARGE else 0


def refine(
    encoder: Encoder, paired: PairedNetworks, c: float, choice: Choice, progress: Callable[[int, int], None] | None = None
) -> Draft:
    """A draft at scalar c whose layers were quantized one after the other; those that are never reached come last."""
    c = on_grid(max(c, FINEST))
    for done, name in enumerate(paired.order):
        if progress:
            progress(done, len(paired.order))
        if encoder.done:
            encoder = _retargeted(encoder, paired.measure([name], encoder.so_far(c).state()))
        encoder = encoder.revised({}, {}, encoder.weights([name], c, choice))
    return encoder.draft(c, choice)


def _retargeted(encoder: Encoder, pairs: dict[str, Pairs]) -> Encoder:
    """The encoder with other targets for some weights, and for the vectors that take what is off in the mean."""
    values: dict[str, FloatArray] = {}
    means: dict[str, FloatArray] = {}
    for name, pair in pairs.items():
        weight, absorber = encoder.source.values[name], encoder.absorber(name)
        values[name] = pair.refit(weight, DAMPING, absorber is not None)
        if absorber is None or pair.by_row:
            continue
        mean, other = pair.means()
        means[name] = other
        off = _grouped(weight, mean) - _grouped(values[name], other)
        if absorber.endswith(".shift"):
            off = off * encoder.source.values[f"{absorber.removesuffix('.shift')}.scale"]
        values[absorber] = encoder.source.values[absorber].reshape(-1) + off
    return encoder.revised(values, means, {})


def _grouped(weight: FloatArray, mean: FloatArray) -> FloatArray:
    """W·m of each group of rows, float64 (O,)."""
    blocks = weight.reshape(len(mean), -1, weight.shape[1])
    result: FloatArray = np.einsum("gon,gn->go", blocks, mean).reshape(-1)
    return result
