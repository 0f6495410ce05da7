"""The values that a plan codes, taken out of a state dict as float64 matrices and vectors, and raw bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from transquant.records import BatchNormSpec, FloatArray, Plan, RawSpec, VectorSpec, WeightSpec

T = TypeVar("T")


class OnDemand(Mapping[str, T]):
    """Values that are made whenever they are asked for, and kept nowhere: all of them may be larger than memory."""

    def __init__(self, makers: Mapping[str, Callable[[], T]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> T:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def gather(plan: Plan, state: Mapping[str, Tensor]) -> tuple[Mapping[str, FloatArray], Mapping[str, bytes]]:
    """(values, raw): float64 by name, weights as (O, n), vectors flat, a BatchNorm's "<name>.scale" and "<name>.shift" (C,);
    and the little-endian bytes of the exact tensors. Weights and bytes are taken from the state dict when they are asked for."""
    values: dict[str, Callable[[], FloatArray]] = {}
    raw: dict[str, Callable[[], bytes]] = {}
    for spec in plan.specs:
        if isinstance(spec, WeightSpec):
            values[spec.name] = partial(_matrix, state, spec)
        elif isinstance(spec, VectorSpec):
            values[spec.name] = partial(_same, _array(state[spec.name]).reshape(-1))
        elif isinstance(spec, BatchNormSpec):
            for part, vector in zip(("scale", "shift"), batchnorm_equivalent(spec, state), strict=True):
                values[f"{spec.name}.{part}"] = partial(_same, vector)
        elif isinstance(spec, RawSpec):
            raw[spec.name] = partial(_exact, state, spec)
    return OnDemand(values), OnDemand(raw)


def batchnorm_equivalent(spec: BatchNormSpec, state: Mapping[str, Tensor]) -> tuple[FloatArray, FloatArray]:
    """Scale γ/√(σ²+eps) and shift β − μ·scale, float64 (C,): all that a BatchNorm does in eval mode."""
    weight, bias, mean, variance = (_array(state[spec.key(k)]) for k in ("weight", "bias", "running_mean", "running_var"))
    scale = weight / np.sqrt(variance + spec.eps)
    return scale, bias - mean * scale


def _matrix(state: Mapping[str, Tensor], spec: WeightSpec) -> FloatArray:
    return _array(state[spec.name]).reshape(spec.shape[0], -1)


def _exact(state: Mapping[str, Tensor], spec: RawSpec) -> bytes:
    return _bytes(state[spec.name].to(getattr(torch, spec.dtype)))


def _same(value: T) -> T:
    return value


def _array(tensor: Tensor) -> FloatArray:
    array: FloatArray = tensor.detach().to("cpu", torch.float64).contiguous().numpy()
    return array


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if flat.dtype == torch.bfloat16:
        flat = flat.view(torch.int16)
    array = flat.numpy()
    return array.astype(array.dtype.newbyteorder("<")).tobytes()
