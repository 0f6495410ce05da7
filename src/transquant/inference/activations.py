"""Inputs of layers as codes of a few bits, and as what those stand for: the float32 reference of integer layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transquant.errors import InputError
from transquant.records import Activation


def codes(x: Tensor, how: Activation) -> Tensor:
    """uint8 codes of x, in any float dtype: round(x / scale) + zero, clipped to 0 … 2^bits − 1; in float32, so that a value within
    rounding of the middle between two may take either."""
    return x.detach().float().mul(1 / how.scale).round_().add_(how.zero).clamp_(0, 2**how.bits - 1).to(torch.uint8)


def through_codes(x: Tensor, how: Activation) -> Tensor:
    """What the codes of x stand for, in its dtype. Gradients pass as if nothing had been done (straight through)."""
    near = (codes(x, how).float().sub_(how.zero).mul_(how.scale)).to(x.dtype)
    return x + (near - x).detach() if x.requires_grad and torch.is_grad_enabled() else near


@dataclass(frozen=True, slots=True)
class InputQuantizer:
    """A forward pre-hook that quantizes the first argument of a module."""

    how: Activation

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments with the first one quantized."""
        if not args or not isinstance(args[0], Tensor):
            got = type(args[0]).__name__ if args else "keywords alone"
            raise InputError(f"a {type(module).__name__} whose input is quantized was called with {got}, allowed is a tensor first")
        return (through_codes(args[0], self.how), *args[1:])


def quantize_input(module: nn.Module, how: Activation) -> None:
    """Let a module see quantized inputs only."""
    module.register_forward_pre_hook(InputQuantizer(how))


def release_inputs(model: nn.Module) -> None:
    """Undo `quantize_input` for all modules of a model."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, InputQuantizer):
                del module._forward_pre_hooks[key]
