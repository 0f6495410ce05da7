"""Processes that make one file together (torch.distributed): each does its share, all get all results.

    process 0 ─ its share ─┐            ┌─ results of all, in order
    process 1 ─ its share ─┴─ exchange ─┴─ results of all, in order

Every exchange has the same form. A process that fails, wherever that is, enters one more, so that the others meet its error in
their next exchange and raise it too: nobody waits for a process that has given up.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from transquant import errors
from transquant.errors import InputError
from transquant.fingerprint import fingerprint

T = TypeVar("T")

PATIENCE = timedelta(minutes=10)  # with processes that have not called yet
_SHARED = "raised in every process of the job"  # a note on errors that all processes know of


class Processes:
    """The processes of a job, seen from one of them: `rank` of `size`. Made by `processes()`."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size, self._group = rank, size, group
        self._broken = False  # left in the middle of an exchange: there can be no other

    def exchange(self, value: T, patience: timedelta | None = None) -> list[T]:
        """The values of all processes, by rank. Raises what another process has raised."""
        if self.size == 1:
            return [value]
        messages = self._swap((None, value), patience)
        for failure, _ in messages:
            if failure is not None:
                error = _rebuilt(*failure)
                error.add_note(_SHARED)
                raise error
        values = [theirs for _, theirs in messages]
        values[self.rank] = value
        return values

    def swap(self, own: Sequence[T]) -> list[list[T]]:
        """The lists of all processes, by rank; one item of each at a time, since items may be large."""
        if self.size == 1:
            return [list(own)]
        lengths = self.exchange(len(own))
        found: list[list[T]] = [[] for _ in lengths]
        for k in range(max(lengths)):
            for items, length, item in zip(found, lengths, self.exchange(own[k] if k < len(own) else None), strict=True):
                if k < length:
                    items.append(item)  # type: ignore[arg-type]
        return found

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, the same bits in each."""
        if self.size == 1:
            return tensor
        self.exchange(None)  # whoever fails before this is met here
        self._broken = True
        dist.all_reduce(tensor, group=self._group if tensor.device.type == "cpu" else None)
        self._broken = False
        return tensor

    def once(self, task: Callable[[], T]) -> T:
        """The result of a task that process 0 runs for all: one that may not be the same everywhere."""
        return self.exchange(task() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def first(self, task: Callable[[], T]) -> T:
        """What `task` gives here; it has been run in process 0 before it is in the others."""
        if self.rank == 0:
            result = task()
            self.exchange(None)
            return result
        self.exchange(None)
        return task()

    def agree(self, what: str, *parts: object) -> None:
        """Raises InputError where the processes were not given the same."""
        if self.size > 1 and len(set(self.exchange(fingerprint(*parts), PATIENCE))) > 1:
            raise InputError(f"the {self.size} processes were given different {what}, allowed is the same for all")

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is inside ends in the same way in all processes."""
        if self.size == 1:
            yield
            return
        try:
            yield
        except BaseException as error:
            if self._broken or _SHARED in getattr(error, "__notes__", ()):
                raise
            self._tell(error)
            raise
        self.exchange(None)

    def _tell(self, error: BaseException) -> None:
        """Let the others know; where several fail, all raise the error of the first."""
        try:
            messages = self._swap((_description(error), None), None)
        except Exception:  # the others are gone: the error is what there is to say
            return
        first = next(rank for rank, (failure, _) in enumerate(messages) if failure is not None)
        if first != self.rank:
            other = _rebuilt(*messages[first][0])
            other.add_note(_SHARED)
            raise other from error
        error.add_note(_SHARED)

    def _swap(self, message: tuple[Any, Any], patience: timedelta | None) -> list[tuple[Any, Any]]:
        self._broken = True
        found: list[Any] = [None] * self.size
        try:
            meeting = dist.barrier(self._group, async_op=True)
            if patience is not None and not _came(meeting, patience):
                raise InputError(
                    f"not all {self.size} processes of torch.distributed called within {patience.seconds // 60} minutes; all must"
                )
            meeting.wait()
            dist.all_gather_object(found, message, group=self._group)
        except RuntimeError as error:
            error.args = (f"another of the {self.size} processes has ended ({error})",)
            raise
        self._broken = False
        return found


def _came(meeting: Any, patience: timedelta) -> bool:
    try:
        meeting.wait(patience)
    except RuntimeError as error:
        if "timed out" in str(error).lower() or "timeout" in str(error).lower():
            return False
        raise
    return True


def _description(error: BaseException) -> tuple[str, tuple[Any, ...]]:
    plain = all(isinstance(a, str | int | float | None) for a in error.args)
    return type(error).__name__, error.args if plain and error.args else (str(error),)


def _rebuilt(name: str, arguments: tuple[Any, ...]) -> BaseException:
    """An exception of the same name and message; of the same class where that is one of ours or of Python's."""
    known = vars(errors).get(name) or vars(builtins).get(name)
    try:
        error = known(*arguments) if known is not None else None
    except TypeError:
        error = None
    return error if isinstance(error, BaseException) else type(name, (Exception,), {})(*arguments)


@contextmanager
def processes() -> Iterator[Processes]:
    """All processes where torch.distributed has been initialised, or this one alone."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield Processes()
        return
    group = None if "gloo" in str(dist.get_backend()) else dist.new_group(backend="gloo")  # what is exchanged lies in memory
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), group)
    finally:
        if group is not None:
            dist.destroy_process_group(group)
