"""What each kind of layer records while a micro-batch runs forward and backward.

A recorder hooks a module, or takes the place of its forward for that time, and fills the `Moments` of its weights:

    x ─ inputs(module, sink, x)      gradient of the output ─ gradients(module, sink, x, gradient)

Modules that hand several weights to one compiled function are replayed: recurrent.py and attention.py compute the same
outputs step by step, with every input and every gradient at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from transquant.stats import attention, convolution, recurrent
from transquant.stats.moments import Moments

Sinks = Mapping[str, Moments]  # by attribute of the module
Inputs = Callable[[Any, Moments, Any], None]
Gradients = Callable[[Any, Moments, Any, Tensor], None]


class Handle(Protocol):
    """What undoes a hook."""

    def remove(self) -> None:
        """Undo it."""


def attach(kind: str, module: nn.Module, sinks: Sinks) -> Sequence[Handle]:
    """Record what meets the module's weights, until the handles are removed. Kinds and modules that are not known record
    nothing: such weights are judged by their gradients."""
    if kind in HOOKED:
        hook = partial(_forward, *HOOKED[kind], sinks["weight"])
        return [module.register_forward_hook(hook, with_kwargs=True)]
    return REPLAYED[kind](module, sinks) if kind in REPLAYED else []


def _forward(
    inputs: Inputs,
    gradients: Gradients,
    sink: Moments,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: Any,
) -> None:
    if not isinstance(result, Tensor) or result.numel() == 0 or (torch.is_grad_enabled() and not result.requires_grad):
        return
    x = _detached(args, kwargs, module)
    if x is None:
        return
    inputs(module, sink, x)
    if result.requires_grad:
        result.register_hook(lambda gradient: gradients(module, sink, x, gradient.detach()))  # type: ignore[no-untyped-call]


def _detached(args: tuple[Any, ...], kwargs: dict[str, Any], module: nn.Module) -> Any:
    """The input; all arguments by name for layers of more than one."""
    if isinstance(module, nn.Bilinear | nn.EmbeddingBag):
        bound = signature(type(module).forward).bind(module, *args, **kwargs).arguments
        return {k: v.detach() if isinstance(v, Tensor) else v for k, v in bound.items()}
    first = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
    return None if first is None else first.detach()


# ------------------------------------------------------------------------------------------- layers without positions


def _linear_inputs(module: nn.Module, sink: Moments, x: Tensor) -> None:
    x = x.reshape(len(x) if x.ndim > 1 else 1, -1, x.shape[-1])
    sink.add_columns(x[:, sink.thin(x.shape[1])].flatten(0, 1).T[None])


def _linear_gradients(module: nn.Module, sink: Moments, x: Any, gradient: Tensor) -> None:
    sink.add_rows(gradient.reshape(-1, gradient.shape[-1]).T[None])


def _bilinear_inputs(module: nn.Module, sink: Moments, x: Mapping[str, Tensor]) -> None:
    one, two = (x[name].flatten(0, -2) if x[name].ndim > 1 else x[name][None] for name in ("input1", "input2"))
    sink.add_columns((one[:, :, None] * two[:, None, :]).flatten(1).T[None])


def _conv1d_hf_inputs(module: nn.Module, sink: Moments, x: Tensor) -> None:
    sink.add_rows(x.reshape(-1, x.shape[-1]).T[None])


def _gradient_columns(module: nn.Module, sink: Moments, x: Any, gradient: Tensor) -> None:
    sink.add_columns(gradient.reshape(-1, gradient.shape[-1]).T[None], mean=False)


def _embedding_inputs(module: nn.Module, sink: Moments, x: Tensor) -> None:
    sink.add_row_squares(torch.bincount(x.reshape(-1), minlength=sink.shape.rows).double()[None])


def _bag_inputs(module: nn.EmbeddingBag, sink: Moments, x: Mapping[str, Any]) -> None:
    """y = Σ_v c_v W_v for each bag, the factor c_v of a token summed over its places: c² by token."""
    tokens, offsets, factors = x["input"], x.get("offsets"), x.get("per_sample_weights")
    if offsets is None:
        lengths = torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
    else:
        starts = offsets[:-1] if module.include_last_offset else offsets
        lengths = torch.diff(starts, append=torch.tensor([len(tokens)], device=tokens.device))
    bags = torch.repeat_interleave(torch.arange(len(lengths), device=tokens.device), lengths)
    c = torch.ones_like(bags, dtype=torch.float64) if factors is None else factors.reshape(-1).double()
    if module.mode == "mean":
        c = c / lengths[bags]
    pairs, place = torch.unique(bags * sink.shape.rows + tokens.reshape(-1), return_inverse=True)
    sums = torch.zeros(len(pairs), dtype=torch.float64, device=tokens.device).index_add_(0, place, c)
    squares = torch.zeros(sink.shape.rows, dtype=torch.float64, device=tokens.device)
    sink.add_row_squares(squares.index_add_(0, pairs % sink.shape.rows, sums.square())[None])


FORWARD: tuple[Inputs, Gradients] = convolution.input_patches, convolution.output_rows
TRANSPOSED: tuple[Inputs, Gradients] = convolution.input_rows, convolution.gradient_patches

HOOKED: dict[str, tuple[Inputs, Gradients]] = {
    "conv1d": FORWARD, "conv2d": FORWARD, "conv3d": FORWARD,
    "conv_transpose1d": TRANSPOSED, "conv_transpose2d": TRANSPOSED, "conv_transpose3d": TRANSPOSED,
    "linear": (_linear_inputs, _linear_gradients), "bilinear": (_bilinear_inputs, _linear_gradients),
    "conv1d_hf": (_conv1d_hf_inputs, _gradient_columns), "embedding": (_embedding_inputs, _gradient_columns),
    "embedding_bag": (_bag_inputs, _gradient_columns),
}  # fmt: skip
REPLAYED: dict[str, Callable[[Any, Sinks], Sequence[Handle]]] = {
    "recurrent": recurrent.replay, "recurrent_cell": recurrent.replay_cell, "attention": attention.replay,
}  # fmt: skip
