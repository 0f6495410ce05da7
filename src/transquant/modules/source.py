"""The values that a plan codes, taken out of a state dict as float64 matrices and vectors, and raw bytes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from transquant.records import BatchNormSpec, FloatArray, Plan, RawSpec, VectorSpec, WeightSpec


def gather(plan: Plan, state: Mapping[str, Tensor]) -> tuple[dict[str, FloatArray], dict[str, bytes]]:
    """(values, raw): float64 by name, weights as (O, n), vectors flat, a BatchNorm's "<name>.scale" and "<name>.shift" (C,);
    and the little-endian bytes of the exact tensors."""
    values: dict[str, FloatArray] = {}
    raw: dict[str, bytes] = {}
    for spec in plan.specs:
        if isinstance(spec, WeightSpec):
            values[spec.name] = _array(state[spec.name]).reshape(spec.shape[0], -1)
        elif isinstance(spec, VectorSpec):
            values[spec.name] = _array(state[spec.name]).reshape(-1)
        elif isinstance(spec, BatchNormSpec):
            scale, shift = batchnorm_equivalent(spec, state)
            values[f"{spec.name}.scale"], values[f"{spec.name}.shift"] = scale, shift
        elif isinstance(spec, RawSpec):
            raw[spec.name] = _bytes(state[spec.name].to(getattr(torch, spec.dtype)))
    return values, raw


def batchnorm_equivalent(spec: BatchNormSpec, state: Mapping[str, Tensor]) -> tuple[FloatArray, FloatArray]:
    """Scale γ/√(σ²+eps) and shift β − μ·scale, float64 (C,): all that a BatchNorm does in eval mode."""
    weight, bias, mean, variance = (_array(state[spec.key(k)]) for k in ("weight", "bias", "running_mean", "running_var"))
    scale = weight / np.sqrt(variance + spec.eps)
    return scale, bias - mean * scale


def _array(tensor: Tensor) -> FloatArray:
    array: FloatArray = tensor.detach().to("cpu", torch.float64).contiguous().numpy()
    return array


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if flat.dtype == torch.bfloat16:
        flat = flat.view(torch.int16)
    array = flat.numpy()
    return array.astype(array.dtype.newbyteorder("<")).tobytes()
