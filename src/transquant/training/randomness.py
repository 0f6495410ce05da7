"""Random numbers that depend on where in a training they are drawn, so that one that was killed goes on with the same ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np
import torch


def number(*place: object) -> int:
    """A seed below 2⁶³ for a place: a name and counters."""
    return int.from_bytes(blake2b(repr(place).encode(), digest_size=8).digest(), "little") >> 1


def generator(*place: object) -> torch.Generator:
    """A generator on the CPU for a place."""
    return torch.Generator().manual_seed(number(*place))


def seed_all(*place: object) -> None:
    """Seed torch, numpy and Python for a place."""
    seed = number(*place)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


class Stream:
    """Random states of torch, numpy and Python of their own: what is drawn inside is independent of all that is drawn outside."""

    def __init__(self, *place: object) -> None:
        outside = _states()
        seed_all(*place)
        self._own = _states()
        _set(outside)

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """What is inside draws from this stream."""
        outside = _states()
        _set(self._own)
        try:
            yield
        finally:
            self._own = _states()
            _set(outside)


def _states() -> tuple[Any, Any, Any]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002


def _set(states: tuple[Any, Any, Any]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    random.setstate(states[2])
