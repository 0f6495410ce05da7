"""Weights from .safetensors files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike, fspath

from safetensors import SafetensorError, safe_open
from torch import Tensor

from transquant.errors import InputError


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


def load_safetensors(path: str | PathLike[str]) -> TensorFile:
    """The tensors of a .safetensors file, by name, read when they are asked for. Raises InputError."""
    if not fspath(path).endswith(".safetensors"):
        raise InputError(
            f"cannot read weights from {fspath(path)}: allowed are .onnx and .safetensors (safetensors.torch.save_file writes them)"
        )
    return TensorFile(path)


def _opened(path: str) -> safe_open:
    try:
        return safe_open(path, "pt")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise InputError(f"{path} is not a valid .safetensors file: {error}") from None
