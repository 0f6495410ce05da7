"""Convolutions and linear layers in integers: inputs as uint8 codes, weights int8 with a step an output channel, sums in int32.

The kernels are oneDNN's, which PyTorch brings along for x86 and uses itself for quantized graphs. Their result is float32: the
sum of integers, exact, times both steps, plus the bias. So a layer differs from its float32 reference (`activations.py`, with
weights of `int8_weight`) only by the rounding of float32 sums there.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from transquant.inference.activations import codes
from transquant.records import Activation

CONVOLUTIONS: dict[type[nn.Module], str] = {
    nn.Conv1d: "qconv1d_pointwise", nn.Conv2d: "qconv2d_pointwise", nn.Conv3d: "qconv3d_pointwise",
}  # fmt: skip
LINEAR = "qlinear_pointwise"


def int8_weight(weight: Tensor, channel: int = 0) -> tuple[Tensor, Tensor]:
    """int8 codes in −127 … 127 and float32 steps (O,), one for each output channel, of which `channel` is the dimension."""
    rows = weight.detach().float().movedim(channel, 0)
    steps = rows.flatten(1).abs().amax(1) / 127
    steps = torch.where(steps > 0, steps, torch.ones_like(steps))
    rounded = (rows / steps.view(-1, *[1] * (rows.ndim - 1))).round_().clamp_(-127, 127)
    return rounded.to(torch.int8).movedim(0, channel).contiguous(), steps


def int8_values(integers: Tensor, steps: Tensor, channel: int = 0) -> Tensor:
    """What codes stand for, float32."""
    shape = [1] * integers.ndim
    shape[channel] = -1
    return integers.float() * steps.view(shape)


@cache
def has_exact_kernels() -> bool:
    """Whether this build of PyTorch has the kernels, and whether they are exact on this processor: without instructions for
    products of bytes some saturate in 16 bits."""
    try:
        ones = torch.full((2, 16, 3, 3), 127, dtype=torch.int8), torch.ones(2)
        layer = nn.Conv2d(16, 2, 3, bias=False)
        found = Int8Layer(layer, Activation(8, 0, 2048, -11), *ones)(torch.full((1, 16, 4, 4), 255.0))
        row = Int8Layer(nn.Linear(64, 2), Activation(8, 0, 2048, -11), ones[0].flatten(1)[:, :64], ones[1])
        with torch.no_grad():
            return bool((found == 255 * 127 * 144).all() and (row(torch.full((1, 64), 255.0)) - row.bias == 255 * 127 * 64).all())
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def why_not_int8(layer: nn.Module) -> str | None:
    """Why a layer has no integer form, or None."""
    hf = type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")
    if type(layer) not in CONVOLUTIONS and type(layer) is not nn.Linear and not hf:
        return f"there is no integer kernel for {type(layer).__name__}"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return "it has hooks"
    if next(layer.parameters()).device.type != "cpu":
        return "it is not on the CPU"
    return None


class Int8Layer(nn.Module):
    """Stands for a convolution, a linear layer or Hugging Face's `Conv1D`. `weight_codes` int8, `weight_steps` float32 (O,);
    `weight` is what they stand for; further attributes are those of the layer. No gradients."""

    def __init__(self, layer: nn.Module, how: Activation, integers: Tensor, steps: Tensor) -> None:
        super().__init__()
        for name, value in vars(layer).items():
            if not name.startswith("_") and name != "training":
                self.__dict__[name] = value
        self.how, self._kernel = how, CONVOLUTIONS.get(type(layer), LINEAR)
        self._channel = 1 if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") else 0
        self.register_buffer("weight_codes", integers)
        self.register_buffer("weight_steps", steps)
        bias = getattr(layer, "bias", None)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        # what stands outside the input: as in the layer, but padded before it is quantized where the kernel cannot
        mode, padding = getattr(layer, "padding_mode", "zeros"), getattr(layer, "padding", ())
        self._pad = (
            list(layer._reversed_padding_repeated_twice) if mode != "zeros" or isinstance(padding, str) else None  # type: ignore[arg-type]
        )
        self._packed: tuple[Tensor, Tensor] | None = None
        self.train(layer.training)

    @property
    def num_weights(self) -> int:
        """Bytes of the codes; as many are taken by those that are packed for the kernel."""
        return int(self.weight_codes.numel())  # type: ignore[operator]

    @property
    def weight(self) -> Tensor:
        """Float32, as the kernel sees it."""
        return int8_values(self.weight_codes, self.weight_steps, self._channel)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives, in the dtype of its input."""
        y = self._linear(x) if self._kernel == LINEAR else self._convolution(x)
        return y.to(x.dtype)

    def _linear(self, x: Tensor) -> Tensor:
        how, q = self.how, codes(x, self.how)
        packed, zeros = self._weights(q, lambda w: torch.ops.onednn.qlinear_prepack(w, list(q.shape)))
        steps = self.weight_steps
        result: Tensor = torch.ops.onednn.qlinear_pointwise(
            q, how.scale, how.zero, packed, steps, zeros, self.bias, 1.0, 0, torch.float32, "none", [], ""
        )
        return result

    def _convolution(self, x: Tensor) -> Tensor:
        single = x.ndim == len(self.kernel_size) + 1  # type: ignore[arg-type]
        if single:
            x = x[None]
        if self._pad is not None:
            x = functional.pad(x, self._pad, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)  # type: ignore[arg-type]
        how, q = self.how, codes(x, self.how)
        padding = list(self.padding) if self._pad is None else [0] * len(self.kernel_size)  # type: ignore[arg-type]
        shape = list(self.stride), padding, list(self.dilation), self.groups  # type: ignore[arg-type]
        steps = self.weight_steps

        def pack(w: Tensor) -> Tensor:
            packed: Tensor = torch.ops.onednn.qconv_prepack(w, steps, how.scale, how.zero, *shape, list(q.shape))
            return packed

        packed, zeros = self._weights(q, pack)
        result: Tensor = getattr(torch.ops.onednn, self._kernel)(
            q, how.scale, how.zero, packed, steps, zeros, self.bias, *shape, 1.0, 0, torch.float32, "none", [], ""
        )
        return result[0] if single else result

    def _weights(self, q: Tensor, pack: Any) -> tuple[Tensor, Tensor]:
        """Weights as the kernel wants them, for inputs like the first one; others take a little longer."""
        if self._packed is None:
            integers: Tensor = self.weight_codes.T.contiguous() if self._channel else self.weight_codes  # type: ignore[assignment,operator]
            self._packed = pack(integers), torch.zeros(len(integers), dtype=torch.long)
        return self._packed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # packed weights cannot be copied


def int8_layer(layer: nn.Module, how: Activation) -> Int8Layer:
    """The integer form of a layer that has one (`why_not_int8`)."""
    channel = 1 if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") else 0
    return Int8Layer(layer, how, *int8_weight(layer.weight, channel))  # type: ignore[arg-type]
