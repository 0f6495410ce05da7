"""Rounding that lets gradients through, in units of a quantizer's step.

Forward it is the quantizer of the file, backward the identity: the straight-through estimator (Bengio et al., arXiv 1308.3432).
"""

from __future__ import annotations

import torch
from torch import Tensor


def through(hard: Tensor, soft: Tensor) -> Tensor:
    """The values of `hard` with the gradient of `soft`; the same shape."""
    return soft + (hard - soft).detach()


def symbols_of(scaled: Tensor, dead_zone: float = 0.5) -> Tensor:
    """Symbols, float (same shape), of values in steps: magnitude k from k − 1 + `dead_zone` on."""
    return torch.sign(scaled) * torch.floor((scaled.abs() + (1.0 - dead_zone)).clamp(min=0.0))


def rebuilt(symbols: Tensor, offsets: tuple[int, int]) -> Tensor:
    """What symbols stand for, in steps (FORMAT.md section 3): magnitudes 1, and above, by 1/64 steps nearer to zero."""
    size = symbols.abs()
    offset = torch.where(size > 1, offsets[1] / 64, offsets[0] / 64)
    return torch.sign(symbols) * (size - offset * (size > 0))
