"""Compressed models in the formats of other libraries. `transformers`: folders that from_pretrained reads and save_pretrained
writes; needs the extra "zoo"."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transquant.integrations import transformers

__all__ = ["transformers"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'transquant.integrations' has no attribute {name!r}")
    return import_module(f"transquant.integrations.{name}")
