"""Weights that become tensors only while they are used: a module's attribute asks a source instead of holding a parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Source = Callable[[], Tensor]


def put_on_demand(model: nn.Module, sources: Mapping[str, Source]) -> None:
    """Replace parameters of a model, by state-dict key, by sources of their values, on the device and in the dtype that they have.

    A module that has some gets a subclass of its class, made for it, in which they are properties; all else of it stays. Such
    weights have no gradients, are not in `state_dict()`, and follow `model.to(...)`."""
    owners = dict(model.named_modules(remove_duplicate=False))
    by_module: dict[int, tuple[nn.Module, dict[str, Source]]] = {}
    for key, source in sources.items():
        owner, _, attribute = key.rpartition(".")
        module = owners[owner]
        by_module.setdefault(id(module), (module, {}))[1][attribute] = source
    for module, own in by_module.values():
        _swap(module, own)


def _swap(module: nn.Module, sources: dict[str, Source]) -> None:
    kind = type(module)
    parameters = [module._parameters.pop(name) for name in sources]
    like = next(p for p in parameters if p is not None)
    # a tensor of no values, which follows .to(), says where weights are wanted and in which dtype
    module.register_buffer("_wanted", torch.empty(0, device="cpu" if like.is_meta else like.device, dtype=like.dtype), False)
    body: dict[str, Any] = {name: property(_getter(source)) for name, source in sources.items()}
    if isinstance(module, nn.RNNBase):
        body["_flat_weights"] = property(_flat_weights, lambda self, value: None)
        module.__dict__.pop("_flat_weights", None)
    module.__class__ = type(kind.__name__, (kind,), {**body, "__module__": kind.__module__})


def _getter(source: Source) -> Callable[[nn.Module], Tensor]:
    def get(self: nn.Module) -> Tensor:
        wanted: Tensor = self._buffers["_wanted"]  # type: ignore[assignment]
        return source().to(wanted.device, wanted.dtype)

    return get


def _flat_weights(self: nn.Module) -> list[Tensor]:
    """What recurrent layers run with."""
    return [getattr(self, name) for name in self._flat_weights_names]  # type: ignore[union-attr]
