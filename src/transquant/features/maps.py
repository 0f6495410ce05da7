"""Tensors of a network as maps of one sample each, and back."""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from torch import Tensor

from transquant.features.records import FloatMap

Lengths = tuple[int, ...]
"""Of all axes of a tensor but samples and channels: () of vectors, (T,) of sequences, (H, W) of images."""


def pixels(lengths: Lengths) -> tuple[int, int]:
    """(height, width) of the map of such a tensor."""
    return prod(lengths[:-1]), lengths[-1] if lengths else 1


def to_maps(tensor: Tensor, axis: int) -> tuple[FloatMap, Lengths]:
    """A floating tensor, samples first and channels along `axis` → float32 (N, C, H, W), lengths of its other axes."""
    moved = tensor.detach().movedim(axis, 1).to("cpu", torch.float32)
    lengths = tuple(moved.shape[2:])
    return np.ascontiguousarray(moved.reshape(*moved.shape[:2], *pixels(lengths)).numpy()), lengths


def from_maps(maps: FloatMap, lengths: Lengths, axis: int) -> Tensor:
    """float32 (N, C, H, W) → the tensor that it was, float32, on the CPU."""
    return torch.from_numpy(maps).reshape(*maps.shape[:2], *lengths).movedim(1, axis).contiguous()
