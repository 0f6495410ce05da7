"""Layers in execution order: each is quantized towards what makes up for the errors of those before it.

    for each layer:  float network, network so far ─ paired inputs ─ targets W E[x x'ᵀ] E[x' x'ᵀ]⁻¹ ─ feedback ─ symbols

What the layers before have done wrong is known by then, sample by sample, and much of it can be told from the inputs
that are left. The same inputs say by how much the mean of each output has moved; a bias, or the shift of the BatchNorm that
follows, takes that back. No bytes are spent on either.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from transquant.choices import Choice
from transquant.encoder import FINEST, Draft, Encoder
from transquant.grid import on_grid
from transquant.records import FloatArray, Plan
from transquant.stats.paired import PairedNetworks, Pairs
from transquant.tuning import LARGE

FROM, ALL_FROM = 5, 7  # effort from which on layers go in order, and from which on with all samples
FEW = 512  # samples below that
LIVE = 1 << 32  # bytes of activations that may wait from there on
DAMPING = 0.05  # towards the float weights


def samples_in_order(plan: Plan, effort: int) -> int:
    """On how many samples layers are quantized in execution order; 0: they are not. A rule on the work, not on time, so that files
    are the same on fast and slow machines."""
    if effort >= ALL_FROM:
        return 1 << 62
    return FEW if effort >= FROM and plan.work <= LARGE else 0


def live_in_order(effort: int) -> int | None:
    """How many bytes of activations may wait meanwhile; None: as many as where nothing is said."""
    return LIVE if effort >= ALL_FROM else None


def refine(
    encoder: Encoder, paired: PairedNetworks, c: float, choice: Choice, progress: Callable[[int, int], None] | None = None
) -> Draft:
    """A draft at scalar c whose layers were quantized one after the other; those that are never reached come last."""
    c = on_grid(max(c, FINEST))
    done = 0

    def quantized(name: str, pairs: Pairs | None) -> dict[str, Tensor]:
        nonlocal encoder, done
        if progress:
            progress(done, len(paired.order))
        done += 1
        if pairs is not None:
            encoder = _retargeted(encoder, name, pairs)
        encoder = encoder.revised({}, {}, encoder.weights([name], c, choice))
        return encoder.part(name, c).state()

    paired.walk(quantized)
    return encoder.draft(c, choice)


def _retargeted(encoder: Encoder, name: str, pairs: Pairs) -> Encoder:
    """The encoder with another target for a weight, and for the vector that takes what is off in the mean."""
    weight, absorber = encoder.source.values[name], encoder.absorber(name)
    target = pairs.refit(weight, DAMPING, absorber is not None)
    if absorber is None or pairs.by_row:
        return encoder.revised({name: target}, {}, {})
    mean, other = pairs.means()
    off = _grouped(weight, mean) - _grouped(target, other)
    if absorber.endswith(".shift"):
        off = off * encoder.source.values[f"{absorber.removesuffix('.shift')}.scale"]
    return encoder.revised({name: target, absorber: encoder.source.values[absorber].reshape(-1) + off}, {name: other}, {})


def _grouped(weight: FloatArray, mean: FloatArray) -> FloatArray:
    """W·m of each group of rows, float64 (O,)."""
    blocks = weight.reshape(len(mean), -1, weight.shape[1])
    result: FloatArray = np.einsum("gon,gn->go", blocks, mean).reshape(-1)
    return result
