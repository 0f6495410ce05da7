"""Where a network's feature maps are, and other tensors in their place: calls of activation functions, as modules or not.

Functions are met wherever a network calls them, so nothing is traced and nothing is rewritten; a point's name is the path of
the module that makes the call and the number of the call in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from transquant.features.records import Point

Replace = Callable[[Point, Tensor, Callable[[Tensor], Tensor]], Tensor]
"""(point, input of the activation, the activation) → what the network goes on with."""

ACTIVATIONS: dict[Any, str] = {
    functional.relu: "relu", torch.relu: "relu", torch.relu_: "relu", functional.relu_: "relu", Tensor.relu: "relu",
    Tensor.relu_: "relu", functional.relu6: "relu6", functional.hardtanh: "hardtanh", functional.hardtanh_: "hardtanh",
    functional.gelu: "gelu", functional.silu: "silu", functional.hardswish: "hardswish", functional.mish: "mish",
    functional.leaky_relu: "leaky_relu", functional.elu: "elu", functional.softplus: "softplus", functional.prelu: "prelu",
    torch.prelu: "prelu",
}  # fmt: skip
CLIPS = {"relu": (0.0, None), "relu6": (0.0, 6.0)}
LINEAR = {functional.linear}
CONVOLUTIONS = {
    functional.conv1d, functional.conv2d, functional.conv3d, torch.conv1d, torch.conv2d, torch.conv3d,
    functional.conv_transpose1d, functional.conv_transpose2d,
}  # fmt: skip


class _Calls(TorchFunctionMode):
    """Meets activations while it is active; `path`: of the modules that run, the innermost last."""

    def __init__(self, replace: Replace) -> None:
        super().__init__()
        self.replace, self.path = replace, [""]
        self.calls: dict[str, int] = {}
        self.axes, self.inside = dict[int, int](), False  # of the channels in tensors of so many axes, as layers left them

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        options = kwargs or {}
        if func in LINEAR or func in CONVOLUTIONS:
            result = func(*args, **options)
            self.axes[result.ndim] = 1 if func in CONVOLUTIONS else result.ndim - 1
            return result
        name = ACTIVATIONS.get(func)
        tensor = args[0] if args else options.get("input")
        if self.inside or name is None or not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.ndim < 2:
            return func(*args, **options)
        if name == "hardtanh":  # what nn.ReLU6 calls
            bounds = [*args[1:3], *(options.get(k) for k in ("min_val", "max_val"))]
            name = "relu6" if [b for b in bounds if b is not None] == [0.0, 6.0] else name
        return self._met(name, tensor, func, args, options)

    def _met(self, name: str, tensor: Tensor, func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
        path = self.path[-1]
        number = self.calls.get(path, 0)
        self.calls[path] = number + 1
        axis = self.axes.get(tensor.ndim, 2 if tensor.ndim == 3 else 1)
        low, high = CLIPS.get(name, (None, None))
        point = Point(f"{path}#{number}", name, axis, tensor.shape[axis], low, high)
        in_place = bool(options.get("inplace")) or func in (torch.relu_, functional.relu_, Tensor.relu_, functional.hardtanh_)

        def activation(x: Tensor) -> Tensor:
            own = {k: v for k, v in options.items() if k not in ("input", "inplace")}
            result: Tensor = func(x.clone() if in_place else x, *args[1:], **own)
            return result

        self.inside = True
        try:
            result = self.replace(point, tensor, activation)
        finally:
            self.inside = False
        if in_place:  # who asked for that may go on with the tensor itself
            with torch.no_grad() if not result.requires_grad else torch.enable_grad():
                tensor.copy_(result)
            return tensor
        return result


@contextmanager
def replacing(model: nn.Module, replace: Replace) -> Iterator[None]:
    """Within, results of activations in `model` are what `replace` returns; its parameters and hooks are as before afterwards."""
    calls = _Calls(replace)
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        if module is model:
            calls.calls.clear()
            calls.axes.clear()
            calls.path[:] = [""]
        else:
            calls.path.append(names[module])

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        if module is not model:
            calls.path.pop()

    handles = [m.register_forward_pre_hook(enter) for m in names] + [m.register_forward_hook(leave) for m in names]
    try:
        with calls:
            yield
    finally:
        for handle in handles:
            handle.remove()
