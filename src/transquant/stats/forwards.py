"""Forwards that stop on their way: each before those of its modules that are waited for, until it is sent on.

    forward of a micro-batch ─ stops before a module ┐
    forward of a micro-batch ─ stops before a module ┴─ the module's weights are changed ─ all are sent on

A forward runs in a thread of its own, used as a coroutine: it computes only while somebody waits for its next stop, so no more
compute at a time than there are workers. All read the same tensors; whatever else a module keeps is each forward's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from threading import Condition, Thread
from typing import Any

import torch
from torch import Tensor, nn

from transquant.stats.copies import rounded, wide_copy
from transquant.stats.moments import Moments
from transquant.stats.recorders import REPLAYED, Handle, attach

Run = Callable[[nn.Module, Any], Tensor]


class Twins:
    """Copies of a model that share their tensors, which can be changed while the copies run."""

    def __init__(self, model: nn.Module) -> None:
        self._model = wide_copy(model)
        self._shared = {id(t): t for t in (*self._model.parameters(), *self._model.buffers())}
        self._state = {k: v.detach().clone() for k, v in model.state_dict().items()}

    def one(self) -> nn.Module:
        """Another copy."""
        return copy.deepcopy(self._model, dict(self._shared))

    def reset(self) -> None:
        """The model's tensors again."""
        self.load(self._state)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Other values for some tensors, rounded to the model's dtypes as they will be used."""
        self._model.load_state_dict(rounded(state, self._state), strict=False)


class _Closed(BaseException):
    """Ends a forward that nobody needs any more; no `except Exception` of the caller's catches it."""


class Enough(BaseException):
    """Ends the recording of a module when all that is wanted has been seen."""


class Coroutine:
    """A function in a thread of its own that runs only between `advance` and its next `pause`, without gradients and on one
    arithmetic thread."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._turn = Condition()
        self._thread = Thread(target=self._body, daemon=True)
        self._running = self._started = self._closed = self.ended = False
        self._error: BaseException | None = None

    def advance(self) -> None:
        """Run to the next pause, or to the end. Raises what the function raises."""
        with self._turn:
            if self.ended or self._closed:
                return
            self._running = True
            if self._started:
                self._turn.notify_all()
            else:
                self._started = True
                self._thread.start()
            self._turn.wait_for(lambda: not self._running)
            error, self._error = self._error, None
        if error is not None:
            raise error

    def pause(self) -> None:
        """Called in the function: wait for `advance`."""
        with self._turn:
            self._running = False
            self._turn.notify_all()
            self._turn.wait_for(lambda: self._running or self._closed)
            if self._closed:
                raise _Closed

    def close(self) -> None:
        """End it at its pause, or at the next one where it still runs. No thread is left when this returns."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()
            started = self._started
        if started:
            self._thread.join()

    def _body(self) -> None:
        try:
            torch.set_num_threads(1)  # of this thread
            with torch.no_grad():
                self._function()
        except _Closed:
            pass
        except BaseException as error:
            self._error = error
        finally:
            with self._turn:
                self._running, self.ended = False, True
                self._turn.notify_all()


class Forward(Coroutine):
    """One micro-batch's forward through a copy of its own. `kinds`: kind by path of the modules where it may stop; it does where
    the path is in `wanted`, which may change. `place`: the path where it stands, or None at its end."""

    def __init__(self, twin: nn.Module, batch: Any, run: Run, kinds: Mapping[str, str], wanted: Collection[str]) -> None:
        super().__init__(lambda: run(twin, batch))
        self.place: str | None = None
        self._kinds, self._wanted, self._recording = kinds, wanted, False
        modules = dict(twin.named_modules(remove_duplicate=False))
        self._modules = {path: modules[path] for path in kinds}
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] = (), {}
        # before the caller's own hooks, which get the same inputs as often as the module is called
        for path, module in self._modules.items():
            module.register_forward_pre_hook(self._stop_before(path), prepend=True, with_kwargs=True)
        # modules inside one that is replayed are called in that case alone
        outer = [p for p, kind in kinds.items() if kind in REPLAYED and any(path.startswith(f"{p}.") for path in kinds)]
        self._replayed = {path: attach(kinds[path], modules[path], {}) for path in outer}

    def advance(self) -> None:
        """Run to the next module that is wanted, or to the end."""
        self._inputs, self.place = ((), {}), None
        super().advance()

    def record(self, sinks: Mapping[str, Moments]) -> None:
        """Call the module where the forward stands on the inputs that it is to get, and record them, by attribute of the module,
        until a sink raises Enough."""
        assert self.place is not None
        module, kind, (args, kwargs) = self._modules[self.place], self._kinds[self.place], self._inputs
        _remove(self._replayed.get(self.place, ()))
        handles = attach(kind, module, sinks)
        self._recording = True
        try:
            with torch.no_grad():
                module(*args, **kwargs)
        except Enough:
            pass
        finally:
            self._recording = False
            _remove(handles)
            if self.place in self._replayed:
                self._replayed[self.place] = attach(kind, module, {})

    def _stop_before(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if path in self._wanted and not self._recording:
                self._inputs, self.place = (args, kwargs), path
                self.pause()

        return hook


def _remove(handles: Collection[Handle]) -> None:
    for handle in handles:
        handle.remove()
