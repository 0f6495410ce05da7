"""What running a network costs: multiply–adds, bytes of weights, and time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one run: `macs`, multiply–adds of convolutions, linear and recurrent layers and attention; `weight_bytes` of what is held
    in memory between runs, parameters and buffers and whatever takes their place; `milliseconds`, the median of a run."""

    macs: int
    weight_bytes: int
    milliseconds: float


@dataclass(frozen=True, slots=True)
class Calls:
    """What one run asks of a layer: multiply–adds, and how many positions of its input and its output."""

    macs: int = 0
    inputs: int = 0
    outputs: int = 0


def count_macs(model: nn.Module, batch: Any, run: Run) -> dict[str, int]:
    """Multiply–adds by path of module in one run on a batch. `run(model, batch)`. A module that runs twice counts twice;
    element-wise work (normalisations, activations) is not counted."""
    return {name: calls.macs for name, calls in count_calls(model, batch, run).items()}


def count_calls(model: nn.Module, batch: Any, run: Run) -> dict[str, Calls]:
    """What one run on a batch asks of each layer, by path of module."""
    counts: dict[str, Calls] = {}

    def hook(name: str) -> Callable[..., None]:
        def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            before = counts.get(name, Calls())
            sizes = [_positions(module, inputs[0], "in"), _positions(module, output, "out")]
            counts[name] = Calls(before.macs + _macs(module, inputs, output), before.inputs + sizes[0], before.outputs + sizes[1])

        return count

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if _counted(m)]
    attention_was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # in which no hook is called
    try:
        with torch.no_grad():
            run(model, batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(attention_was)
        for handle in handles:
            handle.remove()
    return counts


def measure(models: dict[str, nn.Module], batch: Any, run: Run, weight_bytes: dict[str, int], repeats: int = 20) -> dict[str, Cost]:
    """The cost of each model on a batch. Runs take turns, so that what disturbs the machine disturbs all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in models}
    macs = {name: sum(count_macs(model, batch, run).values()) for name, model in models.items()}  # and a first run of each
    with torch.no_grad():
        for _ in range(repeats):
            for name, model in models.items():
                start = time.perf_counter()
                run(model, batch)
                times[name].append(time.perf_counter() - start)
    return {name: Cost(macs[name], weight_bytes[name], 1e3 * statistics.median(times[name])) for name in models}


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared ones once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _counted(module: nn.Module) -> bool:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear, nn.Bilinear)
    known = isinstance(module, (*kinds, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention))
    return known or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def _positions(module: nn.Module, tensor: Any, side: str) -> int:
    """Positions of a tensor that meets a convolution or a linear layer; 0 of others."""
    width = getattr(module, f"{side}_channels", getattr(module, f"{side}_features", None))
    return tensor.numel() // width if isinstance(width, int) and width and isinstance(tensor, Tensor) else 0


def _macs(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> int:
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module, inputs)
    weights = [shape for name, shape in _weight_shapes(module) if name.startswith("weight")]
    result: Tensor = output[0] if isinstance(output, tuple) else output
    if isinstance(module, nn.RNNBase):
        data = getattr(inputs[0], "data", inputs[0])  # of packed sequences too
        return int(prod(data.shape[:-1])) * sum(map(prod, weights))
    if isinstance(module, nn.RNNCellBase):
        return prod(result.shape[:-1]) * sum(map(prod, weights))
    shape = weights[0]
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return int(inputs[0].numel() * prod(shape[1:]))
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return int(result.numel() * shape[0])
    return int(result.numel() * prod(shape[1:]))


def _weight_shapes(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    if isinstance(module, nn.RNNBase):
        return [(name, tuple(getattr(module, name).shape)) for names in module._all_weights for name in names]
    names = ("weight_ih", "weight_hh") if isinstance(module, nn.RNNCellBase) else ("weight",)
    return [(name, tuple(getattr(module, name).shape)) for name in names]


def _attention(module: nn.MultiheadAttention, inputs: tuple[Any, ...]) -> int:
    """Projections of queries, keys, values and results (a linear layer whose hooks are not called), scores, and their sums."""
    query: Tensor = inputs[0]
    key: Tensor = inputs[1] if len(inputs) > 1 else query
    width: int = module.embed_dim
    tokens, others = prod(query.shape[:-1]), prod(key.shape[:-1])
    batch: int = 1 if query.ndim == 2 else query.shape[0 if module.batch_first else 1]
    projections = tokens * width * width * 2 + others * (int(module.kdim or width) + int(module.vdim or width)) * width
    return projections + 2 * tokens * (others // batch) * width
