"""Feature maps: what a network passes from layer to layer, coded.

    codec = features.calibrate(model, samples, bits_per_value=2.0)
    with codec.attach(model) as ledger:
        model(images)
    print(ledger)

Importing this imports no torch; it comes with the first name that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transquant.features.calibration import calibrate
    from transquant.features.codec import FeatureCodec, load

__all__ = ["FeatureCodec", "calibrate", "load"]

_LAZY = {"calibrate": "calibration", "load": "codec", "FeatureCodec": "codec"}


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'transquant.features' has no attribute {name!r}")
    return getattr(import_module(f"transquant.features.{_LAZY[name]}"), name)
