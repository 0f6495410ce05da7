"""A network that goes on with coded maps: within a context, at every point, every sample's map becomes a packet and comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from transquant.errors import InputError
from transquant.features.coded_point import CodedPoint
from transquant.features.ledger import Ledger, Row
from transquant.features.maps import from_maps
from transquant.features.points import replacing
from transquant.features.records import FloatMap, Point
from transquant.workers import spread


class _Session:
    """What is met between entering and leaving the context, checked against what was calibrated."""

    def __init__(self, coded: Sequence[CodedPoint], left: frozenset[str]) -> None:
        self.coded = {c.point.name: c for c in coded}
        self.left = left  # names of points that are not coded
        self.rows = {c.point.name: Row(c.point.name, c.point.activation, c.coder.mode) for c in coded}
        self.met: list[str] = []  # in this forward pass
        self.runs, self.outside = False, 0  # what other networks do meanwhile is their own

    def replace(self, point: Point, tensor: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        if not self.runs:
            self.outside += point.name in self.coded
        if not self.runs or point.name in self.left:
            return activation(tensor)
        coded = self._known(point)
        self.met.append(point.name)
        result = activation(tensor)
        values, lengths = coded.maps(result)
        sources = coded.maps(tensor)[0] if coded.coder.before else values

        def through(pair: tuple[FloatMap, FloatMap]) -> tuple[FloatMap, tuple[float, ...]]:
            source, wanted = pair
            packet, symbols = coded.encode(source, lengths)
            map_ = coded.decode(packet)[0]
            signal = float(np.square(wanted, dtype=np.float64).sum())
            noise = float(np.square(np.subtract(wanted, map_, dtype=np.float64)).sum())
            zeros, coded_zeros = (m.size - int(np.count_nonzero(m)) for m in (wanted, map_))
            return map_, (len(packet), coded.coder.ideal_bits(symbols), zeros, coded_zeros, signal, noise)

        done = spread(through, list(zip(sources, values, strict=True)), True)
        maps = np.stack([d[0] for d in done])
        self._enter(point.name, values, [d[1] for d in done])
        return from_maps(maps, lengths, point.axis).to(result.device, result.dtype)

    def _enter(self, name: str, values: FloatMap, counted: Sequence[tuple[float, ...]]) -> None:
        row = self.rows[name]
        row.samples += len(values)
        row.values += values.size
        for size, bits, zeros, coded_zeros, signal, noise in counted:
            row.bytes += int(size)
            row.ideal_bits += bits
            row.zeros += int(zeros)
            row.coded_zeros += int(coded_zeros)
            row.signal += signal
            row.noise += noise

    def _known(self, point: Point) -> CodedPoint:
        coded = self.coded.get(point.name)
        path = point.name.rpartition("#")[0]
        if coded is None:
            known = sum(name.rpartition("#")[0] == path for name in (*self.coded, *self.left))
            if known:
                raise InputError(
                    f"{path or 'the network'!r} calls activations more often than the {known} times it did when calibrated"
                )
            raise InputError(f"the codec is of another network: it has no point {point.name!r} ({point.activation})")
        for what in ("activation", "channels", "axis", "low", "high"):
            given, expected = getattr(point, what), getattr(coded.point, what)
            if given != expected:
                raise InputError(
                    f"the codec is of another network: at {point.name!r} {what} is {given!r} here, {expected!r} in the codec"
                )
        return coded

    def begin(self, module: nn.Module, args: Any) -> None:
        self.met.clear()
        self.runs = True

    def end(self, module: nn.Module, args: Any, result: Any) -> None:
        self.runs = False
        missing = [name for name in self.coded if name not in self.met]
        if missing:
            raise InputError(
                f"the codec is of another network: a forward pass did not come by {len(missing)} of its {len(self.coded)} points, "
                f"such as {missing[0]!r}"
            )


@contextmanager
def attached(model: nn.Module, coded: Sequence[CodedPoint], left: frozenset[str]) -> Iterator[Ledger]:
    """Within, `model` runs on coded maps at `coded`, on its own at the points named in `left`. Raises InputError at the first
    point that fits neither, and after a forward pass that left a coded point out."""
    session = _Session(coded, left)
    ledger = Ledger(list(session.rows.values()))
    hooks = [model.register_forward_pre_hook(session.begin), model.register_forward_hook(session.end)]
    try:
        with replacing(model, session.replace):
            yield ledger
        if session.outside and not ledger.values:
            raise InputError("parts of the network were run, but not the network itself: only what model(...) runs is coded")
    finally:
        for hook in hooks:
            hook.remove()
