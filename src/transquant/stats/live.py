"""How many bytes of activations a forward holds at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn


class Live:
    """Watches what the modules of a model are given and what they return; `most` bytes of that were alive at a call of any."""

    def __init__(self, model: nn.Module) -> None:
        self.most = 0
        self._seen: list[ref[Tensor]] = []
        for module in model.modules():
            module.register_forward_pre_hook(self._given, with_kwargs=True)
            module.register_forward_hook(self._returned)

    def _given(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._seen += [ref(t) for t in _tensors((args, kwargs))]
        alive = [(seen, tensor) for seen in self._seen if (tensor := seen()) is not None]
        self._seen = [seen for seen, _ in alive]
        sizes: dict[int, int] = {}  # of views of one storage the largest: a micro-batch may be a part of all samples
        for _, tensor in alive:
            storage = tensor.untyped_storage()
            size = min(tensor.numel() * tensor.element_size(), storage.nbytes())
            sizes[storage.data_ptr()] = max(sizes.get(storage.data_ptr(), 0), size)
        self.most = max(self.most, sum(sizes.values()))

    def _returned(self, module: nn.Module, args: Any, result: Any) -> None:
        self._seen += [ref(t) for t in _tensors(result)]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested:
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
