"""Weights from .safetensors files."""

from __future__ import annotations

from os import PathLike, fspath

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from transquant.errors import InputError


def load_safetensors(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, by name. Raises InputError."""
    if not fspath(path).endswith(".safetensors"):
        raise InputError(
            f"cannot read weights from {fspath(path)}: allowed are .safetensors (safetensors.torch.save_file writes them)"
        )
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except OSError as error:
        raise InputError(f"cannot read {fspath(path)}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise InputError(f"{fspath(path)} is not a valid .safetensors file: {error}") from None
    return tensors
