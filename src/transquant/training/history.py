"""What a training says of itself, while it runs and afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transquant.codec import CompressedModel


@dataclass(frozen=True, slots=True)
class Moment:
    """A training after `step` of `steps` steps, in epoch `epoch` (from 1) of `epochs`. `loss` (without the price of the bits) and
    `accuracy` (top-1 in per cent, None where labels are no classes): means over the epoch so far. `score`: what `evaluate` said
    last. `bytes`: of the file when it was last encoded; `price`: units of the loss a bit, 0 once symbols are settled."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float | None
    score: float | None
    bytes: int
    price: float


@dataclass(frozen=True, slots=True)
class Epoch:
    """An epoch at its end, as in `Moment`; `step`: steps until then; `seconds` that it took."""

    epoch: int
    step: int
    loss: float
    accuracy: float | None
    score: float | None
    bytes: int
    price: float
    seconds: float


@dataclass(frozen=True, slots=True)
class FitResult:
    """`compressed`: the file at the asked size. `history`: its epochs. `stopped`: whether patience ended it early."""

    compressed: CompressedModel
    history: tuple[Epoch, ...]
    stopped: bool


def impatient(history: Sequence[Epoch], patience: int | None, first: int) -> bool:
    """Whether the last `patience` epochs brought no better score, of those that ended at step `first` or later: before, files
    are larger than asked, and their scores no measure."""
    scores = [epoch.score for epoch in history if epoch.step >= first and epoch.score is not None]
    return patience is not None and len(scores) > patience and max(scores[-patience:]) <= max(scores[:-patience])
