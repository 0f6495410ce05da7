"""The measured distortion: outputs of the float model on held-back samples, and how far another set of weights is off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from transquant.fingerprint import fingerprint
from transquant.stats.copies import HALF, wide_copy
from transquant.stats.metric import distance
from transquant.workers import Workers

Run = Callable[[nn.Module, Any], Tensor]


class Reference:
    """Float outputs on some micro-batches, and copies of the model to try other weights on."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], run: Run, pool: Workers, metric: str) -> None:
        self.batches, self.run, self.pool, self.metric = list(batches), run, pool, metric
        self._models = [wide_copy(model) for _ in range(min(pool.count, len(self.batches)))]
        self._idle: SimpleQueue[nn.Module] = SimpleQueue()  # each is used by one thread at a time
        for twin in self._models:
            self._idle.put(twin)
        self._state = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self._half = {k: v.dtype for k, v in self._state.items() if v.dtype in HALF}
        self._outputs = pool.map(self._output, self.batches)
        pairs = [] if pool.folder is None else zip(self.batches, self._outputs, strict=True)
        self._known = [fingerprint(self._state, *pair) for pair in pairs]

    def distortion(self, state: Mapping[str, Tensor]) -> float:
        """Mean distance of the outputs with these weights (keys that are left out keep the float model's), in units of
        the metric. Not finite outputs count as infinitely far."""
        decoded = {k: v.to(self._half[k]) if k in self._half else v for k, v in state.items()}  # as they will be used
        for model in self._models:
            model.load_state_dict({**self._state, **decoded}, strict=False)
        changed = b"" if self.pool.folder is None else fingerprint(decoded, self.metric)
        total, count = 0.0, 0
        for part, number in self.pool.map(
            self._distance, range(len(self.batches)), "distance", lambda k: (self._known[k], changed)
        ):
            total, count = total + part, count + number
        mean = total / max(count, 1)
        return mean if mean == mean else float("inf")

    def _distance(self, number: int) -> tuple[float, int]:
        return distance(self._outputs[number], self._output(self.batches[number]), self.metric)

    def _output(self, batch: Any) -> Tensor:
        model = self._idle.get()
        try:
            with torch.no_grad():
                return self.run(model, batch).float().cpu()
        finally:
            self._idle.put(model)
