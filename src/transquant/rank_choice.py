"""How many bands each layer keeps so that the network takes few multiply–adds: least D + μ · MACs, with one μ for all layers.

A layer of rank K runs as two, of K·n + O·K multiply–adds an output position (bands of the rows), or I·K an input position and
K·O·taps an output position (bands of the channels). What its truncation costs at the network's output follows from the layer's
moments (transforms/reduced.py). Where the best μ leaves some of what is allowed, the layers that gain most for it get it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from transquant.choices import Axis, LayerTransform
from transquant.errors import TargetError
from transquant.inference import Calls
from transquant.quantizers.metric import quadratic_form
from transquant.records import MAX_BANDS, FloatArray, LayerStats, Plan, WeightSpec
from transquant.transforms.frame import band_cost
from transquant.transforms.layout import Layout
from transquant.transforms.reduced import ReducedFrame, ranked

KINDS = ("conv1d", "conv2d", "conv3d", "linear")
MOST_RANKS = 32  # of a layer that are tried


@dataclass(frozen=True, slots=True)
class _Rank:
    distortion: float
    macs: float
    axis: Axis = ""
    kept: int = 0


def choose_ranks(
    plan: Plan, layers: Mapping[str, LayerStats], values: Mapping[str, FloatArray], calls: Mapping[str, Calls], share: float
) -> tuple[dict[str, LayerTransform], float]:
    """The layers that keep few bands, by weight, such that the network takes at most `share` of its multiply–adds, and the share it
    takes. `calls` by path of module.

    Raises TargetError where no ranks are small enough."""
    total = sum(c.macs for c in calls.values())
    specs = [s for s in plan.specs if isinstance(s, WeightSpec) and _can(s, layers[s.name], calls)]
    ranks = {s.name: _ranks(s, values[s.name], layers[s.name], calls[s.module or ""]) for s in specs}
    rest = total - sum(own[0].macs for own in ranks.values())
    budget = share * total - rest
    least = sum(min(r.macs for r in own) for own in ranks.values())
    if least > budget:
        raise TargetError(f"macs={share} cannot be reached: with one band a layer {(rest + least) / total:.3f} of them are left")
    picked = _filled(ranks, _cheapest(ranks, budget), budget)
    taken = rest + sum(r.macs for r in picked.values())
    return {name: LayerTransform("e", r.axis, 0, r.kept) for name, r in picked.items() if r.kept}, taken / max(total, 1)


def _can(spec: WeightSpec, stats: LayerStats, calls: Mapping[str, Calls]) -> bool:
    """Whether a layer may be two: its moments are known whole, and nothing else uses its weight."""
    known = stats.input_moment.ndim == stats.output_moment.ndim == 3 and stats.input_moment.any() and stats.output_moment.any()
    plain = spec.kind in KINDS and spec.groups == 1 and not spec.tied and not spec.rescaled and spec.attribute == "weight"
    return bool(known) and plain and (spec.module or "") in calls and max(spec.shape[:2]) <= MAX_BANDS


def _ranks(spec: WeightSpec, weight: FloatArray, stats: LayerStats, calls: Calls) -> list[_Rank]:
    """All of the layer as it is, and what is smaller."""
    a, g = stats.input_moment[0], stats.output_moment[0]
    rows, columns = weight.shape
    channels, taps = spec.shape[1], columns // spec.shape[1]
    found = [_Rank(0.0, calls.macs)]
    axes: tuple[Axis, ...] = ("r", "c") if taps > 1 else ("r",)  # of one tap both are the same two matrices
    for axis in axes:
        layout = Layout(axis, rows, channels, taps)
        a_band = calls.outputs * (columns + rows) if axis == "r" else calls.inputs * channels + calls.outputs * rows * taps
        basis, left = ranked(layout, weight, a, g)
        most = min(int((calls.macs - 1) // a_band), (rows if axis == "r" else channels) - 1, basis.shape[1])
        for kept in np.unique(np.linspace(1, most, min(most, MOST_RANKS)).astype(int)) if most > 0 else ():
            if axis == "r":
                distortion = float(left[kept]) if kept < len(left) else 0.0
            else:  # there the values are of an averaged metric
                frame = ReducedFrame(layout, basis[:, :kept])
                error = weight - frame.synthesize(frame.analyze(weight, band_cost(layout, a, g)))
                distortion = quadratic_form(error, a, g)
            found.append(_Rank(distortion, float(a_band * kept), axis, int(kept)))
    return found


def _cheapest(ranks: Mapping[str, list[_Rank]], budget: float) -> dict[str, _Rank]:
    """The ranks of least D + μ · MACs at the smallest μ that keeps to the budget."""

    def at(log_mu: float) -> dict[str, _Rank]:
        return {name: min(own, key=lambda r: r.distortion + 2.0**log_mu * r.macs) for name, own in ranks.items()}

    low, high = -120.0, 60.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(r.macs for r in at(middle).values()) > budget:
            low = middle
        else:
            high = middle
    return at(high)


def _filled(ranks: Mapping[str, list[_Rank]], picked: dict[str, _Rank], budget: float) -> dict[str, _Rank]:
    """What is left of the budget spent on the steps that save most distortion a multiply–add."""
    spare = budget - sum(r.macs for r in picked.values())
    while True:
        steps = [
            ((picked[name].distortion - r.distortion) / max(r.macs - picked[name].macs, 1e-9), name, r)
            for name, own in ranks.items()
            for r in own
            if r.distortion < picked[name].distortion and r.macs - picked[name].macs <= spare
        ]
        if not steps:
            return picked
        _, name, rank = max(steps, key=lambda s: s[0])
        spare -= rank.macs - picked[name].macs
        picked = {**picked, name: rank}
