"""How a network is trained: what `fit` was given, checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

from torch import Tensor, nn

from transquant.errors import InputError

AUTOCAST = (None, "bfloat16")


@dataclass(frozen=True, slots=True)
class Recipe:
    """The arguments of `fit` that its loop uses. Raises InputError for values that are not allowed."""

    epochs: int
    rate: float
    vector_rate: float | None
    clip: float | None
    loss: Callable[[Any, Any], Tensor] | None
    distill: float
    temperature: float
    hints: tuple[str, ...]
    hint: float
    evaluate: Callable[[nn.Module], float] | None
    patience: int | None
    autocast: str | None
    micro_batches: int
    channels_last: bool
    seed: int
    forward: Callable[[nn.Module, Any], Any] | None
    output: Callable[[Any], Tensor] | None

    def __post_init__(self) -> None:
        whole("epochs", self.epochs, 1)
        whole("micro_batches", self.micro_batches, 1)
        whole("seed", self.seed, 0)
        _number("rate", self.rate)
        _number("temperature", self.temperature)
        _number("hint", self.hint)
        _number("distill", self.distill, most=1.0, zero=True)
        for name in ("vector_rate", "clip"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), zero=name == "vector_rate")
        if self.patience is not None:
            whole("patience", self.patience, 1)
            if self.evaluate is None:
                raise InputError("patience needs evaluate: a function of the model whose result is better when higher")
        if self.autocast not in AUTOCAST:
            raise InputError(f"autocast is {self.autocast!r}, allowed are None and 'bfloat16'")
        if not isinstance(self.channels_last, bool):
            raise InputError(f"channels_last is {self.channels_last!r}, allowed are True and False")
        for name in ("loss", "evaluate", "forward", "output"):
            function(name, getattr(self, name))


def names(value: Any) -> tuple[str, ...]:
    """Names of layers. Raises InputError for anything but a list of texts."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(name, str) for name in value):
        raise InputError(f"hints is {value!r:.80}, allowed are lists of names of layers")
    return tuple(value)


def whole(name: str, value: Any, least: int) -> None:
    """Raises InputError for anything but an integer from `least` on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} is {value!r}, allowed are integers from {least}")


def function(name: str, value: Any) -> None:
    """Raises InputError for anything but None or what can be called."""
    if value is not None and not callable(value):
        raise InputError(f"{name} is a {type(value).__name__}, allowed is a function, or None")


def _number(name: str, value: Any, most: float = inf, zero: bool = False) -> None:
    good = (
        not isinstance(value, bool) and isinstance(value, int | float) and isfinite(value) and (value > 0 or (zero and value == 0))
    )
    if not good or value > most:
        low = "from 0 on" if zero else "above 0"
        raise InputError(f"{name} is {value!r}, allowed are numbers {low}{'' if most == inf else f', up to {most:g}'}")
