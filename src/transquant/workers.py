"""Work shared between threads and processes without changing a bit of the result.

Sums inside a matrix product may depend on how many threads share it, so every task runs its arithmetic on one thread, and
results come back in the order of the tasks. The number of threads is the caller's number of torch threads; processes are those
of torch.distributed, where it has been initialised; work that a work folder has is not done again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from transquant.processes import Processes, processes
from transquant.work import WorkFolder

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """A pool of threads, each limited to one arithmetic thread, beside those of other processes; made by `workers()`."""

    def __init__(self, count: int, together: Processes, folder: WorkFolder | None = None) -> None:
        self.count, self.processes, self.folder = count, together, folder
        self._pool = ThreadPoolExecutor(count, initializer=lambda: torch.set_num_threads(1))

    def map(
        self, task: Callable[[T], R], items: Iterable[T], kind: str = "", depends: Callable[[T], object] | None = None
    ) -> list[R]:
        """Results of `task` over items, in order, the items dealt out to all processes. `depends`: all that an item's result
        depends on; results of a `kind` that the work folder has are taken from there."""
        folder, items = self.folder, list(items)

        def kept(item: T) -> R:
            if folder is None or depends is None:
                return task(item)
            return folder.keep(kind, depends(item), lambda: task(item))

        together = self.processes
        shares = together.swap(self.own(kept, items[together.rank :: together.size]))
        return [shares[k % together.size][k // together.size] for k in range(len(items))]

    def own(self, task: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Results of `task` over items, in order, by this process alone."""
        return list(self._pool.map(task, items))

    def keep(self, kind: str, depends: Callable[[], object], compute: Callable[[], R]) -> R:
        """What all processes compute together, unless the work folder has it."""
        if self.folder is None:
            return compute()
        key = self.folder.key(kind, depends())
        found: R | None = self.folder.find(kind, key)
        if all(self.processes.exchange(found is not None)) and found is not None:
            return found
        value = compute()
        if self.processes.rank == 0:
            self.folder.put(kind, key, value)
        return value

    def counts(self, kind: str) -> tuple[int, int]:
        """Results of a kind that all processes have taken from the work folder, and computed."""
        own = (0, 0) if self.folder is None else (self.folder.taken[kind], self.folder.computed[kind])
        each = self.processes.exchange(own)
        return sum(taken for taken, _ in each), sum(computed for _, computed in each)

    def close(self) -> None:
        """Wait for what runs, drop what does not."""
        self._pool.shutdown(cancel_futures=True)


def spread(task: Callable[[T], R], items: Sequence[T], large: bool) -> list[R]:
    """Results of `task`, which needs no torch, over items, in order: by as many threads as torch has, if items are `large`."""
    count = min(torch.get_num_threads(), len(items)) if large else 1
    if count < 2:
        return [task(item) for item in items]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(task, items))


@contextmanager
def workers(open_folder: Callable[[], WorkFolder] | None = None) -> Iterator[Workers]:
    """As many workers as torch has threads now, in every process; torch's setting is restored at the end."""
    before = torch.get_num_threads()
    with processes() as together, together.together():
        folder = together.first(open_folder) if open_folder else None
        torch.set_num_threads(1)
        pool = Workers(before, together, folder)
        try:
            yield pool
        finally:
            pool.close()
            torch.set_num_threads(before)
