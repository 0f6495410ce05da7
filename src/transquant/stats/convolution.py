"""What convolutions in one to three dimensions record, forward and transposed.

forward     y[p] = Σ_k W[k] x[p·stride + k·dilation − padding]: columns are patches of the padded input
transposed  y[p·stride + k·dilation − padding] += W[k]ᵀ x[p]: rows are inputs, and columns are patches of the output's
            gradient, those that an input position reaches. The same convolution, seen from the other side.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from transquant.stats.moments import Moments

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def input_patches(module: Conv, sink: Moments, x: Tensor) -> None:
    """Patches of the input as columns."""
    sink.add_columns(_columns(_padded(module, _batched(module, x)), module, sink))


def output_rows(module: Conv, sink: Moments, x: Tensor, gradient: Tensor) -> None:
    """Gradients of the output as rows."""
    sink.add_rows(_channels(module, sink, gradient))


def input_rows(module: ConvTranspose, sink: Moments, x: Tensor) -> None:
    """Inputs as rows."""
    sink.add_rows(_channels(module, sink, x))


def gradient_patches(module: ConvTranspose, sink: Moments, x: Tensor, gradient: Tensor) -> None:
    """Patches of the output's gradient as columns."""
    x, gradient = _batched(module, x), _batched(module, gradient)
    padding: list[int] = []
    for d in reversed(range(len(module.kernel_size))):
        left = int(module.padding[d])
        reached = (x.shape[2 + d] - 1) * module.stride[d] + module.dilation[d] * (module.kernel_size[d] - 1) + 1
        padding += [left, reached - left - gradient.shape[2 + d]]  # the right side has output_padding less, and may be cut
    sink.add_columns(_columns(functional.pad(gradient, padding), module, sink), mean=False)


def _batched(module: nn.Module, x: Tensor) -> Tensor:
    return x[None] if x.ndim == len(module.kernel_size) + 1 else x  # type: ignore[arg-type]


def _padded(module: Conv, x: Tensor) -> Tensor:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    # PyTorch keeps the padding of each side in this order for exactly this call
    padding = module._reversed_padding_repeated_twice
    return functional.pad(x, padding, mode=mode) if any(padding) else x


def _columns(x: Tensor, module: nn.Module, sink: Moments) -> Tensor:
    """Patches of x (N, C, …), without padding, at some of the positions, as (g, n, P)."""
    taps = patches(x, module.kernel_size, module.stride, module.dilation, sink)  # type: ignore[arg-type]
    groups = sink.shape.groups
    # (N, C, positions, taps) → (g, C/g, taps, N, positions)
    return taps.reshape(len(taps), groups, -1, *taps.shape[2:]).permute(1, 2, 4, 0, 3).reshape(groups, sink.shape.columns, -1)


def patches(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], sink: Moments) -> Tensor:
    """(N, C, positions, taps) of x (N, C, …); only the positions that the sink wants are ever gathered."""
    dims = len(kernel)
    for d in range(dims):
        x = x.unfold(2 + d, (kernel[d] - 1) * dilation[d] + 1, stride[d])[..., :: dilation[d]]  # a view
    sizes = x.shape[2 : 2 + dims]
    chosen = torch.arange(prod(sizes), device=x.device)[sink.thin(prod(sizes))]
    places: tuple[slice | Tensor, ...] = (slice(None), slice(None), *torch.unravel_index(chosen, sizes))
    return x[places].flatten(3)


def _channels(module: nn.Module, sink: Moments, x: Tensor) -> Tensor:
    """(N, C, …) as (g, C/g, N · positions)."""
    x = _batched(module, x)
    return x.reshape(len(x), sink.shape.groups, x.shape[1] // sink.shape.groups, -1).permute(1, 2, 0, 3).flatten(2)
