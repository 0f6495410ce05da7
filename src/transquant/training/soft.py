"""What a weight is while it learns: a parametrization whose parameters are in units of the quantizer's steps.

    parameter, in steps ─ soft quantizer ─ × step (─ basis) ─ weight of the layer
                        └ code ─ symbols, as the file has them

In steps all weights of a network are equally sensitive, since the steps of the template are where one more step costs the same
everywhere; so one learning rate fits them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from transquant.entropy.tables import MAX_SYMBOL
from transquant.errors import InputError
from transquant.grid import steps, tensor_index
from transquant.records import CodedTensor, IntArray
from transquant.training.code_length import CodeLengths

if TYPE_CHECKING:
    from transquant.training.network import SoftNetwork

DIVERGED = "the training has diverged; a smaller rate or clipped gradients may help"


class SoftWeight(nn.Module, ABC):
    """One weight's soft quantizer. Subclasses say how it is quantized, softly and for good.

    `tensor`: the weight in the template, (O, n); `step`: the file's global step. `owner`: the network it belongs to."""

    owner: SoftNetwork
    soft_weight = True  # by which other rooms know a prepared model
    follows = False  # whether `rescale` can follow the file's global step
    rates: tuple[float | None, ...] = (None, None)  # Adam's, of each parameter; None: that of weights
    fixed: Tensor | None  # symbols (O, n), float, once they are settled
    unit: Tensor  # (O, n) or what broadcasts to it: what 1 of the parameter is in the weight (in its coefficients)

    def __init__(self, tensor: CodedTensor, step: tuple[int, int]) -> None:
        super().__init__()
        self.tensor, self.name, self.shape = tensor, tensor.entry.name, tensor.entry.shape
        self.register_buffer("fixed", None)
        self.register_buffer("unit", torch.from_numpy(step_sizes(tensor, step)).float(), persistent=False)

    def __call__(self, *originals: Tensor) -> Tensor:
        """The weight, in its own precision under autocast too: it is what the file will hold, whatever its layer computes in."""
        with torch.autocast(originals[0].device.type, enabled=False):
            weight: Tensor = super().__call__(*originals)
        return weight

    @abstractmethod
    def forward(self, *originals: Tensor) -> Tensor:
        """The weight as the layer uses it, in its shape."""

    @abstractmethod
    def bits(self, lengths: CodeLengths, *originals: Tensor) -> Tensor:
        """Estimated bits of the weight, a scalar with gradients."""

    @abstractmethod
    def code(self, shift: float, *originals: Tensor) -> CodedTensor:
        """The weight as the file has it; a larger `shift` makes it smaller."""

    def loss(self, progress: float, *originals: Tensor) -> Tensor | None:
        """What the method adds to the loss but bits, at a share of the training; None for nothing."""
        return None

    def hold(self, share: float, *originals: Tensor) -> None:
        """From now on this share of the symbols stays, at least: drawn once, at random, and more of them with a larger share."""
        return

    @abstractmethod
    def settle(self, shift: float, *originals: Tensor) -> None:
        """From now on the weight is what `code(shift)` says."""

    def rescale(self, step: tuple[int, int], *originals: Tensor) -> None:
        """The file has another global step: the parameter becomes what it was in the new steps."""
        before = self.unit
        self.unit = torch.from_numpy(step_sizes(self.tensor, step)).to(before)
        with torch.no_grad():
            originals[0].copy_((self.matrix(originals[0]) * (before / self.unit)).reshape(self.shape))

    def generator(self, what: object = None) -> torch.Generator:
        """For noise: the same in all forward passes of a step (None), or for a purpose in all steps; and in all processes."""
        when = self.owner.step if what is None else what
        return torch.Generator().manual_seed(crc32(f"{self.name} {self.owner.seed} {when}".encode()))

    def matrix(self, original: Tensor) -> Tensor:
        """A tensor of the weight's shape as (O, n)."""
        return original.reshape(self.tensor.symbols.shape)


def step_sizes(tensor: CodedTensor, step: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Steps float64 of a coded matrix, broadcastable to (O, n)."""
    return steps(step, tensor_index(tensor))


def integers(symbols: Tensor) -> IntArray:
    """Float symbols as int32. Raises InputError where no file has them: coders take their size on trust."""
    if symbols.numel() and not float(symbols.detach().abs().max()) <= MAX_SYMBOL:  # not so of NaN either
        raise InputError(f"a weight is no number or more than {MAX_SYMBOL} steps large: {DIVERGED}")
    found: IntArray = symbols.detach().float().cpu().numpy().astype(np.int32)
    return found
