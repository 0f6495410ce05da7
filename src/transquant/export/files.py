"""ONNX files as state dicts and back: tensors are taken out, the graph stays with hollow ones in their places (FORMAT.md
section 8)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from os import PathLike, fspath
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from transquant.errors import CorruptFile, InputError, LimitExceeded
from transquant.export.graphs import STANDARD, WEIGHTS, Stored, nested, stored, weight_uses
from transquant.export.library import MOST_BYTES, clean, first_line, library, messages
from transquant.records import GRAPH, GRAPH_PREFIX

T = TypeVar("T")

DTYPES = {  # ONNX's names of the dtypes that a file can hold
    "FLOAT": torch.float32, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16, "DOUBLE": torch.float64,
    "INT8": torch.int8, "INT16": torch.int16, "INT32": torch.int32, "INT64": torch.int64, "BOOL": torch.bool,
    "UINT8": torch.uint8, "UINT16": torch.uint16, "UINT32": torch.uint32, "UINT64": torch.uint64,
}  # fmt: skip
DATA = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
COST = 256  # bytes of memory that a byte of a graph takes at most, in empty nodes, parsed here and in the checker
FEW = 32  # integers of fewer elements (shapes, axes) stay in the graph, where they take less than an entry


class OnnxTensors(dict[str, Tensor]):
    """Tensors of an ONNX file by name, after its graph (uint8, named `records.GRAPH`). `exact` says of some why they are not
    to be coded."""

    exact: dict[str, str]


def load_onnx(path: str | PathLike[str]) -> OnnxTensors:
    """Read an .onnx file, with the files beside it that hold its weights if there are any.

    Initialisers, and constants that are weights, become tensors in their own shapes and dtypes; what is no weight of a
    convolution, matrix product, embedding or recurrent layer is to be kept exactly. Raises InputError where the file cannot be
    read, fails ONNX's own checker, or is larger than 2 GiB; MissingDependency."""
    onnx = library()
    try:
        model = onnx.load(fspath(path))
    except OSError as error:
        raise InputError(f"cannot read {fspath(path)}: {error.strerror or error}") from None
    except Exception as error:  # whatever broken bytes, or names of files beside, make of it
        raise InputError(f"{fspath(path)} is not a valid .onnx file: {first_line(error)}") from None
    if model.ByteSize() > MOST_BYTES:
        raise InputError(f"{fspath(path)} has {model.ByteSize():,} bytes of graph and weights, allowed are at most 2 GiB")
    try:
        onnx.checker.check_model(model)
        tensors = _taken_out(model)
    except Exception as error:
        raise InputError(f"{fspath(path)} is not a valid .onnx file: {first_line(error)}") from None
    if all(name in tensors.exact for name in tensors):
        raise InputError(f"{fspath(path)} has no weight to code: coded are matrices of floats that {', '.join(WEIGHTS)} use")
    return tensors


