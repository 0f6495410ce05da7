"""One network on two machines: the device sends a packet a sample, the server goes on from there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from transquant.errors import InputError
from transquant.features.codec import FeatureCodec
from transquant.features.coded_point import CodedPoint
from transquant.features.cuts import Traced
from transquant.features.folding import Folder, ending
from transquant.features.maps import from_maps
from transquant.records import Limits
from transquant.workers import spread


class Device(nn.Module):
    """The first half. `network`: a module with the original names of its parameters; `coded`: the point that is sent."""

    def __init__(self, network: fx.GraphModule, coded: CodedPoint) -> None:
        super().__init__()
        self.network, self.coded = network, coded
        components = coded.coder.components
        self._folder = None if components is None else Folder(components, coded.point)

    @property
    def folded(self) -> fx.GraphModule | None:
        """What `encode` runs instead of `network` where the coder's transform goes into the last layer (folding.py), else None.
        It is made on the first use, and again when weights in `network` have changed."""
        return None if self._folder is None else self._folder(self.network)

    def encode(self, x: Tensor) -> list[bytes]:
        """A packet for each sample of a batch (N, ...). Raises InputError for an empty batch, for maps that are not finite."""
        if x.ndim == 0 or len(x) == 0:
            raise InputError(f"a batch of shape {tuple(x.shape)} has no samples")
        coder, folded = self.coded.coder, self.folded
        components = None if folded is None else coder.components
        with torch.no_grad():
            tensor = self.network(x) if folded is None else folded(x)
        maps, lengths = self.coded.maps(tensor, None if components is None else len(components.analysis))
        symbols = coder.quantize if components is None else components.quantize
        return spread(lambda sample: self.coded.packet(symbols(sample), lengths), list(maps), True)

    def forward(self, x: Tensor) -> list[bytes]:
        """`encode`."""
        return self.encode(x)

    def extra_repr(self) -> str:
        """The point, what is sent of its channels, and where the transform is done."""
        point, components = self.coded.point, self.coded.coder.components
        if components is None:
            return f"{point.name}: {point.channels} channels"
        end = ending(self.network, point)
        where = "not folded" if end is None else f"folded into {end.path}"
        return f"{point.name}: {len(components.analysis)} components of {point.channels} channels, {where}"


class Server(nn.Module):
    """The second half. `network`: a module with the original names of its parameters; `coded`: the point that arrives."""

    def __init__(self, network: fx.GraphModule, coded: CodedPoint) -> None:
        super().__init__()
        self.network, self.coded = network, coded

    def decode(self, packets: bytes | Sequence[bytes], limits: Limits | None = None) -> Any:
        """What the network returns for the samples of one packet or several, as one batch.

        Raises CorruptFile for packets that are damaged, of another codec or another point, LimitExceeded for maps larger than the
        limits allow, InputError for none, or for maps that differ in size."""
        packets = [packets] if isinstance(packets, bytes) else list(packets)
        if not packets:
            raise InputError("there are no packets to decode")
        done = spread(lambda data: self.coded.decode(data, limits or Limits()), packets, True)
        sizes = sorted({lengths for _, lengths in done})
        if len(sizes) > 1:
            raise InputError(f"packets of one batch have maps of {sizes[0]} and {sizes[1]}; decode them apart")
        features = from_maps(np.stack([values for values, _ in done]), sizes[0], self.coded.point.axis)
        own = next((p for p in self.network.parameters() if p.is_floating_point()), features)
        with torch.no_grad():
            return self.network(features.to(own.device, own.dtype))

    def forward(self, packets: bytes | Sequence[bytes]) -> Any:
        """`decode`."""
        return self.decode(packets)


def split(codec: FeatureCodec, model: nn.Module, at: str) -> tuple[Device, Server]:
    """See `FeatureCodec.split`."""
    traced = Traced(model)
    cuts = {c.point.name: c for c in codec.coded if c.point.name in traced.points and traced.clean(traced.points[c.point.name])}
    names = {traced.name(traced.points[point], point): point for point in cuts}
    if at in cuts:
        chosen = at
    else:
        results = traced.results.get(at, [])
        chosen = next((point for point in cuts if results == [traced.points[point]]), "")
    if not chosen:
        raise InputError(f"the network cannot be cut at {at!r}: {_reason(codec, traced, at)}; {_listed(names)}")
    cut, coded = traced.points[chosen], cuts[chosen]
    return Device(traced.before(cut, not coded.coder.before), coded), Server(traced.behind(cut), coded)


def _reason(codec: FeatureCodec, traced: Traced, at: str) -> str:
    """Why this is no place to cut."""
    if at in traced.points:
        nodes = [traced.points[at]]
    elif at in traced.results:
        nodes = traced.results[at]
    else:
        return "no module has this path and returns a tensor"
    if len(nodes) > 1:
        return f"the module is run {len(nodes)} times"
    known = {c.point.name for c in codec.coded}
    if not any(node is nodes[0] and name in known for name, node in traced.points.items()):
        return "its result is not the map of a point that the codec has"
    return "not only its result crosses from one half to the other"


def _listed(names: dict[str, str]) -> str:
    """What can be said instead."""
    return f"it can be cut at {', '.join(names)}" if names else "there is no place where one coded map alone crosses"
