"""Copies of the model for calibration and measuring: the model itself is never touched."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from transquant.errors import InputError

HALF = (torch.float16, torch.bfloat16)


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode whose floating parameters take gradients. Raises InputError where it cannot be copied."""
    # what hooks compute before each call (weight norm before there were parametrizations) has a history, which deepcopy refuses
    computed = {
        id(t): t.detach().clone() for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf
    }
    try:
        twin = copy.deepcopy(model, computed)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"the model cannot be copied ({reason}); transquant works on a copy, never on your model") from error
    twin.eval()
    for parameter in twin.parameters():
        parameter.grad = None
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return twin


def wide_copy(model: nn.Module) -> nn.Module:
    """A copy as above in float32 where the model is in half precision: there, neither gradients nor small differences of
    outputs can be trusted."""
    twin = copy_model(model)
    return twin.float() if any(p.dtype in HALF for p in twin.parameters()) else twin
