"""Work shared between threads without changing a bit of the result.

Sums inside a matrix product may depend on how many threads share it, so every task runs its arithmetic on one thread, and
results come back in the order of the tasks. The number of workers is the caller's number of torch threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """A pool of threads, each limited to one arithmetic thread; made by `workers()`."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, initializer=lambda: torch.set_num_threads(1))

    def map(self, task: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Results of `task` over items, in order."""
        return list(self._pool.map(task, items))

    def close(self) -> None:
        """Wait for what runs, drop what does not."""
        self._pool.shutdown(cancel_futures=True)


@contextmanager
def workers() -> Iterator[Workers]:
    """As many workers as torch has threads now; torch's setting is restored at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = Workers(before)
    try:
        yield pool
    finally:
        pool.close()
        torch.set_num_threads(before)
