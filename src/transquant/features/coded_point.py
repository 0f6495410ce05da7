"""One point with its coder: maps to packets and back, with everything checked that a receiver cannot know."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from transquant.errors import CorruptFile, InputError, LimitExceeded
from transquant.features.maps import Lengths, pixels, to_maps
from transquant.features.packets import Packet, pack, unpack
from transquant.features.records import FloatMap, IntMap, MapCoder, Point
from transquant.records import Limits


@dataclass(frozen=True, slots=True)
class CodedPoint:
    """`index`: of the point in execution order; `fingerprint`: of the codec that it belongs to."""

    point: Point
    coder: MapCoder
    index: int
    fingerprint: bytes

    def maps(self, tensor: Tensor, channels: int | None = None) -> tuple[FloatMap, Lengths]:
        """A tensor at this point as maps (N, C, H, W), checked; lengths of its axes beside samples and channels. `channels`: how
        many are expected, the point's by default; K of a tensor of components.

        Raises InputError for no samples, no pixels, another number of channels, values that are not finite."""
        name, axis = self.point.name, self.point.axis
        expected = channels or self.point.channels
        if axis >= tensor.ndim or tensor.shape[axis] != expected:
            raise InputError(
                f"the feature map at {name!r} has shape {tuple(tensor.shape)}, expected {expected} channels in axis {axis}"
            )
        if tensor.numel() == 0:
            raise InputError(f"the feature map at {name!r} is empty: it has shape {tuple(tensor.shape)}")
        maps, lengths = to_maps(tensor, axis)
        if not np.isfinite(maps).all():
            raise InputError(f"the feature map at {name!r} has NaN or infinite values")
        return maps, lengths

    def encode(self, values: FloatMap, lengths: Lengths) -> tuple[bytes, IntMap]:
        """The packet of one sample's map float32 (C, H, W), and the symbols (K, H, W) in it."""
        symbols = self.coder.quantize(values)
        return self.packet(symbols, lengths), symbols

    def packet(self, symbols: IntMap, lengths: Lengths) -> bytes:
        """The packet of one sample's symbols int32 (K, H, W)."""
        return pack(self.fingerprint, Packet(self.index, lengths, self.coder.encode(symbols)))

    def decode(self, data: bytes, limits: Limits | None = None) -> tuple[FloatMap, Lengths]:
        """What the network goes on with: float32 (C, H, W) after the activation, and the tensor's other lengths.

        Raises CorruptFile; with `limits`, LimitExceeded for a map that is much larger than its packet explains."""
        packet = unpack(data, self.fingerprint)
        if packet.index != self.index:
            raise CorruptFile(f"the packet is of point {packet.index} of the codec, expected {self.index}, {self.point.name!r}")
        height, width = pixels(packet.lengths)
        if limits is not None:
            _check_size(4 * self.point.channels * height * width, len(data), limits)
        values = self.coder.dequantize(self.coder.decode(packet.payload, height, width))
        return (self.point.activated(values) if self.coder.before else values), packet.lengths


def _check_size(decoded: int, size: int, limits: Limits) -> None:
    most = min(limits.max_decoded_bytes, max(limits.free_expansion_bytes, limits.max_expansion * size))
    if decoded > most:
        raise LimitExceeded(f"a packet of {size} bytes asks for a map of {decoded} bytes, the limit is {most}; see Limits")
