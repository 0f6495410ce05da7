"""Leaves the caller's world as it was, also after an error: random states and the model's training flags."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def unchanged(model: nn.Module | None) -> Iterator[None]:
    """Restore the random states of torch, numpy and Python, each module's training flag, and which gradients there are.

    Weights and hooks need no care here: work is done on copies. (A `forward` that is a closure over the original reaches
    its gradients even so.)"""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    modes = [] if model is None else [(m, m.training) for m in model.modules()]
    gradients = [] if model is None else [(p, p.grad) for p in model.parameters()]
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
        for module, training in modes:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient
