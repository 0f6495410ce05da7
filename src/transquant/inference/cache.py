"""Tensors that are kept while they fit: the least recently used go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from threading import RLock

from torch import Tensor

Batch = tuple[int, Iterator[tuple[str, Tensor, int]]]


class TensorCache:
    """Tensors by name; at most `limit` bytes are kept.

    `produce(name)` gives a batch: how many bytes are needed to make its first tensor, and an iterator of names, tensors, and bytes
    that the batch still takes beside them; first the one that is asked for, then those that will be used soonest. It is taken
    from while they fit.
    `resident` and `peak`: bytes of the tensors that are kept now, and at most so far, what making them took included. `batches`:
    how often something was made."""

    def __init__(self, produce: Callable[[str], Batch], limit: int) -> None:
        self.limit, self.resident, self.peak, self.batches = limit, 0, 0, 0
        self._produce, self._kept, self._lock = produce, OrderedDict[str, Tensor](), RLock()

    def __deepcopy__(self, memo: object) -> TensorCache:
        """Copies of a model decode from the same file: they share what is kept."""
        return self

    def get(self, name: str) -> Tensor:
        """A tensor, made if it is not kept."""
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
            self.batches += 1
            needed, made = self._produce(name)
            self._room(needed, 0)
            wanted, mine = None, 0
            for key, tensor, beside in made:
                size = tensor.numel() * tensor.element_size()
                wanted = tensor if wanted is None else wanted
                if mine + size > self.limit:
                    break
                self._room(size + beside, mine)
                self._kept.pop(key, None)
                self._kept[key] = tensor
                self.resident += size
                mine += size
                self._seen(beside)
                if mine + beside > self.limit:
                    break
            assert wanted is not None
            return wanted

    def _room(self, size: int, least: int) -> None:
        """Let go of the oldest tensors until `size` more bytes fit, or only `least` bytes are kept."""
        while self._kept and self.resident > least and self.resident + size > self.limit:
            _, tensor = self._kept.popitem(last=False)
            self.resident -= tensor.numel() * tensor.element_size()
        self._seen(size)

    def _seen(self, beside: int) -> None:
        self.peak = max(self.peak, self.resident + beside)
