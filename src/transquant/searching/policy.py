"""A policy: how many channels each group loses, and how many bits the rows of each weight keep on average.

    layer controller     removed, a number of channels for each group: zero bits
    channel controller   bits, a mean for each weight ─ importance of its rows ─ depths of rows, 1 … 8

Both controllers follow one criterion of importance. (AJPQ, arXiv 2011.06231; docs/search.md says what of it is reconstructed.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from transquant.records import FloatArray

LEAST, MOST = 1, 8  # bits of a row that is kept
FINENESS = 8  # mean bits are multiples of 1/8: what is known of a weight is looked up by them


@dataclass(frozen=True, slots=True)
class Policy:
    """`removed`: by group, channels of zero bits; `bits`: by weight, mean depth of the rows that are kept."""

    removed: Mapping[str, int]
    bits: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Space:
    """What may be decided. `groups`: channels by group; `weights` in the order in which they run; `fixed`: the depth of all rows,
    or None where it is decided too."""

    groups: Mapping[str, int]
    weights: tuple[str, ...]
    fixed: int | None = None

    @property
    def size(self) -> int:
        """Numbers of a policy: one a group and, unless the depth is fixed, one a weight."""
        return len(self.groups) + (0 if self.fixed else len(self.weights))

    def policy(self, numbers: Sequence[float] | FloatArray) -> Policy:
        """The policy of numbers in [0, 1]: shares of channels, then of the range of bits."""
        shares = dict(zip(self.groups, numbers, strict=False))
        removed = {name: min(int(shares[name] * count), count - 1) for name, count in self.groups.items()}
        if self.fixed:
            return Policy(removed, dict.fromkeys(self.weights, float(self.fixed)))
        rest = numbers[len(self.groups) :]
        return Policy(removed, {w: _rounded(LEAST + (MOST - LEAST) * float(x)) for w, x in zip(self.weights, rest, strict=True)})

    def numbers(self, policy: Policy) -> FloatArray:
        """Numbers in [0, 1] that give a policy."""
        shares = [(policy.removed[name] + 0.5) / count for name, count in self.groups.items()]
        bits = [] if self.fixed else [(policy.bits[w] - LEAST) / (MOST - LEAST) for w in self.weights]
        return np.array([*shares, *bits])

    def with_bits(self, removed: Mapping[str, int], bits: Mapping[str, float]) -> Policy:
        """A policy within the bounds."""
        if self.fixed:
            return Policy(dict(removed), dict.fromkeys(self.weights, float(self.fixed)))
        return Policy(dict(removed), {w: _rounded(bits[w]) for w in self.weights})


def row_depths(bits: float, importance: FloatArray) -> FloatArray:
    """Depths of rows, whole numbers in float64 (O,), with a mean of `bits`: by reverse water-filling, half a bit for each octave
    of `importance` (log2 of what the square of a row's largest magnitude costs), to the nearest numbers that hold the mean."""
    relative = 0.5 * (importance - importance.mean())
    low, high = LEAST - float(relative.max()), MOST - float(relative.min())
    for _ in range(16):  # the water level at which the mean is held
        level = (low + high) / 2
        low, high = (level, high) if np.clip(relative + level, LEAST, MOST).mean() < bits else (low, level)
    depths = np.clip(relative + (low + high) / 2, LEAST, MOST)
    whole = np.minimum(np.floor(depths), MOST - 1)
    missing = min(max(round(bits * len(depths)) - int(whole.sum()), 0), len(depths))
    whole[np.argsort(whole - depths, kind="stable")[:missing]] += 1
    bounded: FloatArray = np.clip(whole, LEAST, MOST)
    return bounded


def _rounded(bits: float) -> float:
    return min(max(round(bits * FINENESS) / FINENESS, float(LEAST)), float(MOST))
