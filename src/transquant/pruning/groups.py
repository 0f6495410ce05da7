"""Groups of channels, and what is kept of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transquant.channels import Slice
from transquant.errors import InputError

Kept = Mapping[str, Tensor | Sequence[int]]  # by name of a group, the channels that stay; a group that is left out keeps all


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Channels of which each is kept, or removed, wherever it occurs.

    `name`: path of the first layer that computes them, with "[start:stop]" behind it where they are not all of its channels.
    `sources`: what computes them: rows of weights, biases, entries of normalisations, depthwise kernels. `readers`: columns of
    weights that read them. `removable`: False where it is not known who reads them; they can only be masked."""

    name: str
    channels: int
    sources: tuple[Slice, ...]
    readers: tuple[Slice, ...]
    removable: bool = True

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Sources and readers."""
        return self.sources + self.readers


def kept_of(groups: Iterable[ChannelGroup], kept: Kept) -> list[tuple[ChannelGroup, list[int]]]:
    """Groups that lose channels, with those they keep, in ascending order.

    Raises InputError for a name that is no group's, channels that a group has not, and a group without any."""
    known = {group.name: group for group in groups}
    result = []
    for name, given in kept.items():
        if name not in known:
            raise InputError(f"there is no group of channels named {name!r}, allowed are {_some(list(known))}")
        group, channels = known[name], given.tolist() if isinstance(given, Tensor) else list(given)
        if not all(type(c) is int and 0 <= c < group.channels for c in channels) or len(set(channels)) < len(channels):
            raise InputError(f"the kept channels of {name!r} are not different integers from 0 to {group.channels - 1}")
        if not channels:
            raise InputError(f"layer {name!r} would vanish: at least one of its {group.channels} channels must be kept")
        if len(channels) < group.channels:
            result.append((group, sorted(channels)))
    return result


def indices(part: Slice, channels: Iterable[int]) -> Tensor:
    """Where channels lie along a slice's axis, int64, in the order of the channels."""
    first = torch.tensor(list(channels), dtype=torch.int64) * part.span + part.start
    return (first[:, None] + torch.arange(part.span)).reshape(-1)


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"
