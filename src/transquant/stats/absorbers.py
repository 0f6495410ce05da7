"""Which BatchNorm follows a layer so closely that its shift can make up for the mean error of the layer's output.

A layer with no bias of its own often hands its output to a BatchNorm and to nothing else. That is found out by trying: the
tensor that the layer returns is the very one that the BatchNorm receives, and a constant added to it, channel by channel,
and taken away again before the BatchNorm leaves the network's output as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transquant.errors import InputError
from transquant.records import BatchNormSpec, Plan, WeightSpec

KINDS = ("linear", "conv1d", "conv2d", "conv3d")
CLOSE = 1e-3  # of the output's spread: more than rounding, less than a constant that goes astray
SEED = 20201

Run = Callable[[nn.Module, Any], Tensor]


def absorbers(model: nn.Module, batch: Any, plan: Plan, run: Run) -> dict[str, str]:
    """Name of the BatchNorm by weight name; `model` is a copy in eval mode."""
    modules = dict(model.named_modules())
    layers = {
        s.name: modules[s.module]
        for s in plan.specs
        if isinstance(s, WeightSpec) and s.module in modules and s.kind in KINDS and not s.tied and not s.rescaled
    }
    layers = {name: m for name, m in layers.items() if getattr(m, "bias", None) is None}
    norms = {s.name: modules[s.name] for s in plan.specs if isinstance(s, BatchNormSpec) and s.name in modules}
    if not layers or not norms:
        return {}
    with torch.no_grad():
        output, pairs = _adjacent(model, batch, layers, norms, run)
        if not pairs or not bool(torch.isfinite(output).all()):
            return {}
        harmless = _unchanged(model, batch, output, [(layers[n], norms[b]) for n, b in pairs.items()], run)
        if not harmless:  # one of them: each alone
            pairs = {n: b for n, b in pairs.items() if _unchanged(model, batch, output, [(layers[n], norms[b])], run)}
    return pairs


def _adjacent(
    model: nn.Module, batch: Any, layers: Mapping[str, nn.Module], norms: Mapping[str, nn.Module], run: Run
) -> tuple[Tensor, dict[str, str]]:
    """The output, and pairs of a layer and a BatchNorm that are called once, one with what the other returned."""
    made: dict[int, tuple[str, Tensor]] = {}  # by identity of the tensor, which is kept alive
    called: list[str] = []
    pairs: dict[str, str] = {}

    def made_by(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            called.append(name)
            # channels in the second dimension, as a BatchNorm has them: no linear layer over time, no lone sample
            if isinstance(result, Tensor) and result.ndim == module.weight.ndim:
                made[id(result)] = name, result

        return hook

    def taken_by(norm: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            called.append(norm)
            if args and id(args[0]) in made:
                pairs[made[id(args[0])][0]] = norm

        return hook

    handles = [m.register_forward_hook(made_by(n)) for n, m in layers.items()]
    handles += [m.register_forward_pre_hook(taken_by(n)) for n, m in norms.items()]
    try:
        output = run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    once = {n for n in called if called.count(n) == 1}
    return output, {n: b for n, b in pairs.items() if n in once and b in once}


def _unchanged(model: nn.Module, batch: Any, output: Tensor, pairs: Sequence[tuple[nn.Module, nn.Module]], run: Run) -> bool:
    """Whether constants that the layers add and the BatchNorms take away leave the output as it is."""
    generator = torch.Generator().manual_seed(SEED)
    handles = []
    for layer, norm in pairs:
        spread = norm.running_var.detach().double().clamp(min=0).sqrt().cpu()  # type: ignore[operator]
        constant = (torch.randn(spread.shape, generator=generator, dtype=torch.float64) * spread).to(norm.running_var)  # type: ignore[arg-type]

        def add(module: nn.Module, args: Any, result: Tensor, constant: Tensor = constant) -> Tensor:
            return result + _by_channel(constant, result)

        def take(module: nn.Module, args: tuple[Tensor, ...], constant: Tensor = constant) -> tuple[Any, ...]:
            return args[0] - _by_channel(constant, args[0]), *args[1:]

        handles += [layer.register_forward_hook(add), norm.register_forward_pre_hook(take)]
    try:
        other = run(model, batch)
    except InputError:  # of a constant that went astray: a logarithm, say
        return False
    finally:
        for handle in handles:
            handle.remove()
    scale = float((output - output.mean(0)).abs().max()) or float(output.abs().max())
    return float((other - output).abs().max()) <= CLOSE * scale


def _by_channel(constant: Tensor, x: Tensor) -> Tensor:
    return constant.reshape(-1, *(1,) * (x.ndim - 2))
