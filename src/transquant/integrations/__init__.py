"""Compressed models in the formats of other libraries. `transformers`: folders that from_pretrained reads and save_pretrained
writes; needs the extra "zoo". `trainer`, `lightning`: callbacks for the training loops of transformers and Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transquant.integrations import lightning, trainer, transformers

__all__ = ["lightning", "trainer", "transformers"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'transquant.integrations' has no attribute {name!r}")
    return import_module(f"transquant.integrations.{name}")
