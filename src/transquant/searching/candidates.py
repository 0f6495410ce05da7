"""In which order a group's channels go, and what that costs: removal with least-squares compensation in the layers that read them.

    D = tr(G E A Eᵀ) of each reader. Removing the columns b and letting the others make up for them, W ← W − W_b H_bb⁻¹ H_b with
    H = A⁻¹, costs tr(G W_b H_bb⁻¹ W_bᵀ); what is left has H ← H − H_·b H_bb⁻¹ H_b·.

That is the optimal brain surgeon (Hassibi and Stork 1993) with a channel's columns as the block. The costs of one removal after the
other sum up to that of removing them all at once, so one walk gives the cost of every number of channels, and each set is part of
the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from transquant.channels import Slice
from transquant.pruning import ChannelGroup
from transquant.quantizers.metric import regularise
from transquant.records import FloatArray, LayerStats

STEPS = 64  # walks remove 1/64 of the channels at a time, where there are more
DAMPING = 1e-3  # of the input moments' mean diagonal, as compensation has it
LARGEST = 8192  # columns; above, or where moments are diagonal, channels do not make up for each other
CRITERIA = ("sensitivity", "norm")

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Removal:
    """`order`: channels int64 (C,), the first to go first; `costs`: float64 (C,), predicted distortion without the first k."""

    order: Indices
    costs: FloatArray

    def kept(self, removed: int) -> Indices:
        """What is left of the channels without the first `removed`, in ascending order."""
        return np.sort(self.order[removed:])


def removal(
    group: ChannelGroup, criterion: str, values: Mapping[str, FloatArray], shapes: Mapping[str, tuple[int, ...]],
    layers: Mapping[str, LayerStats],
) -> Removal:  # fmt: skip
    """The order of a group's channels by a criterion, "sensitivity" (each time what costs least) or "norm" (L1 of the rows that
    compute them), and what it costs. `values`: weights float64 (O, n)."""
    readers: list[_Reader | _Zeroed] = [
        _Reader(s, group.channels, values[s.key], shapes[s.key], layers[s.key]) for s in group.readers if s.key in layers
    ]
    if not group.removable:
        readers = [_Zeroed(s, group.channels, values[s.key], layers[s.key]) for s in group.sources if s.key in layers]
    left = np.argsort(_norms(group, values), kind="stable")
    stride, costs, order = max(1, group.channels // STEPS), [0.0], list[int]()
    while len(left) > 1:
        count = min(stride, len(left) - 1)
        each = sum((reader.costs(left) for reader in readers), np.zeros(len(left)))
        if criterion == "sensitivity":
            ranks = np.argsort(each, kind="stable")
            left, each = left[ranks], each[ranks]
        gone, left = left[:count], left[count:]
        total = sum(reader.remove(gone) for reader in readers)
        shares = np.cumsum(each[:count]) / max(float(each[:count].sum()), 1e-300)
        costs += (costs[-1] + max(total, 0.0) * shares).tolist()
        order += gone.tolist()
    return Removal(np.array([*order, *left.tolist()]), np.array(costs))


class _Reader:
    """Columns of one weight that read a group, while channels go: H = A⁻¹ and M = Wᵀ G W of what is left."""

    def __init__(self, part: Slice, channels: int, weight: FloatArray, shape: Sequence[int], stats: LayerStats) -> None:
        a, g = stats.input_moment[0], stats.output_moment[0]
        width = part.span * prod(shape[2:])
        self.columns = part.start * prod(shape[2:]) + np.arange(channels * width).reshape(channels, width)
        self.inverse: FloatArray | None = None
        if a.ndim > 1 and weight.shape[1] <= LARGEST and a.any():
            self.inverse = np.asarray(np.linalg.inv(_dense(regularise(a, DAMPING))), np.float64)
            self.energy = weight.T @ (g[:, None] * weight if g.ndim == 1 else g @ weight)
            return
        diagonal = a if a.ndim == 1 else np.einsum("...ii->...i", a).reshape(-1)
        output = g if g.ndim == 1 else np.diagonal(g)
        self.alone = (diagonal * (output[:, None] * weight**2).sum(0))[self.columns].sum(1)

    def costs(self, channels: Indices) -> FloatArray:
        """Of removing each channel alone, float64 (k,)."""
        if self.inverse is None:
            return np.asarray(self.alone[channels])
        columns = self.columns[channels]
        block = columns[:, :, None], columns[:, None, :]
        costs: FloatArray = np.einsum("kii->k", np.linalg.solve(self.inverse[block], self.energy[block]))
        return costs

    def remove(self, channels: Indices) -> float:
        """Remove channels together; what that costs."""
        if self.inverse is None:
            return float(self.alone[channels].sum())
        gone = self.columns[channels].reshape(-1)
        own = np.ix_(gone, gone)
        change = np.linalg.solve(self.inverse[own], self.inverse[gone])
        cost = float(np.trace(np.linalg.solve(self.inverse[own], self.energy[own])))
        cross = change.T @ self.energy[gone]
        self.energy += change.T @ self.energy[own] @ change - cross - cross.T
        self.inverse -= self.inverse[:, gone] @ change
        return cost


class _Zeroed:
    """Rows that are made zero, and nobody knows who reads them: nothing can make up for them."""

    def __init__(self, part: Slice, channels: int, weight: FloatArray, stats: LayerStats) -> None:
        energies = []
        for a, g, rows in zip(stats.input_moment, stats.output_moment, np.split(weight, len(stats.input_moment)), strict=True):
            moved = rows * a if a.ndim == 1 else rows @ _dense(a)
            energies.append((g if g.ndim == 1 else np.diagonal(g)) * (moved * rows).sum(1))
        own = np.concatenate(energies)[part.start : part.start + channels * part.span]
        self.alone: FloatArray = own.reshape(channels, part.span).sum(1)

    def costs(self, channels: Indices) -> FloatArray:
        """Of removing each channel alone, float64 (k,)."""
        return self.alone[channels]

    def remove(self, channels: Indices) -> float:
        """Remove channels together; what that costs."""
        return float(self.alone[channels].sum())


def _norms(group: ChannelGroup, values: Mapping[str, FloatArray]) -> FloatArray:
    """L1 of the rows of the first weight that computes the channels, float64 (C,)."""
    part = next((s for s in group.sources if s.key in values and s.axis == 0 and values[s.key].ndim == 2), None)
    if part is None:
        return np.zeros(group.channels)
    rows = np.abs(values[part.key][part.start : part.start + group.channels * part.span]).sum(1)
    norms: FloatArray = rows.reshape(group.channels, part.span).sum(1)
    return norms


def _dense(moment: FloatArray) -> FloatArray:
    """A moment (n, n), of (n, n) or diagonal blocks (b, m, m)."""
    if moment.ndim == 2:
        return moment
    blocks, side = moment.shape[:2]
    whole = np.zeros((blocks, side, blocks, side))
    whole[np.arange(blocks), :, np.arange(blocks)] = moment
    return whole.reshape(blocks * side, -1)
