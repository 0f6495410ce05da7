"""Copies of the model for calibration and measuring: the model itself is never touched."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from queue import SimpleQueue

import torch
from torch import Tensor, nn

from transquant.copying import deep_copy

HALF = (torch.float16, torch.bfloat16)


class Copies:
    """Copies of a model for as many threads, each used by one at a time, whose weights can be changed and changed back."""

    def __init__(self, model: nn.Module, count: int) -> None:
        self._models = [wide_copy(model) for _ in range(count)]
        self._idle: SimpleQueue[nn.Module] = SimpleQueue()
        for twin in self._models:
            self._idle.put(twin)
        self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}

    def load(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take other weights, rounded to the model's dtypes as they will be used; keys that are left out are the model's. Returns
        what was taken."""
        decoded = rounded(state, self.state)
        for twin in self._models:
            twin.load_state_dict({**self.state, **decoded}, strict=False)
        return decoded

    def learners(self, keys: Collection[str]) -> list[str]:
        """Those of the keys that are parameters; from now on these alone take gradients."""
        for twin in self._models:
            parameters = dict(twin.named_parameters(remove_duplicate=False))
            names = [key for key in parameters if key in keys]
            for parameter in parameters.values():
                parameter.requires_grad_(False)
            for name in names:
                parameters[name].requires_grad_(True)
        return names

    @contextmanager
    def one(self) -> Iterator[nn.Module]:
        """A copy that no other thread uses now."""
        twin = self._idle.get()
        try:
            yield twin
        finally:
            self._idle.put(twin)


def rounded(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in half precision where those of a model are."""
    return {k: v.to(like[k].dtype) if k in like and like[k].dtype in HALF else v for k, v in state.items()}


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode whose floating parameters take gradients. Raises InputError where it cannot be copied."""
    twin = deep_copy(model)
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
