"""Where channels lie in tensors: what pruning finds in a network, and what a file says was kept (FORMAT.md section 10).

Steps (`KeptChannels`) are taken one after the other: the places of a step are those in tensors from which all steps before it have
taken their channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

MAX_SLICES = 1 << 16  # of all steps of a network
MAX_SIZE = 2**31 - 1  # of a dimension
MARK = "_transquant_kept"  # attribute of a module from which channels were removed: its steps

Shapes = Mapping[str, Sequence[int]]  # by state-dict key


@dataclass(frozen=True, slots=True)
class Slice:
    """Where channels lie in a tensor: channel i has the indices start + i·span … start + (i + 1)·span − 1 along `axis` of the
    tensor with the state-dict key `key`."""

    key: str
    axis: int
    start: int
    span: int


@dataclass(frozen=True, slots=True)
class KeptChannels:
    """Which of some channels were kept, and where they were.

    `mask`: hexadecimal, ⌈channels / 4⌉ digits; the first channel is the highest bit, 1 where it was kept, and zeros fill up."""

    channels: int
    mask: str
    slices: tuple[Slice, ...]

    @property
    def count(self) -> int:
        """How many were kept."""
        return int(self.mask, 16).bit_count()

    @property
    def removed(self) -> int:
        """How many were not."""
        return self.channels - self.count

    def gone(self) -> list[int]:
        """Those that were not."""
        bits = f"{int(self.mask, 16):0{4 * len(self.mask)}b}"
        return [k for k in range(self.channels) if bits[k] == "0"]


def steps_of(module: object, path: str = "") -> tuple[KeptChannels, ...]:
    """The steps that a module is marked with, as those of the network in which it has that path."""
    steps: tuple[KeptChannels, ...] = vars(module).get(MARK, ())
    return tuple(replace(s, slices=tuple(replace(p, key=f"{path}.{p.key}") for p in s.slices)) for s in steps) if path else steps


def mask_of(channels: int, kept: Iterable[int]) -> str:
    """The mask of kept channels."""
    digits = -(-channels // 4)
    return f"{sum(1 << (4 * digits - 1 - k) for k in set(kept)):0{digits}x}"


def shapes_before(steps: Sequence[KeptChannels], shapes: Shapes) -> dict[str, list[int]] | str:
    """Shapes of the tensors that steps have made smaller, as they were before, from those of all as they are; or why no
    tensors can have become these."""
    before: dict[str, list[int]] = {}
    for step in reversed(steps):
        removed = step.removed  # once: a mask may be long, and have many places
        for part in reversed(step.slices):
            if part.key not in shapes or part.axis >= len(shapes[part.key]):
                return f"there is no axis {part.axis} of a tensor {part.key!r}"
            shape = before.setdefault(part.key, list(shapes[part.key]))
            shape[part.axis] += removed * part.span
            if not part.start + step.channels * part.span <= shape[part.axis] <= MAX_SIZE:
                return f"{step.channels} channels of {part.span} indices from {part.start} on are not in {part.key!r}"
    return before


def shapes_after(steps: Sequence[KeptChannels], shapes: Shapes) -> dict[str, list[int]] | None:
    """Shapes of the tensors that steps make smaller, after them, from those of all as they are; None where they do not fit."""
    after: dict[str, list[int]] = {}
    for step in steps:
        removed = step.removed
        for part in step.slices:
            shape = after.setdefault(part.key, list(shapes.get(part.key, ())))
            if part.axis >= len(shape) or part.start + step.channels * part.span > shape[part.axis]:
                return None
            shape[part.axis] -= removed * part.span
    return after


def count_channels(steps: Sequence[KeptChannels], shapes: Shapes) -> tuple[int, int]:
    """(kept, before) of all layers that lost channels; (0, 0) without steps. `shapes`: as they are now."""
    before = shapes_before(steps, shapes)
    if not steps or isinstance(before, str):
        return 0, 0
    layers = {(step.slices[0].key, step.slices[0].axis): step.slices[0].span for step in steps}
    total = sum(before[key][axis] // span for (key, axis), span in layers.items())
    return total - sum(step.removed for step in steps), total
