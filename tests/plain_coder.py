"""A test double of features.records.MapCoder: one step a channel, symbols of two bytes each, packed with zlib."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch

from transquant.errors import CorruptFile
from transquant.features import registry
from transquant.features.codec import FeatureCodec
from transquant.features.points import replacing


@dataclass(frozen=True)
class PlainCoder:
    steps: np.ndarray
    before: bool = False
    kind = "plain"
    components = None

    @property
    def mode(self):
        return "before" if self.before else "after"

    def quantize(self, values):
        return np.clip(np.rint(values / self.steps[:, None, None]), -32768, 32767).astype(np.int32)

    def dequantize(self, symbols):
        return symbols.astype(np.float32) * self.steps[:, None, None]

    def encode(self, symbols):
        return zlib.compress(symbols.astype("<i2").tobytes())

    def decode(self, data, height, width):
        count = len(self.steps) * height * width
        try:
            raw = zlib.decompressobj().decompress(data, 2 * count + 1)
        except zlib.error as error:
            raise CorruptFile(f"the payload is no zlib stream: {error}") from None
        if len(raw) != 2 * count:
            raise CorruptFile(f"the payload has {len(raw)} bytes, expected {2 * count}")
        return np.frombuffer(raw, "<i2").astype(np.int32).reshape(len(self.steps), height, width)

    def ideal_bits(self, symbols):
        _, counts = np.unique(symbols, return_counts=True)
        return float(-(counts * np.log2(counts / counts.sum())).sum())

    def state(self):
        return {"before": self.before}, {"steps": self.steps}


def from_state(settings, arrays):
    return PlainCoder(arrays["steps"], settings["before"])


registry.KINDS["plain"] = from_state


def points_of(model, batch):
    """The points of a network, in execution order."""
    points = []

    def replace(point, tensor, activation):
        points.append(point)
        return activation(tensor)

    with torch.no_grad(), replacing(model, replace):
        model(batch)
    return points


def plain_codec(model, batch, step=0.05, before=False, **settings):
    """A codec with a plain coder at each point of a network."""
    pairs = [
        (p, PlainCoder(np.full(p.channels, step, np.float32), before and p.clips))
        for p in points_of(model, batch)
        if p.name not in settings.get("uncoded", ())
    ]
    return FeatureCodec(pairs, settings)
