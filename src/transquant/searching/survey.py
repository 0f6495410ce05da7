"""What a search knows of a network before its first episode: channels that may go, and what each weight costs."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn

from transquant import modules
from transquant.encoder import Encoder
from transquant.errors import InputError, NotFollowed
from transquant.inference import count_calls
from transquant.pruning import ChannelGroup, channel_groups, layer_groups
from transquant.records import BatchNormSpec, Plan, VectorSpec, WeightSpec
from transquant.searching.candidates import removal
from transquant.searching.policy import Space
from transquant.searching.prediction import Predictor, Weight
from transquant.searching.tables import row_table
from transquant.stats import copy_model
from transquant.stats.measure import Run

_log = logging.getLogger("transquant")


def groups_of(model: nn.Module, batch: Any, run: Run) -> tuple[tuple[ChannelGroup, ...], bool]:
    """Groups of channels that may go, and whether they can be removed for real."""
    example = _inputs(copy_model(model), batch, run)
    try:
        return channel_groups(model, example), True
    except NotFollowed as error:
        _log.warning("%s; removed channels stay in the result, as zeros", error)
        return layer_groups(model, example), False


def usable(groups: Sequence[ChannelGroup], encoder: Encoder) -> tuple[ChannelGroup, ...]:
    """Groups whose cost can be told: rows of weights compute them, columns of ungrouped ones read them, and calibration saw both;
    of the channels of one layer, those of one group."""
    specs = {s.name: s for s in encoder.plan.specs if isinstance(s, WeightSpec)}

    def told(group: ChannelGroup) -> bool:
        rows = [specs[s.key] for s in group.sources if s.key in specs]
        columns = [specs[s.key] for s in group.readers if s.key in specs]
        seen = all(encoder.layers[w.name].output_moment.any() for w in (*rows, *columns))
        right = all(s.axis == (s in group.readers) for s in group.slices if s.key in specs)
        return seen and right and bool(rows) and all(w.groups == 1 for w in columns) and (bool(columns) or not group.removable)

    taken: set[str] = set()
    found = []
    for group in filter(told, groups):
        own = {s.key for s in group.sources if s.key in specs}
        if not own & taken:
            found.append(group)
            taken |= own
    return tuple(found)


def survey(
    model: nn.Module, groups: Sequence[ChannelGroup], encoder: Encoder, batch: Any, run: Run, criterion: str, fixed: int | None,
) -> Predictor:  # fmt: skip
    """The predictor of a network whose statistics are the encoder's. Raises InputError where no layer has anything to decide."""
    plan, values, layers = encoder.plan, encoder.source.values, encoder.layers
    calls = count_calls(copy_model(model), batch, run)  # a run changes what a module in train mode has seen
    samples = modules.num_samples(batch)
    specs = [s for s in plan.specs if isinstance(s, WeightSpec) and layers[s.name].output_moment.any()]
    if not specs:
        raise InputError("calibration reached no weight that could be searched for")
    order = {path: k for k, path in enumerate(calls)}
    specs.sort(key=lambda s: order.get(s.module or "", len(order)))
    shapes = {s.name: s.shape for s in specs}
    pool = encoder.pool
    removals = pool.map(lambda g: removal(g, criterion, values, shapes, layers if g.removable else encoder.stats.layers), groups)
    tables = pool.map(lambda s: row_table(values[s.name], layers[s.name], criterion), specs)
    weights = []
    for spec, table in zip(specs, tables, strict=True):
        macs = calls[spec.module or ""].macs / samples if (spec.module or "") in calls else 0.0
        weights.append(_weight(spec, table, groups, macs))
    counted = sum(w.macs for w in weights)
    space = Space({g.name: g.channels for g in groups}, tuple(s.name for s in specs), fixed)
    others = sum(c.macs for c in calls.values()) / samples - counted
    return Predictor(space, {g.name: r for g, r in zip(groups, removals, strict=True)}, weights, _vectors(plan, groups), others)


def _inputs(model: nn.Module, batch: Any, run: Run) -> Any:
    """What the model is called with when a batch is run, whatever the caller's `forward` makes of it. Raises InputError."""
    seen: list[Any] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        both = args and kwargs
        seen.append(inspect.signature(module.forward).bind(*args, **kwargs).arguments if both else args or kwargs)

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        run(model, batch)
    handle.remove()
    if not seen:
        raise InputError("forward does not call the model that it is given, so that its channels cannot be followed")
    return seen[0]


def _weight(spec: WeightSpec, table: Any, groups: Sequence[ChannelGroup], macs: float) -> Weight:
    columns, taps = prod(spec.shape[1:]), prod(spec.shape[2:])
    channels, group_name, readers = np.full(spec.shape[0], -1), None, {}
    for group in groups:
        for part in group.sources:
            if part.key == spec.name:
                channels[part.start : part.start + group.channels * part.span] = np.repeat(np.arange(group.channels), part.span)
                group_name = group.name
        if group.removable:
            widths = [part.span * taps for part in group.readers if part.key == spec.name]
            if widths:
                readers[group.name] = sum(widths)
    return Weight(spec.name, columns, table, group_name, channels, readers, macs)


def _vectors(plan: Plan, groups: Sequence[ChannelGroup]) -> dict[str, float]:
    """Bytes of vectors, one a value: a channel of each group, and of all others together."""
    sizes = {s.name: prod(s.shape) for s in plan.specs if isinstance(s, VectorSpec)}
    for spec in plan.specs:
        if isinstance(spec, BatchNormSpec):
            sizes |= dict.fromkeys((spec.key("weight"), spec.key("bias")), spec.channels)
    own = {g.name: float(sum(s.span for s in g.sources if s.key in sizes)) for g in groups}
    taken = sum(own[g.name] * g.channels for g in groups)
    return {**own, "": sum(sizes.values()) - taken}
