"""Runs models in the transform domain, or with weights that become tensors only where they are used; and what that costs."""

from transquant.inference.cache import TensorCache
from transquant.inference.cost import Calls, Cost, count_calls, count_macs, measure, tensor_bytes
from transquant.inference.on_demand import put_on_demand
from transquant.inference.two_layers import TransformDomain, two_layers

__all__ = [
    "Calls",
    "Cost",
    "TensorCache",
    "TransformDomain",
    "count_calls",
    "count_macs",
    "measure",
    "put_on_demand",
    "tensor_bytes",
    "two_layers",
]
