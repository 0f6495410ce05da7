"""Fingerprints of what a result depends on: numbers, text, arrays, tensors, and records of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

_SIZE = 20  # bytes


def fingerprint(*parts: object) -> bytes:
    """20 bytes that differ where anything in the parts does: type, shape, dtype or value. Of objects it knows nothing of it
    sees the class and the attributes."""
    hasher = blake2b(digest_size=_SIZE)
    _feed(hasher, parts, set())
    return hasher.digest()


def _feed(hasher: Any, value: object, above: set[int]) -> None:
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic | torch.dtype):
        _text(hasher, f"{type(value).__name__} {value!r}")
    elif isinstance(value, torch.Tensor):
        dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
        flat = dense.cpu().contiguous().reshape(-1)
        _text(hasher, f"tensor {value.dtype} {tuple(value.shape)}")
        hasher.update(flat.view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        _text(hasher, f"array {value.dtype.str} {value.shape}")
        hasher.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    else:
        _feed_parts(hasher, value, above)


def _feed_parts(hasher: Any, value: object, above: set[int]) -> None:
    if id(value) in above:  # it holds itself
        _text(hasher, "cycle")
        return
    above = above | {id(value)}
    children: Iterable[object]
    if isinstance(value, Mapping):  # one after the other: they may be read when they are asked for
        number, children = 2 * len(value), (part for pair in value.items() for part in pair)
    elif isinstance(value, list | tuple):
        number, children = len(value), value
    elif is_dataclass(value):
        number, children = len(fields(value)), (getattr(value, f.name) for f in fields(value))
    else:
        attributes = getattr(value, "__dict__", {})
        number, children = 2 * len(attributes), (part for pair in attributes.items() for part in pair)
    _text(hasher, f"{type(value).__qualname__} of {number}")
    for child in children:
        _feed(hasher, child, above)


def _text(hasher: Any, text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    hasher.update(len(data).to_bytes(8, "little"))
    hasher.update(data)
