"""Models and weights named on the command line."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from transquant.errors import InputError
from transquant.inputs import load_weights
from transquant.modules import install
from transquant.modules.files import load_safetensors


def load_model(model: str | None, weights: Path | None) -> nn.Module | Mapping[str, Tensor]:
    """The module of FILE.py:FACTORY with the weights of a .safetensors file in it; the tensors of a .safetensors or .onnx file
    where no model is named. Raises InputError."""
    if model is None:
        if weights is None:
            raise InputError("give a model: --model FILE.py:FACTORY, --weights FILE.safetensors, both, or --weights FILE.onnx")
        return load_weights(weights)
    if weights is not None and weights.suffix == ".onnx":
        raise InputError(f"--weights {weights} is a network by itself: give it without --model")
    module = returned(model, "--model", "factory")
    if not isinstance(module, nn.Module):
        raise InputError(f"the factory of --model {model} returned a {type(module).__name__}, expected an nn.Module")
    if weights is not None:
        state = dict(load_safetensors(weights))
        for key, value in module.state_dict().items():  # files often leave BatchNorm's counters out
            if key.endswith("num_batches_tracked"):
                state.setdefault(key, value)
        install(module, state)
    return module.eval()


def returned(source: str, option: str, what: str = "function") -> Any:
    """The result of a function named on the command line, what it raises turned into InputError."""
    try:
        return call(source, option)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the {what} of {option} {source} failed: {type(error).__name__}: {error}") from error


def call(source: str, option: str) -> Any:
    """The result of the function in "FILE.py:FUNCTION", called without arguments. Raises InputError."""
    file, colon, name = source.rpartition(":")
    if not colon or not file.endswith(".py") or not name:
        raise InputError(f"{option} is {source!r}, expected FILE.py:FUNCTION")
    path = Path(file)
    if not path.is_file():
        raise InputError(f"{option}: there is no file {file}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.resolve().parent))  # so that the file's own imports work, also those inside the function
    try:
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise InputError(f"{option}: {file} cannot be imported: {type(error).__name__}: {error}") from error
        function = getattr(module, name, None)
        if not callable(function):
            raise InputError(f"{option}: {file} has no function {name!r}")
        return function()
    finally:
        sys.path.pop(0)
