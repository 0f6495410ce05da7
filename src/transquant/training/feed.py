"""Training data as batches of (inputs, labels), epoch by epoch: the same ones for the same seed, from any step on.

two tensors       ─ an order for each epoch ─┐
iterable of pairs ─ as it comes, seeded     ─┴─ augment ─ (inputs, labels)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from transquant.errors import InputError, TransquantError
from transquant.fingerprint import fingerprint
from transquant.modules import num_samples
from transquant.training.randomness import Stream, generator

Batch: TypeAlias = tuple[Any, Any]
Augment: TypeAlias = Callable[[Any, Any, torch.Generator], Batch]
ALLOWED = "allowed are two tensors (inputs, labels) of one length, or an iterable, gone through anew each epoch, of such pairs"
_END = object()


class Feed:
    """`count`: batches an epoch. Raises InputError for data that are none."""

    def __init__(self, data: Any, batch: int, augment: Augment | None, seed: int) -> None:
        self.data, self.size, self.augment, self.seed = data, batch, augment, seed
        self.pair = _pair(data)
        if self.pair is not None:
            if not len(self.pair[0]):
                raise InputError("the training data have no samples")
            self.size = min(batch, len(self.pair[0]))
            self.count = len(self.pair[0]) // self.size
            return
        if isinstance(data, Tensor | str | bytes | Mapping) or not hasattr(data, "__iter__"):
            raise InputError(f"data is a {type(data).__name__}, {ALLOWED}")
        if iter(data) is data:
            raise InputError(f"data is a {type(data).__name__} that can be gone through once, {ALLOWED}")
        try:
            self.count = len(data)
        except TypeError:
            self.count = sum(1 for _ in self._drawn(0))
        if not self.count:
            raise InputError("the training data have no batches")

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of an epoch but the first `skip`. Raises InputError where they are fewer or more than in the first."""
        number = skip
        for number, (inputs, labels) in enumerate(self._ordered(epoch, skip), skip + 1):
            if number > self.count:
                raise InputError(f"the data gave more than {self.count} batches in epoch {epoch + 1}, expected as many in each")
            if self.augment is not None:
                inputs, labels = self._augmented(inputs, labels, epoch * self.count + number - 1)
            yield inputs, labels
        if number < self.count:
            raise InputError(f"the data gave {number} batches in epoch {epoch + 1}, expected {self.count}, as many in each")

    def calibration(self, samples: int) -> list[Any]:
        """Inputs of at most about so many samples, as they are without `augment`."""
        if self.pair is not None:
            inputs = self.pair[0]
            order = torch.randperm(len(inputs), generator=generator("calibration", self.seed))[:samples]
            return [inputs[part] for part in torch.split(order, 256)]
        found: list[Any] = []
        seen = 0
        for inputs, _ in self._drawn(-1):
            found.append(inputs)
            seen += num_samples(inputs)
            if seen >= samples:
                break
        return found

    def identity(self) -> dict[str, Any]:
        """What tells these data from others: all of two tensors, of others the number of batches."""
        if self.pair is None:
            return {"batches an epoch": self.count}
        return {"data": fingerprint(*self.pair).hex(), "batch": self.size}

    def _ordered(self, epoch: int, skip: int) -> Iterator[Batch]:
        if self.pair is None:
            yield from self._drawn(epoch, skip)
            return
        inputs, labels = self.pair
        order = torch.randperm(len(inputs), generator=generator("order", self.seed, epoch))
        for part in torch.split(order, self.size)[skip : self.count]:
            yield inputs[part], labels[part]

    def _drawn(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Batches of an iterable; what it draws depends on seed and epoch alone."""
        stream = Stream("data", self.seed, epoch)
        with stream.drawn():
            batches = iter(self.data)
        number = 0
        while True:
            with stream.drawn():
                item = next(batches, _END)
            if item is _END:
                return
            number += 1
            if number > skip:
                yield _parsed(item)

    def _augmented(self, inputs: Any, labels: Any, step: int) -> Batch:
        assert self.augment is not None
        try:
            return _parsed(self.augment(inputs, labels, generator("augment", self.seed, step)))
        except TransquantError:
            raise
        except Exception as error:
            raise InputError(f"augment failed: {type(error).__name__}: {error}") from error


def length(batch: Batch) -> int:
    """Samples of a batch."""
    return len(batch[1]) if isinstance(batch[1], Tensor) and batch[1].ndim else num_samples(batch[0])


def cut(tree: Any, first: int, last: int) -> Any:
    """Some samples of all tensors of inputs or labels."""
    if isinstance(tree, Tensor):
        return tree[first:last]
    if isinstance(tree, Mapping):
        return {key: cut(value, first, last) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(cut(value, first, last) for value in tree)
    raise InputError(f"a batch of the data holds a {type(tree).__name__}, allowed are tensors, and mappings and lists of them")


def _pair(data: Any) -> tuple[Tensor, Tensor] | None:
    if not (isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(t, Tensor) and t.ndim for t in data)):
        return None
    if len(data[0]) != len(data[1]):
        raise InputError(f"data has {len(data[0])} inputs and {len(data[1])} labels, {ALLOWED}")
    return data[0], data[1]


def _parsed(item: Any) -> Batch:
    if isinstance(item, Mapping) and "labels" in item:
        return item, item["labels"]
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    given = f"{type(item).__name__} of {len(item)}" if isinstance(item, tuple | list) else type(item).__name__
    raise InputError(f"the data gave a {given} as a batch, expected (inputs, labels) or a mapping with 'labels'")
