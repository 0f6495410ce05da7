"""Cluster regularization (CRQ; Hu et al., arXiv 1902.10370), reconstructed from the abstract: all else here is our design.

A term of the loss draws each weight to the nearest of −α, 0, α, little at first and more and more until symbols settle:

    λ(t) · mean over the layer's weights of (r − k)²        r = w / α, k the nearest symbol, α the layer's least-squares one

λ grows exponentially, RAMP-fold. The layer sees its float weights at first, then the centres they are drawn to, with
straight-through gradients. The price of a bit widens the cluster of zero.
"""

from __future__ import annotations

from math import exp

import torch
from torch import Tensor

from transquant.records import CodedTensor
from transquant.training.code_length import CodeLengths
from transquant.training.rounding import symbols_of, through
from transquant.training.scaled import ScaledWeight, best_scale

MARGIN = 0.17  # of the bin of zero, where a bit costs what it does at first
FULL = -0.45  # shift at which there are as few zeros as there may be
RAMP = 1e4  # of λ, from the first step until symbols settle
STRENGTH = 0.3  # λ at the end, units of the loss
HARD = 0.4  # share of the training
THRESHOLD = 0.7  # of the mean magnitude, of ternary weight networks (Li et al., arXiv 1605.04711)


class ClusteredWeight(ScaledWeight):
    """`levels`, odd from 3: how many centres; `strength`: λ at the end, units of the loss; `hard`: the share of the training from
    which on the layer sees centres."""

    def __init__(
        self, tensor: CodedTensor, step: tuple[int, int], levels: int = 3, strength: float = STRENGTH, hard: float = HARD
    ) -> None:
        super().__init__(tensor, step, -(levels // 2), levels // 2)
        self.strength, self.hard = strength, hard

    def first_scale(self, weight: Tensor) -> Tensor:
        """Of three levels the mean of the magnitudes above 0.7 of their mean, of more the one of least error."""
        if self.high > 1:
            return best_scale(weight, self.symbols, self.high)
        size = weight.abs()
        return size[size >= THRESHOLD * size.mean()].mean()

    def soft(self, weight: Tensor, a: Tensor) -> Tensor:
        """In training first the float weight, then its cluster's centre with the gradient of the weight; the centre else."""
        if self.training and ("owner" not in self.__dict__ or self.owner.progress < self.hard):
            return weight
        scale = self.scale(a).detach()
        return through(self.decided(weight, scale) * scale, weight)

    def symbols(self, relative: Tensor) -> Tensor:
        """Of the nearest centre."""
        return symbols_of(relative).clamp(self.low, self.high)

    def decided(self, weight: Tensor, scale: Tensor, shift: float = 0.0) -> Tensor:
        """Of the centre nearest in units of its bits' price and its distance: the bin of zero is wider by `margin` + `shift`."""
        relative = weight / scale
        border = 0.5 + self.margin(scale) + max(shift, 0.0)
        if shift < 0:
            border = border * self._narrowed(relative.abs() / border, shift)
        return torch.where(relative.abs() < border, 0.0, torch.sign(relative) * symbols_of(relative.abs()).clamp(1, self.high))

    def _narrowed(self, size: Tensor, shift: float) -> Tensor:
        """What the border of zero is multiplied by at a shift below 0, where `size` (O, n) is zero below 1. By rank, as what has
        gathered is all in one place; at most until all symbols are as frequent: with fewer zeros files become smaller again."""
        least = 1 / (self.high - self.low + 1)
        share = float((size < 1).double().mean())
        if share <= least:
            return torch.ones_like(size[:1, :1])
        wanted = share - (share - least) * min(shift / FULL, 1.0)
        return size.flatten().kthvalue(max(round(wanted * size.numel()), 1)).values

    def reduced(self, weight: Tensor, shift: float) -> Tensor:
        """Settled symbols, those of the smallest weights zero: up to `shift` mean magnitudes above the smallest of all."""
        assert self.fixed is not None
        size = weight.abs()[self.fixed != 0]
        if shift <= 0 or not size.numel():
            return self.fixed
        return torch.where(weight.abs() < size.min() + shift * size.mean(), 0.0, self.fixed)

    def margin(self, scale: Tensor) -> Tensor:
        """By how many α the bin of zero is wider, broadcastable to (O, n)."""
        owner = self.__dict__.get("owner")  # there is none while a network is being prepared
        if owner is None or owner.target is None:
            return torch.zeros_like(scale)
        return (MARGIN * exp(owner.price.memory) * (self.unit / scale).square()).clamp(max=0.5)

    def bits(self, lengths: CodeLengths, *originals: Tensor) -> Tensor:
        """None: what a bit costs moves the borders between clusters instead, so that centres stay where they are."""
        return originals[0].new_zeros(())

    def loss(self, progress: float, *originals: Tensor) -> Tensor | None:
        """λ times the mean squared distance from the nearest centres, in units of α²."""
        if self.fixed is not None:
            return None
        self.refresh(*originals)
        return self.weight_of(progress) * self.distance(*originals)

    def distance(self, *originals: Tensor) -> Tensor:
        """Mean squared distance, a scalar in units of α²."""
        weight, scale = self.values(originals[0]), self.scale(originals[1].detach())
        return (weight / scale - self.decided(weight.detach(), scale)).square().mean()

    def weight_of(self, progress: float) -> float:
        """λ at a share of the training; where its length is not known, half-way up the ramp, logarithmically, all the time."""
        schedule = self.owner.schedule
        share = min(progress / schedule.settled, 1.0) if schedule.steps and schedule.settled else 0.5
        return float(self.strength * RAMP ** (share - 1))