def restored(graph: Tensor, tensors: Mapping[str, Tensor], room: int) -> bytes:
    """The bytes of the ONNX file whose graph and tensors these are; parsing the graph may take `room` bytes of memory.

    Raises CorruptFile where they are not, LimitExceeded, MissingDependency."""
    onnx = library()
    if graph.dtype != torch.uint8 or graph.ndim != 1:
        raise CorruptFile(f"the file's ONNX graph is a {graph.dtype} of shape {tuple(graph.shape)}, expected bytes")
    if COST * graph.numel() > room:
        raise LimitExceeded(
            f"the file's ONNX graph of {graph.numel()} bytes may take {COST} times as much memory, the limits allow {room} bytes; "
            "raise Limits(max_decoded_bytes=..., max_expansion=...) if you trust the file"
        )
    try:
        model = onnx.load_from_string(graph.numpy().tobytes())
        _fill(model, tensors)
        if model.ByteSize() > MOST_BYTES:
            raise CorruptFile(f"the file's ONNX graph has {model.ByteSize():,} bytes, allowed are at most 2 GiB")
        onnx.checker.check_model(model)
    except CorruptFile:
        raise
    except Exception as error:  # of protobuf or of ONNX's checker, and names that are no text
        raise CorruptFile(f"the file's ONNX graph is not valid: {first_line(error)}") from None
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _fill(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put values into the hollow tensors of a graph. Raises CorruptFile where any is missing, of another shape, or left."""
    onnx = library()
    dtypes = {onnx.TensorProto.DataType.Value(name): dtype for name, dtype in DTYPES.items()}
    if any(isinstance(m, onnx.TensorProto) and (m.external_data or m.data_location) for m in messages(model)):
        raise CorruptFile("the file's ONNX graph refers to data outside the file")
    left = dict(tensors)
    for name, hollow in _named((s.name, s.tensor) for s in stored(model.graph) if _is_hollow(s.tensor)):
        value = left.pop(name, None)
        if value is None:
            raise CorruptFile(f"the file's ONNX graph has a tensor {name!r:.100} that the file does not hold")
        if tuple(value.shape) != tuple(hollow.dims) or value.dtype != dtypes.get(hollow.data_type):
            raise CorruptFile(f"the tensor {name!r:.100} is not of the shape and dtype that the file's ONNX graph asks for")
        hollow.raw_data = _bytes(value)
    if left:
        raise CorruptFile(f"the file's ONNX graph has no tensor {next(iter(left))!r:.100}")


def _taken_out(model: Any) -> OnnxTensors:
    """Tensors out of a graph, which becomes one of them: the first."""
    onnx = library()
    dtypes = {onnx.TensorProto.DataType.Value(name): dtype for name, dtype in DTYPES.items()}
    clean(model)
    for part in messages(model):
        if isinstance(part, onnx.TensorProto):
            part.ClearField("data_location")  # all is here now
    graphs = list(nested(model.graph))
    if all(node.domain in STANDARD for graph in graphs for node in graph.node):
        for graph in graphs:
            graph.ClearField("value_info")  # shapes between the nodes: a third of a graph, and any runtime infers them
    taken: list[tuple[str, tuple[Stored, Tensor]]] = []
    for item in stored(model.graph, weight_uses):
        if item.tensor.data_type in dtypes and prod(item.tensor.dims) > 0 and _is_name(item.name):
            value = _value(onnx.numpy_helper.to_array(item.tensor))
            if _goes(item, value):
                taken.append((item.name, (item, value)))
    tensors, exact = {}, {GRAPH: "the network's graph"}
    for name, (item, value) in _named(taken):
        tensors[name] = value
        if not (item.weight and value.is_floating_point() and value.ndim > 1):
            exact[name] = "no weight of a coded operator"
        for field in DATA:
            item.tensor.ClearField(field)
    graph = np.frombuffer(model.SerializeToString(deterministic=True), np.uint8)
    result = OnnxTensors({GRAPH: torch.from_numpy(graph.copy()), **tensors})
    result.exact = exact
    return result


def _goes(item: Stored, value: Tensor) -> bool:
    """Whether a tensor goes out of the graph: weights do, and initialisers that are worth an entry. Masks of infinities stay."""
    real = value.is_floating_point()
    if item.weight and real and value.ndim > 1:
        return True
    finite = not real or bool(torch.isfinite(value).all())
    return item.initialiser and finite and (value.numel() >= FEW or (real and value.ndim > 0))


def _is_name(name: str | bytes) -> bool:  # bytes are what protobuf makes of text that is none
    return (
        isinstance(name, str)
        and name.isprintable()
        and 0 < len(name.encode("utf-8", "replace")) <= 500
        and not name.startswith(GRAPH_PREFIX)
    )


def _named(tensors: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """The same tensors, each with a name of its own."""
    counts: dict[str, int] = {}
    for name, tensor in tensors:
        own = name
        while own in counts:
            counts[name] += 1
            own = f"{name}#{counts[name]}"
        counts[own] = 1
        yield own, tensor


def _is_hollow(tensor: Any) -> bool:
    return prod(tensor.dims) > 0 and not any(len(getattr(tensor, field)) for field in DATA)


def _value(array: Any) -> Tensor:
    """A tensor of its own from what onnx reads."""
    if array.dtype.name == "bfloat16":  # of the package ml_dtypes
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def _bytes(value: Tensor) -> bytes:
    flat = value.contiguous().reshape(-1)
    array = (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy()
    return array.astype(array.dtype.newbyteorder("<")).tobytes()
