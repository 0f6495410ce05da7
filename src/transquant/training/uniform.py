"""Uniform quantizers of a fixed depth: plain quantization-aware training, and LSQ (Esser et al., arXiv 1902.08153).

    plain   step of least squared error, estimated anew now and then     symbols −(2^(b−1) − 1) … 2^(b−1) − 1
    LSQ     step learned                                                 symbols −2^(b−1) … 2^(b−1) − 1

Depth 1 has the two symbols −1 and 1. Forward the weight is rounded and saturates, backward it is not rounded; a weight beyond the
outermost level has no gradient (plain: more than a step beyond).
"""

from __future__ import annotations

import torch
from torch import Tensor

from transquant.records import CodedTensor
from transquant.training.code_length import CodeLengths
from transquant.training.rounding import through
from transquant.training.scaled import ScaledWeight, best_scale

KEPT_DEPTH = 8


class UniformWeight(ScaledWeight):
    """`depth`: bits of a symbol, 1 to 8. `learned`: the step is LSQ's."""

    def __init__(self, tensor: CodedTensor, step: tuple[int, int], depth: int = KEPT_DEPTH, learned: bool = False) -> None:
        half = 1 << (depth - 1)
        high = max(half - 1, 1)
        super().__init__(tensor, step, -half if learned else -high, high)
        self.binary, self.learned = depth == 1, learned
        self.damping = (tensor.symbols.size * high) ** -0.5  # of the step's gradient

    def first_scale(self, weight: Tensor) -> Tensor:
        """LSQ: 2·mean |w| / √high; else the one of least error."""
        if self.learned:
            mean: Tensor = weight.abs().mean()
            return 2 * mean / float(self.high**0.5)
        return best_scale(weight, self.symbols, self.high)

    def soft(self, weight: Tensor, a: Tensor) -> Tensor:
        """Rounded; LSQ's step has the gradient of Σ (k − r) inside and Σ k outside of the range, times 1 / √(n · high)."""
        if not self.learned:
            scale = self.scale(a).detach()
            relative = (weight / scale).clamp(self.low - 1, self.high + 1)
            return through(self.symbols(relative), relative) * scale
        scale = self.scale(a)
        scale = through(scale, scale * self.damping)
        relative = (weight / scale).clamp(self.low, self.high)
        return through(self.symbols(relative), relative) * scale

    def symbols(self, relative: Tensor) -> Tensor:
        """Rounded to nearest, and saturated."""
        if self.binary:
            return torch.where(relative < 0, -torch.ones_like(relative), 1.0)
        return relative.round().clamp(self.low, self.high)

    def bits(self, lengths: CodeLengths, *originals: Tensor) -> Tensor:
        """None that training could save: the depth is given."""
        return originals[0].new_zeros(())

    def loss(self, progress: float, *originals: Tensor) -> Tensor | None:
        """Nothing; a step that is not learned follows the weights."""
        if not self.learned:
            self.refresh(*originals)
        return None
