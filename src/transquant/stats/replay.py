"""Puts another forward in the place of a module's own, on a copy, until the statistics of a micro-batch are taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from transquant.stats.moments import Moments


class Replaced:
    """A module whose forward is another function, until `remove`."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module = module
        module.forward = forward

    def remove(self) -> None:
        """The module's own forward again."""
        if "forward" in vars(self.module):
            del self.module.forward


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether the module runs the forward of one of these classes, and not one of its own."""
    return "forward" not in vars(module) and type(module).forward in {c.forward for c in classes}


def on_gradient(tensor: Tensor, sink: Moments | None, group: int | None = None) -> None:
    """The gradient of a tensor (..., o), when it comes, as rows."""
    if sink is not None and tensor.requires_grad:
        tensor.register_hook(lambda g: sink.add_rows(g.detach().reshape(-1, g.shape[-1]).T[None], group))  # type: ignore[no-untyped-call]


def as_columns(x: Tensor, sink: Moments | None, group: int | None = None) -> None:
    """Inputs (T, N, n) as columns, some of the steps."""
    if sink is not None:
        sink.add_columns(x.detach()[sink.thin(len(x))].flatten(0, 1).T[None], group)
