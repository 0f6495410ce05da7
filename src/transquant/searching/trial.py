"""Policies for real: the smaller network, a real file of it, and what it is worth on held-back samples.

    policy ─ compensated ─ removed ─ statistics cut to what is left ─ Encoder ─ draft ─ bytes, outputs

Statistics are those of the whole network: that is quick, and how far it leads astray is in the record of the search.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from transquant import modules
from transquant.allocation.search import Closest, meet_size
from transquant.choices import Choice, Method
from transquant.encoder import Draft, Encoder, Source
from transquant.pruning import ChannelGroup, compensated, masked, removed
from transquant.records import FloatArray, LayerStats, Statistics
from transquant.searching.episodes import Measured
from transquant.searching.policy import Policy
from transquant.searching.prediction import Predictor
from transquant.stats import Reference
from transquant.stats.copies import copy_model
from transquant.target_search import score_of
from transquant.workers import Workers

PASSES = 6  # drafts until the size is met
Kept = dict[str, list[int]]
Masks = Mapping[tuple[str, int], "np.ndarray[Any, Any]"]  # by key and axis of a tensor, which of its indices are kept


@dataclass(frozen=True, slots=True)
class Trials:
    """Tries policies on `model`. `evaluate(model) -> float`, higher is better, or None: minus the distance of the outputs.
    `physical`: channels are removed, or else zero."""

    model: nn.Module
    groups: Sequence[ChannelGroup]
    statistics: Statistics
    reference: Reference
    pool: Workers
    method: Method
    physical: bool
    evaluate: Callable[[nn.Module], float] | None = None

    def kept(self, predictor: Predictor, policy: Policy) -> Kept:
        """By group that loses channels, those that stay."""
        return {name: predictor.removals[name].kept(count).tolist() for name, count in policy.removed.items() if count}

    def network(self, kept: Kept) -> nn.Module:
        """The float network without the other channels, the layers that read them making up for them."""
        twin = compensated(self.model, self.groups, kept, self.statistics)
        return (removed if self.physical else masked)(twin, self.groups, kept)

    def depths(self, predictor: Predictor, policy: Policy) -> dict[str, FloatArray]:
        """Depths of the rows that the network has, by weight; 0 in rows that are zero."""
        depths = predictor.depths(policy)
        return {name: rows[rows > 0] for name, rows in depths.items()} if self.physical else depths

    def draft(self, predictor: Predictor, policy: Policy, budget: float | None) -> tuple[Draft, int, nn.Module]:
        """A draft of a policy's network, its bytes, and the float network: of at most `budget` bytes, or with the very depths where
        that is None."""
        kept = self.kept(predictor, policy)
        network = self.network(kept)
        plan = modules.plan_model(network)
        source = Source(*modules.gather(plan, network.state_dict()))
        statistics = cut(self.statistics, self._masks(kept) if self.physical else {})
        encoder = Encoder(plan, source, statistics, self.pool, self.method, depths=self.depths(predictor, policy))
        choice = Choice()
        if budget is None:
            draft = encoder.draft(encoder.unit, choice)
            return draft, len(encoder.encode(draft).data), network
        closest: Closest[Draft] = Closest(budget)

        def size_of(c: float) -> float:
            found = encoder.draft(c, choice)
            return closest.offer(found, len(encoder.encode(found).data))

        meet_size(size_of, budget, max(0.02 * budget, 64.0), encoder.unit, plan.num_weights / 10, PASSES)
        assert closest.item is not None
        return closest.item, closest.size, network

    def measured(self, predictor: Predictor, policy: Policy, budget: float | None) -> Measured:
        """What a policy is really worth, before anything is tuned for it."""
        draft, size, network = self.draft(predictor, policy, budget)
        network.load_state_dict(draft.state(), strict=False)
        return Measured(size, self.value(network))

    def value(self, network: nn.Module) -> float:
        """Of a network on the held-back samples, higher is better. Raises InputError where `evaluate` gives no number."""
        twin = copy_model(network)  # in eval mode
        if self.evaluate is None:
            return -self.reference.compared(twin)
        return score_of(self.evaluate, twin)

    def _masks(self, kept: Kept) -> Masks:
        state = self.model.state_dict()
        masks: dict[tuple[str, int], Any] = {}
        for group in self.groups:
            if group.name not in kept:
                continue
            gone = sorted(set(range(group.channels)) - set(kept[group.name]))
            for part in group.slices:
                mask = masks.setdefault((part.key, part.axis), np.ones(state[part.key].shape[part.axis], bool))
                mask[part.start + (np.array(gone)[:, None] * part.span + np.arange(part.span)).reshape(-1)] = False
        return masks


def cut(statistics: Statistics, masks: Masks) -> Statistics:
    """The statistics of what is left of a network: rows and columns of its moments, entries of its vectors."""
    layers = {}
    for name, stats in statistics.layers.items():
        rows, columns = masks.get((name, 0)), masks.get((name, 1))
        layers[name] = stats if rows is None and columns is None else _cut(stats, rows, columns)
    vectors = {k: v[masks[k, 0]] if (k, 0) in masks else v for k, v in statistics.vectors.items()}
    return replace(statistics, layers=layers, vectors=vectors)


def _cut(stats: LayerStats, rows: Any, columns: Any) -> LayerStats:
    a, g, mean = stats.input_moment, stats.output_moment, stats.input_mean
    if len(g) > 1 and rows is not None:  # depthwise: whole groups go
        whole = rows.reshape(len(g), -1).all(1)
        return replace(stats, input_moment=a[whole], output_moment=g[whole], input_mean=None if mean is None else mean[whole])
    if rows is not None:
        g = g[:, rows] if g.ndim == 2 else g[:, rows][:, :, rows]
    if columns is not None:
        wide = np.repeat(columns, _columns(a) // len(columns))
        mean = None if mean is None else mean[:, wide]
        if a.ndim == 4:  # diagonal blocks of one side: what is left has no such, so the diagonal must do
            a = np.einsum("...ii->...i", a).reshape(len(a), -1)
        a = a[:, wide] if a.ndim == 2 else a[:, wide][:, :, wide]
    return replace(stats, input_moment=a, output_moment=g, input_mean=mean)


def _columns(moment: FloatArray) -> int:
    return int(np.prod(moment.shape[1:3])) if moment.ndim == 4 else int(moment.shape[1])
