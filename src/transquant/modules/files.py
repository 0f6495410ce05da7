"""Weights from files: .safetensors, and what torch.save wrote of a state dict."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from transquant.errors import InputError

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
WRAPPERS = ("state_dict", "model", "model_state_dict")  # under which checkpoints keep the state dict


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a .safetensors file, by name. Each is mapped anew whenever it is asked for, so that none stays in memory
    longer than it is used, and no two share any. Raises InputError."""

    def __init__(self, path: str | PathLike[str]) -> None:
        self._path = fspath(path)
        with _opened(self._path) as file:
            self._names = dict.fromkeys(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with _opened(self._path) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_tensors(path: str | PathLike[str]) -> Mapping[str, Tensor]:
    """The tensors of a file, by name: of .safetensors, read when they are asked for; or of .pt, .pth and .bin, a state dict or a
    checkpoint with one under "state_dict", "model" or "model_state_dict", mapped where torch can. No code of a file is run.

    Raises InputError."""
    name = fspath(path)
    if name.endswith(".safetensors"):
        return TensorFile(path)
    if name.endswith(TORCH_SUFFIXES):
        return _state_dict(name, _unpickled(name))
    raise InputError(f"cannot read weights from {name}: allowed are {', '.join(SUFFIXES)} and .onnx")


def _opened(path: str) -> safe_open:
    try:
        return safe_open(path, "pt")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise InputError(f"{path} is not a valid .safetensors file: {error}") from None


def _unpickled(path: str) -> Any:
    """What torch.save wrote, as long as it is made of tensors, numbers, strings and containers."""
    try:
        open(path, "rb").close()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of archives that it refuses at once
            # files of before torch 1.6 are no archives, and cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception:  # damaged bytes lead to errors of every kind
        raise InputError(
            f"{path} is damaged or no state dict: only state dicts are read, since pickled modules and other objects can run code; "
            "torch.save(model.state_dict(), ...) writes one"
        ) from None


def _state_dict(path: str, value: Any) -> Mapping[str, Tensor]:
    """The state dict that a file holds, as it is or under one of the usual keys."""
    if _is_state_dict(value):
        return dict(value)
    found = [k for k in WRAPPERS if isinstance(value, Mapping) and _is_state_dict(value.get(k))]
    if len(found) == 1:
        return dict(value[found[0]])
    if found:
        raise InputError(f"{path} has a state dict under each of {' and '.join(map(repr, found))}: save the one that is meant")
    what = f"a {type(value).__name__}"
    if isinstance(value, Mapping):
        other = next((f"{k!r}, a {type(v).__name__}" for k, v in value.items() if not isinstance(v, Tensor)), "nothing")
        what = f"a dictionary with {other}"
    raise InputError(
        f"{path} holds {what}; expected tensors by name, as they are or under one of {', '.join(map(repr, WRAPPERS))}: "
        "torch.save(model.state_dict(), ...) writes them"
    )


def _is_state_dict(value: Any) -> bool:
    entries = value.items() if isinstance(value, Mapping) else ()
    return bool(entries) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in entries)
