"""Weights of a graph as integers with scales, behind DequantizeLinear, rounded anew from the float values."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transquant.export.graphs import weight_uses
from transquant.export.library import library

BLOCK = 32  # inputs that share a scale of int4
RANGES = {"int8": (-128, 127), "int4": (-8, 7)}
TRIED = {"int8": np.linspace(0.80, 1.0, 21), "int4": np.linspace(0.40, 1.1, 29)}  # scales, of largest value / largest code
PIECE = 1 << 22  # weights whose scales are found at a time

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ExportedWeight:
    """A weight of an exported graph. `name` is that of the graph; `form` "float", "int8" or "int4"; `scales` how many it has;
    `relative_error` is ‖W − Ŵ‖ / ‖W‖ against the decoded weight, 0 for floats."""

    name: str
    shape: tuple[int, ...]
    form: str
    scales: int = 0
    relative_error: float = 0.0


def with_integers(model: Any, form: str) -> tuple[ExportedWeight, ...]:
    """Change a graph's float32 weights to `form` in place, and say how far off each is.

    int8: one scale an output channel. int4: one scale for each 32 inputs of an output channel (fewer at the end). No zero points;
    scales are those, among some two dozen and after a least-squares step for each, with the smallest squared error."""
    onnx = library()
    graph = model.graph
    uses = weight_uses(graph)
    records: list[ExportedWeight] = []
    initialisers, nodes = [], []
    for tensor in graph.initializer:
        shape = tuple(tensor.dims)
        if tensor.name not in uses or len(shape) < 2 or tensor.data_type != onnx.TensorProto.FLOAT or not prod(shape):
            initialisers.append(tensor)
            continue
        if form == "float":
            records.append(ExportedWeight(tensor.name, shape, form))
            initialisers.append(tensor)
            continue
        axis = _output_axis(uses[tensor.name], len(shape))
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        if form == "int8":
            own, more, decoded = _int8(onnx, tensor.name, values, axis)
        else:
            use = uses[tensor.name]
            own, more, decoded = _int4(onnx, tensor.name, values, axis, use is not None and use[0] == "ConvTranspose")
        initialisers += own
        nodes += more
        error = float(np.linalg.norm((values - decoded).ravel()) / max(float(np.linalg.norm(values.ravel())), 1e-30))
        records.append(ExportedWeight(tensor.name, shape, form, prod(own[1].dims), error))
    if form != "float":
        rest = [*nodes, *graph.node]
        kept = [onnx.TensorProto.FromString(t.SerializeToString()) for t in initialisers]
        del graph.initializer[:], graph.node[:]
        graph.initializer.extend(kept)
        graph.node.extend(rest)
    return tuple(records)


def rounded(rows: Floats, form: str) -> tuple[NDArray[np.int8], Floats]:
    """(codes, scales) of rows (m, n) with a scale each, of the smallest squared error among those tried."""
    low, high = RANGES[form]
    codes, scales = np.zeros(rows.shape, np.int8), np.ones(len(rows), np.float32)
    step = max(1, PIECE // max(rows.shape[1], 1))
    for first in range(0, len(rows), step):
        part = rows[first : first + step].astype(np.float64)
        largest = np.abs(part).max(1, initial=0)
        best = np.full(len(part), np.inf)
        for factor in TRIED[form]:
            scale = np.maximum(factor * largest / high, 1e-30)
            code = np.clip(np.rint(part / scale[:, None]), low, high)
            energy = (code**2).sum(1)
            fitted = np.where(energy > 0, (part * code).sum(1) / np.maximum(energy, 1), 1).astype(np.float32)
            error = ((part - code * fitted[:, None]) ** 2).sum(1)
            better = error < best
            best[better] = error[better]
            codes[first : first + step][better] = code[better].astype(np.int8)
            scales[first : first + step][better] = fitted[better]
    return codes, scales


def _output_axis(use: tuple[str, int, Any] | None, ndim: int) -> int:
    """Along which axis a weight has its output channels; the first where it is moved before use, as torch has it."""
    if use is None:
        return 0
    operator, position, node = use
    if operator == "Gemm":
        return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    if operator == "MatMul":
        return ndim - 1 if position == 1 else ndim - 2
    return {"ConvTranspose": 1, "LSTM": 1, "GRU": 1, "RNN": 1}.get(operator, 0)


def _int8(onnx: Any, name: str, values: Floats, axis: int) -> tuple[list[Any], list[Any], Floats]:
    rows = np.moveaxis(values, axis, 0)
    codes, scales = rounded(rows.reshape(len(rows), -1), "int8")
    decoded = codes.astype(np.float32) * scales[:, None]
    whole = np.ascontiguousarray(np.moveaxis(codes.reshape(rows.shape), 0, axis))
    own = [onnx.numpy_helper.from_array(whole, f"{name}_int8"), onnx.numpy_helper.from_array(scales, f"{name}_scale")]
    node = onnx.helper.make_node("DequantizeLinear", [t.name for t in own], [name], name=f"{name}_dequantize", axis=axis)
    return own, [node], np.moveaxis(decoded.reshape(rows.shape), 0, axis)


def _int4(onnx: Any, name: str, values: Floats, axis: int, transposed: bool) -> tuple[list[Any], list[Any], Floats]:
    """Blocks along the inputs of a matrix, in whose shape the codes are stored."""
    if axis == 0 or (axis == values.ndim - 2 and not transposed):  # outputs, or directions and outputs, by inputs
        first, matrix = True, values.reshape(len(values), -1) if axis == 0 else values.reshape(-1, values.shape[-1])
    else:
        first, matrix = False, values.reshape(len(values), -1) if transposed else values.reshape(-1, values.shape[-1])
    rows = matrix if first else matrix.T
    count = -(-rows.shape[1] // BLOCK)
    padded = np.zeros((len(rows), count * BLOCK), np.float32)
    padded[:, : rows.shape[1]] = rows
    codes, scales = rounded(padded.reshape(-1, BLOCK), "int4")
    decoded = (codes.astype(np.float32) * scales[:, None]).reshape(len(rows), -1)[:, : rows.shape[1]]
    codes, scales = codes.reshape(len(rows), -1)[:, : rows.shape[1]], scales.reshape(len(rows), count)
    if not first:
        codes, scales, decoded = codes.T, scales.T, decoded.T
    code = onnx.TensorProto(name=f"{name}_int4", data_type=onnx.TensorProto.INT4, dims=matrix.shape, raw_data=_packed(codes))
    own = [code, onnx.numpy_helper.from_array(np.ascontiguousarray(scales), f"{name}_scale")]
    flat = f"{name}_matrix" if values.ndim > 2 else name
    nodes = [
        onnx.helper.make_node(
            "DequantizeLinear", [t.name for t in own], [flat], name=f"{name}_dequantize", axis=int(first), block_size=BLOCK
        )
    ]
    if values.ndim > 2:
        own.append(onnx.numpy_helper.from_array(np.array(values.shape, np.int64), f"{name}_shape"))
        nodes.append(onnx.helper.make_node("Reshape", [flat, own[2].name], [name], name=f"{name}_reshape"))
    return own, nodes, decoded.reshape(values.shape)


def _packed(codes: NDArray[np.int8]) -> bytes:
    """Two codes a byte, the first in the low half."""
    flat = codes.reshape(-1).astype(np.uint8) & 15
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return bytes((flat[0::2] | (flat[1::2] << 4)).astype(np.uint8))
