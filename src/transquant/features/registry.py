"""Which methods of coding a map codec files may name, and what makes a coder of each again."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from transquant.errors import UnsupportedVersion
from transquant.features.records import Arrays, FromState, MapCoder, Settings

KINDS: dict[str, str | FromState] = {
    "predictive": "transquant.features.predictive",
    "pca": "transquant.features.pca",
    "dct-masks": "transquant.features.dct_masks",
}
"""By `MapCoder.kind`: the module whose function `from_state` does it, imported when a file asks for it; or such a function."""


def from_state(kind: str, settings: Settings, arrays: Arrays) -> MapCoder:
    """The coder that gave this state. Raises UnsupportedVersion for a kind of a newer version, and what the coder's own does."""
    maker = KINDS.get(kind)
    if maker is None:
        raise UnsupportedVersion(f"a point's coder is {kind!r:.60}, which needs a newer version of transquant")
    if isinstance(maker, str):
        maker = cast(FromState, import_module(maker).from_state)
    return maker(settings, arrays)
