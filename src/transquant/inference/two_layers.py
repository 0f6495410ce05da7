"""A layer whose weight has a transform as two layers, basis and transformed kernels (Young et al., arXiv 2009.01174, section 6).

    axis of the bands        convolution, linear                transposed convolution, Conv1D of transformers, embedding
    "c" of the channels      1×1 Bᵀ, then C                     C, then 1×1 B
    "r" of the rows          T, then 1×1 B                      1×1 Bᵀ, then T
    "k" of the kernel        B on each channel, then 1×1        1×1, then B on each channel
    "j" joint                Bᵀ as kernels, then 1×1            1×1, then B as kernels

Bands of zeros are left out of both. A 1×1 layer has no bias where the other comes after it, so that padding stays what it is.
The published code has the first two for convolutions of one group.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from transquant.records import CodedEntry, FloatArray

POINTWISE: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

Matrix = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two layers, which of them takes further arguments, and how both weights make the one they stand for: einsum's equation,
    and the shapes of what it takes from the beginning of each."""

    first: nn.Module
    second: nn.Module
    main: int
    equation: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


class TransformDomain(nn.Module):
    """Two layers in place of one, `first` and `second`, with `kept` bands between them. `weight` is what they amount to, made anew
    whenever it is asked for; further attributes are those of the layer that it replaces."""

    def __init__(self, pair: _Pair, layer: nn.Module, shape: tuple[int, ...], kept: int) -> None:
        super().__init__()
        for name, value in vars(layer).items():
            if not name.startswith("_") and name != "training":
                self.__dict__[name] = value
        self.first, self.second = pair.first, pair.second
        self._main, self._equation, self._shapes, self._shape, self.kept = pair.main, pair.equation, pair.shapes, shape, kept
        self.train(layer.training)

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """What the layer gives."""
        if self._main:
            result: Tensor = self.second(self.first(x), *arguments, **options)
        else:
            result = self.second(self.first(x, *arguments, **options))
        return result

    @property
    def weight(self) -> Tensor:
        """The weight that both layers stand for, to rounding."""
        parts = [
            module.weight.reshape(-1)[: prod(shape)].view(shape)  # type: ignore[operator]
            for module, shape in zip((self.first, self.second), self._shapes, strict=True)
        ]
        return torch.einsum(self._equation, *parts).reshape(self._shape)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer: the second one adds it."""
        bias: Tensor | None = getattr(self.second, "bias", None)
        return bias


def two_layers(layer: nn.Module, kind: str, entry: CodedEntry, coeffs: Matrix, basis: FloatArray) -> TransformDomain | str:
    """The layers that stand for one of `kind` (modules/kinds.py), or why there are none.

    `coeffs` float32 (O, n): dequantized coefficients; `basis` float64 (r, r): what synthesis multiplies them with."""
    family = kind.rstrip("123d") if kind.startswith("conv") and kind != "conv1d_hf" else kind
    make = {
        "conv": _convolution, "conv_transpose": _transposed, "linear": _linear, "conv1d_hf": _linear_rows_first,
        "embedding": _embedding, "embedding_bag": _embedding,
    }.get(family)  # fmt: skip
    if make is None:
        return f"layers of kind {kind} have no form of two layers"
    if kind != "conv1d_hf" and not type(layer).__module__.startswith("torch.nn.modules."):
        return f"{type(layer).__name__} runs its weight in a way of its own"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return "it has hooks"
    scale = 2.0 ** -np.round(np.log2(np.maximum(np.linalg.norm(basis, axis=0), 1e-300)))  # exact
    bands = _by_band(entry, coeffs)
    kept = np.flatnonzero((np.abs(basis).max(0) > 0) & (np.abs(bands).reshape(len(bands), -1).max(1, initial=0) > 0))
    kept = kept if len(kept) else np.zeros(1, int)
    bands = (bands[kept].astype(np.float64).T / scale[kept]).T
    pair = make(layer, entry, _tensor(bands, layer), _tensor(basis[:, kept] * scale[kept], layer))
    return pair if isinstance(pair, str) else TransformDomain(pair, layer, entry.shape, len(kept))


def _by_band(entry: CodedEntry, coeffs: Matrix) -> Matrix:
    """Coefficients (O, n) with the band first: "c" (r, O, taps), "k" (r, O, I), "r" (r, n), "j" (r, O)."""
    if entry.axis == "r":
        return coeffs
    if entry.axis == "j":
        return coeffs.T
    first, second = (entry.taps, entry.shape[1]) if entry.axis == "k" else (entry.shape[1], entry.taps)
    return coeffs.reshape(entry.rows, first, second).transpose(1, 0, 2)


def _tensor(array: NDArray[Any], layer: nn.Module) -> Tensor:
    like = next(layer.parameters())
    return torch.from_numpy(np.ascontiguousarray(array, np.float32)).to("cpu" if like.is_meta else like.device, like.dtype)


def _convolution(layer: Any, entry: CodedEntry, bands: Tensor, basis: Tensor) -> _Pair | str:
    g, dims, kept = layer.groups, len(entry.shape) - 2, len(bands)
    rows, channels, kernel = entry.shape[0], entry.shape[1], entry.shape[2:]
    if entry.axis == "r":
        if g > 1:
            return "bands of the rows of a grouped convolution mix groups"
        first = _conv(layer, channels, kept, bands.reshape(kept, channels, *kernel), None, 1)
        return _Pair(first, _pointwise(dims, basis, 1, layer.bias), 0, "kn,ok->on", ((kept, entry.columns), (rows, kept)))
    if entry.axis == "c":
        first = _pointwise(dims, basis.T.repeat(g, 1), g, None)
        weight = bands.permute(1, 0, 2).reshape(rows, kept, *kernel)
        second = _conv(layer, g * kept, rows, weight, layer.bias, g)
        return _Pair(first, second, 1, "ki,okt->oit", ((kept, channels), (rows, kept, entry.taps)))
    if entry.axis == "j":
        first = _conv(layer, g * channels, g * kept, basis.T.reshape(kept, channels, *kernel).repeat(g, *[1] * (dims + 1)), None, g)
        second = _pointwise(dims, bands.T, g, layer.bias)
        return _Pair(first, second, 0, "kn,ok->on", ((kept, entry.columns), (rows, kept)))
    weight = basis.T.reshape(1, kept, 1, *kernel).expand(g * channels, -1, -1, *kernel).reshape(-1, 1, *kernel)
    first = _conv(layer, g * channels, g * channels * kept, weight, None, g * channels)
    second = _pointwise(dims, bands.permute(1, 2, 0).reshape(rows, -1), g, layer.bias)
    return _Pair(first, second, 0, "kt,oik->oit", ((kept, entry.taps), (rows, channels, kept)))


def _transposed(layer: Any, entry: CodedEntry, bands: Tensor, basis: Tensor) -> _Pair | str:
    g, dims, kept = layer.groups, len(entry.shape) - 2, len(bands)
    inputs, outputs, kernel = entry.shape[0], entry.shape[1], entry.shape[2:]
    if entry.axis == "r":
        if g > 1:
            return "bands of the rows of a grouped convolution mix groups"
        second = _deconv(layer, kept, bands.reshape(kept, outputs, *kernel), layer.bias, 1)
        return _Pair(_pointwise(dims, basis.T, 1, None), second, 1, "kc,kn->cn", ((kept, inputs), (kept, entry.columns)))
    if entry.axis == "c":
        first = _deconv(layer, inputs, bands.permute(1, 0, 2).reshape(inputs, kept, *kernel), None, g)
        second = _pointwise(dims, basis.repeat(g, 1), g, layer.bias)
        return _Pair(first, second, 0, "ckt,dk->cdt", ((inputs, kept, entry.taps), (outputs, kept)))
    if entry.axis == "j":
        own = bands.reshape(kept, g, -1).permute(1, 0, 2)  # (g, kept, inputs of a group)
        first = _pointwise(dims, own.reshape(g * kept, -1), g, None)
        weight = basis.T.reshape(kept, outputs, *kernel).repeat(g, *[1] * (dims + 1))
        return _Pair(first, _deconv(layer, g * kept, weight, layer.bias, g), 1, "gkc,kn->gcn",
                     ((g, kept, inputs // g), (kept, entry.columns)))  # fmt: skip
    own = bands.reshape(kept, g, inputs // g, outputs).permute(1, 3, 0, 2)  # (g, outputs of a group, kept, inputs of a group)
    first = _pointwise(dims, own.reshape(-1, inputs // g), g, None)
    weight = basis.T.reshape(1, kept, 1, *kernel).expand(g * outputs, -1, -1, *kernel).reshape(-1, 1, *kernel)
    second = _deconv(layer, g * outputs * kept, weight, layer.bias, g * outputs)
    return _Pair(first, second, 1, "gdkc,kt->gcdt", ((g, outputs, kept, inputs // g), (kept, entry.taps)))


def _linear(layer: Any, entry: CodedEntry, bands: Tensor, basis: Tensor) -> _Pair:
    kept, (rows, columns) = len(bands), entry.shape
    down, up = (bands, basis) if entry.axis == "r" else (basis.T, bands.reshape(kept, -1).T)
    return _Pair(_lin(down, None), _lin(up, layer.bias), 1, "kn,ok->on", ((kept, columns), (rows, kept)))


def _linear_rows_first(layer: Any, entry: CodedEntry, bands: Tensor, basis: Tensor) -> _Pair:
    kept, (inputs, outputs) = len(bands), entry.shape
    down, up = (basis.T, bands.T) if entry.axis == "r" else (bands.reshape(kept, -1), basis)
    return _Pair(_lin(down, None), _lin(up, layer.bias), 1, "ki,ok->io", ((kept, inputs), (outputs, kept)))


def _embedding(layer: Any, entry: CodedEntry, bands: Tensor, basis: Tensor) -> _Pair | str:
    if layer.max_norm is not None or getattr(layer, "mode", "sum") == "max":
        return "an embedding with max_norm, or a bag with mode 'max', is not linear in its weight"
    kept, (tokens, width) = len(bands), entry.shape
    codes, up = (basis, bands.T) if entry.axis == "r" else (bands.reshape(kept, tokens).T, basis)
    options = {k: getattr(layer, k) for k in ("padding_idx", "mode", "include_last_offset") if hasattr(layer, k)}
    first = type(layer)(tokens, kept, device=codes.device, dtype=codes.dtype, _weight=codes.contiguous(), **options)
    first.weight.requires_grad_(layer.weight.requires_grad)
    return _Pair(first, _lin(up, None), 0, "vk,ek->ve", ((tokens, kept), (width, kept)))


def _pointwise(dims: int, weight: Tensor, groups: int, bias: Tensor | None) -> nn.Module:
    """A 1×1 convolution; weight (outputs, inputs of a group)."""
    made = POINTWISE[dims](weight.shape[1] * groups, len(weight), 1, groups=groups, bias=bias is not None, device="meta")
    return _filled(made, weight.reshape(*weight.shape, *[1] * dims), bias)


def _conv(layer: Any, inputs: int, outputs: int, weight: Tensor, bias: Tensor | None, groups: int) -> nn.Module:
    made = POINTWISE[weight.ndim - 2](
        inputs, outputs, layer.kernel_size, layer.stride, layer.padding, layer.dilation, groups, bias is not None,
        layer.padding_mode, device="meta",
    )  # fmt: skip
    return _filled(made, weight, bias)


def _deconv(layer: Any, inputs: int, weight: Tensor, bias: Tensor | None, groups: int) -> nn.Module:
    made = TRANSPOSED[weight.ndim - 2](
        inputs, weight.shape[1] * groups, layer.kernel_size, layer.stride, layer.padding, layer.output_padding, groups,
        bias is not None, layer.dilation, layer.padding_mode, device="meta",
    )  # fmt: skip
    return _filled(made, weight, bias)


def _lin(weight: Tensor, bias: Tensor | None) -> nn.Module:
    return _filled(nn.Linear(weight.shape[1], len(weight), bias is not None, device="meta"), weight, bias)


def _filled(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    module.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone())
    return module
