"""What kept columns can do in place of removed ones: least squares on the inputs that calibration saw.

With inputs x = (x_K, x_R), kept and removed, E‖W x − (W_K + Δ) x_K − b′‖² is least for

    Δ = W_R C_RK (C_KK + δ I)⁻¹      b′ = W m − (W_K + Δ) m_K

where C is the covariance and m the mean of x, if the layer has a bias, or a BatchNorm behind it that takes b′; else C is the second
moment, and there is no b′.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from transquant.copying import deep_copy
from transquant.pruning.groups import ChannelGroup, Kept, indices, kept_of
from transquant.records import FloatArray, LayerStats, Statistics

M = TypeVar("M", bound=nn.Module)
DAMPING = 1e-3  # of the mean diagonal: directions that the samples hardly know are left alone


def compensated(model: M, groups: Iterable[ChannelGroup], kept: Kept, statistics: Statistics) -> M:
    """A copy of a model, of the same shapes, in which columns of kept channels have taken over what those of the others did, as
    far as linear regression on the calibration samples goes, and biases (or the means of BatchNorms) the rest: `masked` or
    `removed` then takes the others away. `kept` as of `masked`; `statistics` of the same model, with input moments of layers
    whose columns meet inputs (convolutions and linear layers); other readers stay as they are. Moments are those of the network as
    it was, cross-validated ones where there are fewer samples than columns. Raises InputError as `masked` does."""
    twin = deep_copy(model)
    gone: dict[str, list[int]] = {}
    for group, channels in kept_of(groups, kept):
        rest = sorted(set(range(group.channels)) - set(channels))
        for part in group.readers:
            if part.axis == 1 and part.key in statistics.layers:
                gone.setdefault(part.key, []).extend(indices(part, rest).tolist())
    with torch.no_grad():
        for key, inputs in gone.items():
            _take_over(twin, key, inputs, statistics.layers[key], statistics.absorbers.get(key))
    return twin


def _take_over(model: nn.Module, key: str, inputs: list[int], stats: LayerStats, absorber: str | None) -> None:
    """Change one layer's kept columns, and its bias or what absorbs it, in place."""
    state = model.state_dict(keep_vars=True)
    weight, bias = state[key], state.get(f"{key.removesuffix('weight')}bias")
    taps = weight[0, 0].numel()
    matrix = weight.double().cpu().numpy().reshape(len(weight), -1)
    removed = np.zeros(matrix.shape[1], bool)
    removed[(np.array(inputs)[:, None] * taps + np.arange(taps)).reshape(-1)] = True
    norm = None if absorber is None else state[f"{absorber}.running_mean"]
    mean = stats.input_mean[0] if stats.input_mean is not None and (bias is not None or norm is not None) else None
    result = matrix.copy()
    for start, moment in _blocks(stats.input_moment[0]):
        own = slice(start, start + len(moment))
        if mean is not None:
            moment = moment - np.outer(mean[own], mean[own])
        result[:, own] += _regression(matrix[:, own], moment, removed[own])
    result[:, removed] = 0
    weight.copy_(torch.from_numpy(result.reshape(weight.shape)))
    if mean is not None:
        moved = torch.from_numpy((matrix - result) @ mean)
        if bias is not None:
            _add(bias, moved)
        elif norm is not None:
            _add(norm, -moved)


def _blocks(moment: FloatArray) -> Iterable[tuple[int, FloatArray]]:
    """First column and moment of each diagonal block; none where only the diagonal is known, from which nothing follows."""
    if moment.ndim == 1:
        return []
    blocks = moment if moment.ndim == 3 else moment[None]
    return [(k * len(block), block) for k, block in enumerate(blocks)]


def _regression(matrix: FloatArray, moment: FloatArray, removed: np.ndarray) -> FloatArray:
    """What kept columns take over, zero in removed ones: (o, n)."""
    kept = ~removed
    result = np.zeros_like(matrix)
    level = float(np.trace(moment)) / len(moment)
    if level > 0 and removed.any() and kept.any():
        inner = moment[np.ix_(kept, kept)] + DAMPING * level * np.eye(int(kept.sum()))
        right = moment[np.ix_(kept, removed)] @ matrix[:, removed].T
        result[:, kept] = np.linalg.solve(inner, right).T
    return result


def _add(vector: Tensor, other: Tensor) -> None:
    vector.add_(other.to(vector))
