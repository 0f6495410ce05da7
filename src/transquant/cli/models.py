"""Models and weights named on the command line."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from transquant.cli.zoo import LIBRARIES, from_library
from transquant.errors import InputError
from transquant.inputs import load_weights
from transquant.modules import install

PARALLEL = "module."
SOURCES = "FILE.py:FACTORY, " + ", ".join(f"{library}:NAME" for library in LIBRARIES)


def load_model(model: str | None, weights: Path | None, pretrained: bool = True) -> nn.Module | Mapping[str, Tensor]:
    """The module of FILE.py:FACTORY or of another library (timm:NAME, torchvision:NAME, hf:FOLDER_OR_NAME) with the weights of a
    file in it; the file's tensors where no model is named. Without a file another library's network has that library's own
    weights or, where `pretrained` is false, any. Raises InputError, MissingDependency."""
    if model is None:
        if weights is None:
            raise InputError(
                f"give a model: --model {SOURCES}, --weights FILE.safetensors or FILE.pt, or both; or --weights FILE.onnx"
            )
        return load_weights(weights)
    if weights is not None and weights.suffix == ".onnx":
        raise InputError(f"--weights {weights} is a network by itself: give it without --model")
    module = from_library(model, pretrained and weights is None)
    if module is None:
        module = _from_file(model)
    if weights is not None:
        install(module, _fitting(load_weights(weights), module))
    return module.eval()


def _from_file(model: str) -> nn.Module:
    module = returned(model, "--model", "factory")
    if not isinstance(module, nn.Module):
        raise InputError(f"the factory of --model {model} returned a {type(module).__name__}, expected an nn.Module")
    return module


def _fitting(weights: Mapping[str, Tensor], module: nn.Module) -> Mapping[str, Tensor]:
    """The tensors of a file under the model's names, with those that files often leave out: BatchNorm's counters, and second
    names of tied tensors."""
    state, own = dict(weights), module.state_dict(keep_vars=True)
    if all(k.startswith(PARALLEL) for k in state) and not any(k in own for k in state):
        state = {k.removeprefix(PARALLEL): v for k, v in state.items()}  # the file is of a DataParallel, the model is not
    known = {id(own[k]): v for k, v in state.items() if k in own}
    for key, value in own.items():
        if id(value) in known:
            state.setdefault(key, known[id(value)])
        elif key.endswith("num_batches_tracked"):
            state.setdefault(key, value)
    return state


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
    with _found(source, option) as function:
        return function()


def named(source: str, option: str) -> Callable[..., Any]:
    """The function in "FILE.py:FUNCTION" itself. Raises InputError."""
    with _found(source, option) as function:
        return function


@contextmanager
def _found(source: str, option: str) -> Iterator[Callable[..., Any]]:
    file, colon, name = source.rpartition(":")
    if not colon or not file.endswith(".py") or not name:
        others = f" or {', '.join(f'{library}:NAME' for library in LIBRARIES)}" if option == "--model" else ""
        raise InputError(f"{option} is {source!r}, expected FILE.py:FUNCTION{others}")
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
        yield function
    finally:
        sys.path.pop(0)
