"""Decoded weights back into a module: strictly, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from transquant.errors import InputError
from transquant.modules.kinds import refuse_soft

M = TypeVar("M", bound=nn.Module)


def install(model: M, state: Mapping[str, Tensor]) -> M:
    """Load a state dict strictly and return the model; mode, device and dtype stay. A model on the meta device takes the tensors
    themselves.

    Raises InputError, before anything is changed, where keys or shapes differ."""
    check(model, state)
    return load(model, state)


def check(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises InputError where keys or shapes are not the model's."""
    refuse_soft(model)
    own = model.state_dict()
    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or extra or wrong:
        parts = [
            f"{label} {_some(names)}"
            for label, names in (("missing", missing), ("unexpected", extra), ("of another shape", wrong))
            if names
        ]
        raise InputError(f"the weights do not fit the model: {'; '.join(parts)}")


def load(model: M, state: Mapping[str, Tensor]) -> M:
    """Load those tensors of a model that are in a state dict, which fits."""
    with torch.no_grad():
        model.load_state_dict(dict(state), strict=False, assign=any(t.is_meta for t in model.state_dict().values()))
    return model


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
