"""How many bits symbols take, as a function of the weights that can be differentiated.

    symbols of all weights ─ rows' and columns' mean magnitudes ─ class of each place ─ histograms ─ −log₂ p of each magnitude
    weights in steps ─ between two magnitudes, linearly between their lengths ─ bits

The entropy coder adapts to a place's neighbourhood, row and column; the classes stand for that. Tables are counted anew now and
then and are constants in between, as in a coder that has adapted. Lengths between magnitudes are our own choice: their slope is
what one magnitude costs more than the next, which is all that a gradient can use.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from transquant.records import FloatArray, IntArray

CLASSES = 12
LEVELS = 16  # magnitudes with lengths of their own; above, each further one costs as much as the last step
FLOOR = 2.0**-10  # of a class's expected magnitude


class CodeLengths:
    """Lengths by class and magnitude, of one network's symbols."""

    def __init__(self) -> None:
        self._table = torch.zeros(CLASSES, LEVELS + 1)
        self._classes: dict[str, Tensor] = {}

    def count(self, symbols: Mapping[str, IntArray]) -> None:
        """Learn from the symbols, int32 (O, n) by name, of all weights."""
        classes = {name: _classes(s) for name, s in symbols.items()}
        counts = np.zeros((CLASSES, LEVELS))
        for name, own in symbols.items():
            size = np.minimum(np.abs(own), LEVELS - 1)
            counts += np.bincount((classes[name] * LEVELS + size).reshape(-1), minlength=CLASSES * LEVELS).reshape(counts.shape)
        prior = counts.sum(0) + LEVELS * 2.0 ** -np.arange(LEVELS)
        counts += 4 * prior / prior.sum()  # what is rare in a class has about its share in all
        lengths = -np.log2(counts / counts.sum(1, keepdims=True))
        lengths[:, 1:] += 1  # the sign
        lengths = np.maximum.accumulate(lengths, axis=1)  # a larger magnitude is never cheaper, whatever chance has counted
        last = np.maximum(lengths[:, -1] - lengths[:, -2], 0.5)
        self._table = torch.from_numpy(np.concatenate([lengths, (lengths[:, -1] + last)[:, None]], 1)).float()
        self._classes = {name: torch.from_numpy(c) for name, c in classes.items()}

    def bits(self, name: str, magnitudes: Tensor) -> Tensor:
        """Bits, a scalar with a gradient, of magnitudes (O, n) in steps: whole ones are those of symbols."""
        classes, table = self._classes[name].to(magnitudes.device), self._table.to(magnitudes.device)
        below = magnitudes.detach().floor().clamp(0, LEVELS - 1).long()
        low, high = table[classes, below], table[classes, below + 1]
        return (low + (high - low) * (magnitudes - below)).sum()

    def state(self) -> dict[str, Tensor]:
        """What has been counted, to go on with."""
        return {"table": self._table, **{f"class.{name}": c for name, c in self._classes.items()}}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The mirror of `state`."""
        self._table = state["table"]
        self._classes = {key.removeprefix("class."): value for key, value in state.items() if key.startswith("class.")}


def _classes(symbols: IntArray) -> IntArray:
    """The class of each place, int (O, n): octaves and halves of what its row and its column lead to expect."""
    size: FloatArray = np.abs(symbols).astype(np.float64)
    mean = max(float(size.mean()) if size.size else 0.0, FLOOR)
    rows, columns = size.mean(1, keepdims=True), size.mean(0, keepdims=True)
    expected = np.maximum(rows * columns / mean, FLOOR)
    found: IntArray = np.clip(np.rint(2 * np.log2(expected) + CLASSES - 4), 0, CLASSES - 1).astype(np.int32)
    return found
