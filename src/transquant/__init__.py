"""transquant makes trained neural networks small: one call, one file of the size you ask for, bit-exact decoding.

    import transquant as tq
    compressed = tq.compress(model, calibration, bits=2.0)
    compressed.save("net.tq")
    tq.load("net.tq").install(model)

Importing the package imports neither torch nor numba; they come with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transquant import errors
from transquant.records import Limits
from transquant.report import Report

if TYPE_CHECKING:
    from transquant import features, integrations, pruning, reader, training
    from transquant.codec import CompressedModel, compress, load
    from transquant.searching import SearchResult, search

__version__ = "0.1.0"
__all__ = [
    "CompressedModel",
    "Limits",
    "Report",
    "SearchResult",
    "__version__",
    "compress",
    "errors",
    "features",
    "integrations",
    "load",
    "pruning",
    "reader",
    "search",
    "training",
]

_LAZY = {
    "compress": "codec",
    "load": "codec",
    "CompressedModel": "codec",
    "SearchResult": "searching",
    "search": "searching",
    "reader": "",
    "features": "",
    "integrations": "",
    "pruning": "",
    "training": "",
}


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'transquant' has no attribute {name!r}")
    if not _LAZY[name]:
        return import_module(f"transquant.{name}")
    return getattr(import_module(f"transquant.{_LAZY[name]}"), name)
