"""What compress takes that is no module: files of weights, and what of them is coded."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath

from torch import Tensor

from transquant import modules
from transquant.errors import InputError
from transquant.modules.files import load_tensors
from transquant.records import GRAPH_PREFIX, Plan


def load_weights(path: str | PathLike[str]) -> Mapping[str, Tensor]:
    """The tensors of a file of weights, or those of an .onnx file and its graph. Raises InputError, MissingDependency."""
    if fspath(path).endswith(".onnx"):
        from transquant.export import load_onnx

        return load_onnx(path)
    return load_tensors(path)


def plan_of(state: Mapping[str, Tensor]) -> Plan:
    """The plan of a state dict: all matrices are coded but those that an ONNX file uses otherwise. Raises InputError."""
    exact: Mapping[str, str] = getattr(state, "exact", {})  # of export.OnnxTensors
    for name in state:
        if isinstance(name, str) and name.startswith(GRAPH_PREFIX) and name not in exact:
            raise InputError(f"a tensor is named {name!r:.100}; names that begin with {GRAPH_PREFIX!r} are kept for graphs")
    return modules.plan_state_dict(state, exact)
