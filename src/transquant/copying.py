"""Copies of a module, whatever computes its weights."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

from transquant.errors import InputError

M = TypeVar("M", bound=nn.Module)


def deep_copy(model: M) -> M:
    """A deep copy, in the same mode. Raises InputError where it cannot be copied."""
    # what hooks compute before each call (weight norm before there were parametrizations) has a history, which deepcopy refuses
    computed = {
        id(t): t.detach().clone() for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf
    }
    try:
        return copy.deepcopy(model, computed)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"the model cannot be copied ({reason}); transquant works on a copy, never on your model") from error
