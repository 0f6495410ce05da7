"""Which channels of all tensors are one and the same: union–find, one channel at a time.

Channels are numbers (ids), drawn where a layer computes new ones. An axis of a tensor has the ids of its indices: [7 7 8 8] is two
channels with a span of two.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from transquant.channels import Slice
from transquant.pruning.groups import ChannelGroup

Ids = NDArray[np.int64]
Place = tuple[str, int, bool]  # key of a tensor, its axis, and whether it is a source


class Links:
    """Channels, which of them are the same, which have to stay, and where in tensors they lie."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._fixed: list[int] = []
        self._places: dict[Place, Ids] = {}  # in the order in which the network meets them
        self._fixed_keys: set[str] = set()

    def fresh(self, count: int) -> Ids:
        """New channels."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return np.arange(first, first + count)

    def unite(self, one: Ids, other: Ids) -> None:
        """The channels of two axes of the same size are the same."""
        for a, b in zip(one.tolist(), other.tolist(), strict=True):
            self._parents[self._root(b)] = self._root(a)

    def fix(self, ids: Ids) -> None:
        """These channels have to stay."""
        self._fixed.extend(np.unique(ids).tolist())

    def fix_tensor(self, key: str) -> None:
        """All channels of a tensor have to stay."""
        self._fixed_keys.add(key)

    def put(self, key: str, axis: int, ids: Ids, source: bool) -> Ids:
        """The channels along a tensor's axis are these. Returns those that were put there first."""
        first = self._places.setdefault((key, axis, source), ids)
        if first is not ids:
            self.unite(first, ids)
        return first

    def at(self, key: str, axis: int, source: bool) -> Ids | None:
        """The channels that lie along a tensor's axis, if any were put there."""
        return self._places.get((key, axis, source))

    def groups(self) -> tuple[ChannelGroup, ...]:
        """Channels that can be removed: those that lie side by side everywhere, and two at least, are a group."""
        for (key, _, _), ids in self._places.items():
            if key in self._fixed_keys:
                self.fix(ids)
        fixed = {self._root(k) for k in self._fixed}
        runs: dict[int, list[tuple[Place, int, int]]] = {}  # by channel: place, first index, span
        for place, ids in self._places.items():
            roots = [self._root(k) for k in ids.tolist()]
            for index, root in enumerate(roots):
                own = runs.setdefault(root, [])
                if own and own[-1][0] == place and own[-1][1] + own[-1][2] == index:
                    own[-1] = (place, own[-1][1], own[-1][2] + 1)
                else:
                    own.append((place, index, 1))
        order = {place: k for k, place in enumerate(self._places)}
        free = sorted((own for root, own in runs.items() if root not in fixed), key=lambda own: (order[own[0][0]], own[0][1]))
        together: list[list[list[tuple[Place, int, int]]]] = []
        for own in free:
            if together and _beside(together[-1][-1], own):
                together[-1].append(own)
            else:
                together.append([own])
        return tuple(self._group(channels[0], len(channels)) for channels in together if len(channels) > 1)

    def _group(self, first: list[tuple[Place, int, int]], count: int) -> ChannelGroup:
        slices = [(Slice(key, axis, start, span), source) for (key, axis, source), start, span in first]
        own = next(part for part, source in slices if source)
        name, whole = own.key.rpartition(".")[0], len(self._places[own.key, own.axis, True])
        if count * own.span < whole:
            name += f"[{own.start}:{own.start + count * own.span}]"
        sources, readers = ([part for part, source in slices if source is wanted] for wanted in (True, False))
        return ChannelGroup(name, count, tuple(sources), tuple(readers))

    def _root(self, k: int) -> int:
        while self._parents[k] != k:
            self._parents[k] = k = self._parents[self._parents[k]]
        return k


def _beside(one: list[tuple[Place, int, int]], other: list[tuple[Place, int, int]]) -> bool:
    """Whether a channel lies just behind another, everywhere."""
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(a[0] == b[0] and a[2] == b[2] and a[1] + a[2] == b[1] for a, b in pairs)
