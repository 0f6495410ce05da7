"""The header's list of kept channels and the records it stands for (FORMAT.md section 10)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transquant.channels import MAX_SIZE, MAX_SLICES, KeptChannels, Shapes, Slice, shapes_before
from transquant.container.checks import integer, items, short
from transquant.errors import CorruptFile
from transquant.records import BatchNormEntry, Entry

BATCHNORM_VECTORS = ("weight", "bias", "running_mean", "running_var")
_DEFAULTS = (0, 0, 1)  # axis, start, span


def kept_to_json(kept: Sequence[KeptChannels], entries: Sequence[Entry]) -> list[Any]:
    """Steps as lists: channels, mask, and slices, in which entries stand for tensors."""
    numbers = {key: number for number, entry in enumerate(entries) for key in _keys(entry)}
    value = []
    for step in kept:
        slices: list[list[int]] = []
        for part in step.slices:
            row = [numbers[part.key], part.axis, part.start, part.span]
            entry = entries[row[0]]
            if isinstance(entry, BatchNormEntry) and part.key != entry.key(BATCHNORM_VECTORS[0]):
                continue  # one stands for all four
            while len(row) > 1 and row[-1] == _DEFAULTS[len(row) - 2]:
                row.pop()
            slices.append(row)
        value.append([step.channels, step.mask, slices])
    return value


def kept_from_json(value: Any, entries: Sequence[Entry], shapes: Shapes) -> tuple[KeptChannels, ...]:
    """Steps, validated against the shapes of the file's tensors. Raises CorruptFile."""
    keys = [_keys(entry) for entry in entries]
    steps = []
    count = 0
    for item in items(value, "the list of kept channels", most=MAX_SLICES):
        channels, mask, rows = items(item, "a step of kept channels", length=3)
        integer(channels, 2, MAX_SIZE, "a number of channels")
        if not isinstance(mask, str) or len(mask) != -(-channels // 4) or not re.fullmatch("[0-9a-f]+", mask):
            raise CorruptFile(
                f"the mask of {channels} channels is {short(mask)}, allowed are {-(-channels // 4)} hexadecimal digits"
            )
        slices: list[Slice] = []
        for row in items(rows, "the places of kept channels", most=MAX_SLICES):
            row = items(row, "a place of kept channels", most=4)
            if not row:
                raise CorruptFile("a place of kept channels is empty")
            number = integer(row[0], 0, len(entries) - 1, "the entry of kept channels")
            given = [*row[1:], *_DEFAULTS[len(row) - 1 :]]
            axis = integer(given[0], 0, 7, "an axis of kept channels")
            start = integer(given[1], 0, MAX_SIZE, "the first index of kept channels")
            span = integer(given[2], 1, MAX_SIZE, "the span of a kept channel")
            slices += [Slice(key, axis, start, span) for key in keys[number]]
            count += len(keys[number])
            if count > MAX_SLICES:
                raise CorruptFile(f"kept channels have more than {MAX_SLICES} places")
        step = KeptChannels(channels, mask, tuple(slices))
        if int(mask, 16) & ((1 << -channels % 4) - 1) or not 0 < step.count < channels or not slices:
            raise CorruptFile(f"a step keeps {step.count} of {channels} channels at {len(slices)} places, allowed are some of them")
        steps.append(step)
    before = shapes_before(steps, shapes)
    if isinstance(before, str):
        raise CorruptFile(f"the kept channels do not fit the tensors: {before}")
    return tuple(steps)


def _keys(entry: Entry) -> tuple[str, ...]:
    """Keys of an entry's tensors that can have channels."""
    if isinstance(entry, BatchNormEntry):
        return tuple(entry.key(name) for name in BATCHNORM_VECTORS)
    return (entry.name,)
