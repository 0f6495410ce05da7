"""The measured distortion: outputs of the float model on held-back samples, and how far another set of weights is off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transquant.fingerprint import fingerprint
from transquant.stats.copies import Copies
from transquant.stats.metric import distance
from transquant.workers import Workers

Run = Callable[[nn.Module, Any], Tensor]


class Reference:
    """Float outputs on some micro-batches, and copies of the model to try other weights on."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], run: Run, pool: Workers, metric: str) -> None:
        self.batches, self.run, self.pool, self.metric = list(batches), run, pool, metric
        self._copies = Copies(model, min(pool.count, len(self.batches)))
        self._outputs = pool.map(self._output, self.batches)
        pairs = [] if pool.folder is None else zip(self.batches, self._outputs, strict=True)
        self._known = [fingerprint(self._copies.state, *pair) for pair in pairs]

    def distortion(self, state: Mapping[str, Tensor]) -> float:
        """Mean distance of the outputs with these weights (keys that are left out keep the float model's), in units of
        the metric. Not finite outputs count as infinitely far."""
        decoded = self._copies.load(state)
        changed = b"" if self.pool.folder is None else fingerprint(decoded, self.metric)
        total, count = 0.0, 0
        for part, number in self.pool.map(
            self._distance, range(len(self.batches)), "distance", lambda k: (self._known[k], changed)
        ):
            total, count = total + part, count + number
        mean = total / max(count, 1)
        return mean if mean == mean else float("inf")

    def compared(self, other: nn.Module, most: int | None = None) -> float:
        """Mean distance of the outputs of another network, in units of the metric, on the first `most` micro-batches or on all; not
        finite outputs count as infinitely far."""
        total, count = 0.0, 0
        with torch.no_grad():
            for batch, expected in zip(self.batches[:most], self._outputs[:most], strict=True):
                part, number = distance(expected, self.run(other, batch).float().cpu(), self.metric)
                total, count = total + part, count + number
        mean = total / max(count, 1)
        return mean if mean == mean else float("inf")

    def _distance(self, number: int) -> tuple[float, int]:
        return distance(self._outputs[number], self._output(self.batches[number]), self.metric)

    def _output(self, batch: Any) -> Tensor:
        with self._copies.one() as model, torch.no_grad():
            return self.run(model, batch).float().cpu()
