"""How much errors in feature maps matter at the network's output, and what the maps are: moments over calibration samples.

One backward pass of a random direction of the output (stats/metric.py) gives the gradients at all points: E of their products,
times the metric's unit, is half the second derivative of the KL divergence, or the mean squared error's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from transquant.errors import InputError
from transquant.features.maps import to_maps
from transquant.features.points import replacing
from transquant.features.records import Point, Sensitivity
from transquant.stats.metric import direction, resolve, unit

Run = Callable[[nn.Module, Any], Tensor]


class _Sums:
    """Of one point: of gradients and of values, and the pixels and samples that they are of."""

    def __init__(self, channels: int) -> None:
        self.gradients = torch.zeros(channels, channels, dtype=torch.float64)
        self.neighbours = torch.zeros(channels, 5, 5, dtype=torch.float64)
        self.values, self.products = torch.zeros(channels, dtype=torch.float64), torch.zeros_like(self.gradients)
        self.pixels = 0

    def add(self, gradient: Tensor, values: Tensor, factor: float) -> None:
        """Both (N, C, H, W)."""
        num, channels, height, width = values.shape
        flat = gradient.transpose(0, 1).reshape(channels, -1)
        self.gradients += (flat @ flat.T).double() * factor
        padded = nn.functional.pad(gradient, (1, 1, 0, 1))
        around = [padded[:, :, dy : dy + height, dx : dx + width] for dy, dx in ((0, 1), (0, 2), (1, 1), (1, 2), (1, 0))]
        stacked = torch.stack(around, 2).transpose(0, 1).transpose(1, 2).reshape(channels, 5, -1)
        self.neighbours += (stacked @ stacked.transpose(1, 2)).double() * factor
        flat = values.transpose(0, 1).reshape(channels, -1).double()
        self.values += flat.sum(1)
        self.products += flat @ flat.T
        self.pixels += num * height * width

    def sensitivity(self) -> Sensitivity:
        mean = self.values / self.pixels
        covariance = self.products / self.pixels - mean[:, None] * mean
        gradients, neighbours = (s / self.pixels for s in (self.gradients, self.neighbours))
        return Sensitivity(*(np.ascontiguousarray(t.numpy()) for t in (gradients, neighbours, mean, covariance)))


def collect(
    model: nn.Module, batches: Sequence[Any], run: Run, metric: str, seed: int, progress: Callable[[int, int], None]
) -> dict[Point, Sensitivity]:
    """By point, in execution order; points that no gradient reaches are left out. Raises InputError where there is none."""
    sums: dict[Point, _Sums] = {}
    for index, batch in enumerate(batches):
        generator = torch.Generator().manual_seed((seed << 20) + index)
        leaves: dict[Point, tuple[Tensor, Tensor]] = {}

        def replace(point: Point, tensor: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
            result = activation(tensor)
            own = result.view_as(result) if result.requires_grad else result.detach().requires_grad_()
            values = tensor if point.clips else result  # a copy: an activation in place goes on to change what it was given
            leaves[point] = own, values.detach().clone()  # noqa: B023
            return own

        with torch.enable_grad(), replacing(model, replace):
            output = run(model, batch)
            if not leaves:
                raise InputError("the network calls no activation function that is known, so it has no feature maps to code")
            metric = resolve(metric, output)
            if not output.requires_grad:
                raise InputError("the network's output does not depend on its feature maps in a way that has gradients")
            tensors = [own for own, _ in leaves.values()]
            gradients = torch.autograd.grad(direction(output, metric, generator), tensors, allow_unused=True)
        factor = unit(output, metric)
        for (point, (_, values)), gradient in zip(leaves.items(), gradients, strict=True):
            if gradient is None:
                continue
            gradient, values = (torch.from_numpy(to_maps(t, point.axis)[0]) for t in (gradient, values))
            sums.setdefault(point, _Sums(point.channels)).add(gradient, values, factor)
        progress(index + 1, len(batches))
    if not sums:
        raise InputError("no gradient of the output reaches any of the network's feature maps")
    return {point: own.sensitivity() for point, own in sums.items()}
