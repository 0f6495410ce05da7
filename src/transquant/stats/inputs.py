"""What the values of a layer's input are, and how much each matters: histograms weighted with squared gradients.

An error e of the input x costs, to second order and where errors of different values are not correlated,

    D = unit · E Σ g² e²        g: gradient of the output's direction (metric.py) in the layer's input, through this layer alone

so Σ g² by value of x tells what any quantizer of x costs. Bins have a width of a power of two and begin at a multiple of it: wider
ones are sums of narrower ones, whatever was seen first. First and second moments are kept a bin, so that errors within a step
are exact but for the bins that a step's border cuts.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import frexp
from typing import Any

import torch
from torch import Tensor, nn

from transquant.records import InputStats, Use, WeightSpec

HALF = 4096  # bins on either side of zero
LEAST = -126  # exponent of the width
FIRST_INPUT = {"recurrent": ("weight_ih_l0",), "recurrent_cell": ("weight_ih",)}  # of the weights that meet a module's own input
KINDS = (
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "conv1d_hf",
    *FIRST_INPUT,
)  # fmt: skip


def takes_input(kind: str, attribute: str) -> bool:
    """Whether a module of that kind multiplies its first argument with that weight, as it is."""
    return kind in KINDS and attribute in FIRST_INPUT.get(kind, ("weight",))


def input_uses(spec: WeightSpec) -> list[Use]:
    """Where a weight meets inputs that can be quantized."""
    uses = [Use(spec.module or "", spec.kind, spec.attribute), *spec.tied]
    return [use for use in uses if takes_input(use.kind, use.attribute)]


class InputSums:
    """A histogram, of one micro-batch or added up: `sums` float64 (3, 2·HALF) of h, h·x and h·x² in bins of width 2^exponent."""

    def __init__(self, sums: Tensor, exponent: int, low: float, high: float, values: float) -> None:
        self.sums, self.exponent, self.low, self.high, self.values = sums, exponent, low, high, values

    @classmethod
    def of(cls, x: Tensor, gradient: Tensor) -> InputSums:
        """The histogram of values x, not empty, with their gradients."""
        x, squares = x.reshape(-1).double(), gradient.reshape(-1).double().square()
        low, high = float(x.min()), float(x.max())
        largest = max(-low, high)
        exponent = max(frexp(largest)[1] - HALF.bit_length() + 1, LEAST) if largest > 0 else LEAST
        bins = (x * 2.0**-exponent).floor_().long().add_(HALF).clamp_(0, 2 * HALF - 1)
        each = [torch.bincount(bins, h, 2 * HALF) for h in (squares, squares * x, squares * x * x)]
        return cls(torch.stack(each), exponent, low, high, float(x.numel()))

    def clone(self) -> InputSums:
        """A copy with sums of its own."""
        return InputSums(self.sums.clone(), self.exponent, self.low, self.high, self.values)

    def __iadd__(self, other: InputSums) -> InputSums:
        exponent = max(self.exponent, other.exponent)
        self.sums = _coarser(self.sums, exponent - self.exponent) + _coarser(other.sums, exponent - other.exponent)
        self.exponent, self.values = exponent, self.values + other.values
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        return self

    def stats(self, samples: int, unit: float) -> InputStats:
        """In units of the metric, a sample."""
        sums = (self.sums * (unit / samples)).numpy()
        return InputStats(sums, self.exponent, self.low, self.high, self.values / samples)


def _coarser(sums: Tensor, octaves: int) -> Tensor:
    """The same histogram in bins 2^octaves times as wide."""
    if octaves == 0:
        return sums
    width = 2 ** min(octaves, HALF.bit_length() - 1)  # from there on all is in the two bins beside zero
    folded = sums.reshape(3, -1, width).sum(2)
    result = torch.zeros_like(sums)
    start = HALF - folded.shape[1] // 2
    result[:, start : start + folded.shape[1]] = folded
    return result


class InputRecorder:
    """Fills a histogram from the modules in which a weight meets inputs."""

    def __init__(self, name: str, modules: Sequence[nn.Module]) -> None:
        self.name, self.modules = name, modules
        self.sums: InputSums | None = None

    def attach(self) -> list[Any]:
        """Record until the handles are removed."""
        self.sums = None
        return [m.register_forward_pre_hook(self._before, with_kwargs=True) for m in self.modules]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point() or not torch.is_grad_enabled():
            return None
        x = args[0]
        # a view of its own: what reaches x from other layers is no part of this one's gradient
        seen = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        values = x.detach()
        seen.register_hook(lambda gradient: self._add(values, gradient.detach()))  # type: ignore[no-untyped-call]
        return (seen, *args[1:]), kwargs

    def _add(self, x: Tensor, gradient: Tensor) -> None:
        if x.numel() == 0:
            return
        new = InputSums.of(x.cpu(), gradient.cpu())
        if self.sums is None:
            self.sums = new
        else:
            self.sums += new
