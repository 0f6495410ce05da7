"""Runs models in the transform domain, with weights that become tensors only where they are used, or with quantized inputs;
and what that costs."""

from transquant.inference.activations import quantize_input, release_inputs
from transquant.inference.cache import TensorCache
from transquant.inference.cost import Calls, Cost, count_calls, count_macs, measure, tensor_bytes
from transquant.inference.int8 import has_exact_kernels, int8_layer, why_not_int8
from transquant.inference.on_demand import put_on_demand
from transquant.inference.two_layers import TransformDomain, two_layers

__all__ = [
    "Calls",
    "Cost",
    "TensorCache",
    "TransformDomain",
    "count_calls",
    "count_macs",
    "has_exact_kernels",
    "int8_layer",
    "measure",
    "put_on_demand",
    "quantize_input",
    "release_inputs",
    "tensor_bytes",
    "two_layers",
    "why_not_int8",
]
