"""Layers that learn from the same layers of the teacher: what they put out, position by position.

    Σ_k E‖s_k − t_k‖² / Var(t_k) / K      s_k, t_k: what the network's and the teacher's k-th layer put out

After FitNets (Romero et al., arXiv 1412.6550), whose hints train the lower half of a network, through a regressor, before all else.
Here layers have the teacher's widths, so there is no regressor; all of them learn at once, each measured in its own variance, so
that one weight fits them all; and that weight falls with the learning rate, since what a small network cannot follow to the end
would be in the way of its task.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from transquant.errors import InputError

SMALL = 1e-12  # variances below are as good as none


class Hints:
    """What layers of a network and of its teacher put out while `seen` is open. Raises InputError for names that one of them has
    not."""

    def __init__(self, model: nn.Module, teacher: nn.Module, names: Sequence[str]) -> None:
        self.names = names
        self._layers = [_layers(model, "model", names), _layers(teacher, "teacher", names)]
        self._outputs: list[list[list[Tensor]]] = []

    @contextmanager
    def seen(self) -> Iterator[None]:
        """Runs of both networks inside leave behind what their layers put out."""
        self._outputs = [[[] for _ in self.names] for _ in self._layers]
        handles = []
        try:
            for layers, outputs in zip(self._layers, self._outputs, strict=True):
                for layer, found in zip(layers, outputs, strict=True):
                    handles.append(
                        layer.register_forward_hook(lambda _, inputs, output, found=found: found.append(_tensor(output)))
                    )
            yield
        finally:
            for handle in handles:
                handle.remove()

    def loss(self) -> Tensor:
        """How far the network's layers were from the teacher's, a mean over layers, and let go of what they put out."""
        own, taught = self._outputs
        self._outputs = []
        return torch.stack([_distance(*each) for each in zip(self.names, own, taught, strict=True)]).mean()


def _distance(name: str, own: list[Tensor], taught: list[Tensor]) -> Tensor:
    """Of one layer, a mean over its calls. Raises InputError where the two cannot be compared."""
    if not own or len(own) != len(taught):
        raise InputError(f"hints: {name!r} runs {len(own)} times in the model and {len(taught)} times in the teacher")
    distances = []
    for output, wanted in zip(own, taught, strict=True):
        if output.shape != wanted.shape:
            raise InputError(f"hints: {name!r} puts out {tuple(output.shape)}, the teacher's {tuple(wanted.shape)}")
        wide = torch.promote_types(output.dtype, torch.float32)
        goal = wanted.detach().to(output.device, wide)
        distances.append((output.to(wide) - goal).square().mean() / goal.var(correction=0).clamp_min(SMALL))
    return torch.stack(distances).mean()


def _layers(model: nn.Module, whose: str, names: Sequence[str]) -> list[nn.Module]:
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in modules or not name:
            known = ", ".join(repr(key) for key in modules if key and key.count(".") <= 1 and "parametrizations" not in key)
            raise InputError(f"hints: the {whose} has no layer {name!r}, it has {known:.300}")
    return [modules[name] for name in names]


def _tensor(output: Any) -> Tensor:
    """What a layer puts out, the first of several. Raises InputError."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor) or not first.is_floating_point():
        raise InputError(f"hints: a layer puts out a {type(first).__name__}, allowed are floating tensors")
    return first
