"""The one-dimensional search: the scalar c at which a measured quantity meets its target.

File size, distortion and score are nearly monotone in log2 c but not exactly (rounding, and a deflated header), so the search
keeps a bracket, steps by the local slope, and remembers the best point that meets the target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log2
from typing import Generic, TypeVar

T = TypeVar("T")

APART = 1 / 64  # octaves; sizes of files closer than that differ by chance


@dataclass(frozen=True, slots=True)
class Found:
    """Result of a search: the scalar c, whether it meets the target, and the value there."""

    c: float
    feasible: bool
    value: float


@dataclass(slots=True)
class Closest(Generic[T]):
    """Keeps, of what a search visits, the one item that `meet_size` will choose: drafts of large models are large.

    That is the largest size of at most `limit` bytes, or the smallest where all are larger."""

    limit: float
    item: T | None = None
    size: int = 0

    def offer(self, item: T, size: int) -> int:
        """Keep the item if it is better than what is kept; its size is returned."""
        if self.item is None or self._rank(size) > self._rank(self.size):
            self.item, self.size = item, size
        return size

    def _rank(self, size: int) -> tuple[bool, int]:
        fits = size <= self.limit
        return fits, size if fits else -size


def meet_size(
    size_of: Callable[[float], float], target: float, slack: float, start: float, slope: float, max_steps: int = 24
) -> Found:
    """The c whose size lies in [target − slack, target], or comes closest from below.

    `size_of(c)` in bytes falls as c grows; `slope` is a first guess of −d bytes / d log2 c. The result is not feasible if
    no c that was tried had a size of at most `target`."""
    low: tuple[float, float] | None = None  # log2 c with a size above the target
    high: tuple[float, float] | None = None  # log2 c with a size of at most the target
    best: tuple[float, float] | None = None
    last: tuple[float, float] | None = None
    smallest = (float("inf"), log2(start))
    x = log2(start)
    aim = target - slack / 2
    for _ in range(max_steps):
        size = size_of(2.0**x)
        smallest = min(smallest, (size, x))
        if size <= target:
            if best is None or size > best[1]:
                best = (x, size)
            if high is None or x < high[0]:
                high = (x, size)
            if size >= target - slack:
                break
        elif low is None or x > low[0]:
            low = (x, size)
        if low and high:
            # a bracket: secant, kept away from its ends; if sizes are not monotone, bisect what is left
            width = high[0] - low[0]
            if abs(width) < 1e-5:
                break
            share = (low[1] - aim) / max(low[1] - high[1], 1e-9)
            x = low[0] + width * min(max(share, 0.04), 0.96)
        else:
            if last is not None and abs(last[0] - x) > 1e-9 and (last[1] - size) / (x - last[0]) > 0:
                slope = (last[1] - size) / (x - last[0])
            last = (x, size)
            step = 1.1 * (size - aim) / max(slope, 1e-9)  # a little too far, to get the target between two points
            x += min(max(step, -4.0), 4.0) if abs(step) > 0.01 else (0.01 if size > target else -0.01)
            if not -160 < x < 160:
                break
    if best is None:
        return Found(2.0 ** smallest[1], False, smallest[0])
    return Found(2.0 ** best[0], True, best[1])


def slope_of(sizes: Mapping[float, float], guess: float) -> float:
    """−d bytes / d log2 c from sizes by c: between the farthest, or `guess` where those lie too close to tell."""
    if len(sizes) < 2:
        return guess
    (low, large), (high, small) = min(sizes.items()), max(sizes.items())
    octaves = log2(high / low)
    return (large - small) / octaves if large > small and octaves >= APART else guess


def largest_feasible(feasible: Callable[[float], bool], start: float, tolerance: float, max_steps: int = 24) -> Found:
    """The largest c with feasible(c), to `tolerance` in log2 c: doubling outward from `start`, then bisection."""
    x = log2(start)
    low: float | None = None
    high: float | None = None
    for _ in range(max_steps):
        if feasible(2.0**x):
            low = x
        else:
            high = x
        if low is not None and high is not None:
            if high - low <= tolerance:
                break
            x = (low + high) / 2
        else:
            x = x + 1.0 if high is None else x - 1.0
    if low is None:
        return Found(2.0**x, False, 0.0)
    return Found(2.0**low, True, 0.0)
