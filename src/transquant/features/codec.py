"""A codec of a network's feature maps: a coder for each of its points.

attach:  map → quantize → encode → packet → decode → dequantize → (activation's clip) → the network goes on
split:   device: network up to a point → packets;   server: packets → the rest of the network
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import nn

from transquant.container import read_file, write_file
from transquant.errors import FileError, InputError
from transquant.features.attach import attached
from transquant.features.codec_file import codec_bytes, read_codec
from transquant.features.coded_point import CodedPoint
from transquant.features.ledger import Ledger
from transquant.features.packets import FINGERPRINT
from transquant.features.records import MapCoder, Point
from transquant.records import Limits

if TYPE_CHECKING:
    from transquant.features.split import Device, Server

UNCODED = "uncoded"


class FeatureCodec:
    """Coders by point, in the order in which the network comes by them.

    `settings`: what JSON can hold, for whoever looks at the codec later; under "uncoded" names of points that have no coder and are
    left as they are. `data`: the bytes of the codec file. The same coders and settings give the same bytes."""

    def __init__(self, coders: Mapping[Point, MapCoder] | Iterable[tuple[Point, MapCoder]], settings: Mapping[str, Any]) -> None:
        pairs = list(coders.items() if isinstance(coders, Mapping) else coders)
        names = [point.name for point, _ in pairs]
        if not pairs or len(set(names)) != len(names):
            raise InputError(
                f"a codec needs a coder for each of one or more points, given are {len(set(names))} different of {len(names)}"
            )
        for point, coder in pairs:
            if coder.before and not point.clips:
                raise InputError(
                    f"the coder at {point.name!r} codes what goes into {point.activation}, allowed is what comes out of it"
                )
        self.settings = dict(settings)
        self.data, digest = codec_bytes(pairs, self.settings)
        self.fingerprint = digest[:FINGERPRINT]
        self.coded = [CodedPoint(point, coder, number, self.fingerprint) for number, (point, coder) in enumerate(pairs)]

    @property
    def points(self) -> tuple[Point, ...]:
        """In execution order."""
        return tuple(c.point for c in self.coded)

    @property
    def coders(self) -> tuple[MapCoder, ...]:
        """Of the points, in their order."""
        return tuple(c.coder for c in self.coded)

    def __repr__(self) -> str:
        kinds = ", ".join(sorted({coder.kind for coder in self.coders}))
        return f"FeatureCodec({len(self.coded)} points, {kinds}, {len(self.data):,} bytes, fingerprint {self.fingerprint.hex()})"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: what `repr` says, settings, and each point with its mode."""
        points = [{"name": c.point.name, "channels": c.point.channels, "mode": c.coder.mode} for c in self.coded]
        return {"bytes": len(self.data), "fingerprint": self.fingerprint.hex(), "settings": self.settings, "points": points}

    @contextmanager
    def attach(self, model: nn.Module, only: Iterable[str] | None = None) -> Iterator[Ledger]:
        """Within, every sample's map at every point passes through a packet and the network goes on with what comes out; yields the
        Ledger, which grows with every forward pass. Afterwards the network is as it was. No gradients pass a coded map.

        `only`: names of points that are coded, all others left as they are. Raises InputError where the network is not the one that
        was calibrated, and for maps that are empty or not finite, within the forward pass."""
        names = [c.point.name for c in self.coded]
        chosen = set(names) if only is None else set(only)
        if unknown := sorted(chosen - set(names)):
            raise InputError(f"the codec has no point {unknown[0]!r}; its points are {', '.join(names)}")
        left = (set(names) - chosen) | set(self.settings.get(UNCODED, ()))
        with attached(model, [c for c in self.coded if c.point.name in chosen], frozenset(left)) as ledger:
            yield ledger

    def split(self, model: nn.Module, at: str) -> tuple[Device, Server]:
        """Two networks: one up to the point where `at` ends, one from there on (docs/features.md).

        `at`: path of a module whose result is a coded map ("layer2.1"), or a point's name. Raises InputError, with the places where
        the network can be cut."""
        from transquant.features.split import split

        return split(self, model, at)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the codec file; it appears whole or not at all. Raises OutputError."""
        write_file(path, self.data)

    @classmethod
    def load(cls, path: str | PathLike[str], limits: Limits | None = None) -> FeatureCodec:
        """Read a codec file and check all of it. Raises InputError where it cannot be read, CorruptFile, UnsupportedVersion, and
        LimitExceeded for a file larger than the limits."""
        data = read_file(path, limits)
        try:
            return cls(*read_codec(data))
        except FileError as error:
            error.args = (f"{path}: {error}",)
            raise


def load(path: str | PathLike[str], limits: Limits | None = None) -> FeatureCodec:
    """Read a codec file. Raises as `FeatureCodec.load` does."""
    return FeatureCodec.load(path, limits)
