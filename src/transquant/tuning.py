"""What the held-back samples decide: the regularisation of the metric, the step groups, the dead zone.

The estimated metric says that quiet directions cost nothing, and quantization noise from the layers before then feeds
exactly those. How much to distrust it is a property of the network and of the rate, so it is measured: one choice after
another, at the file size that is asked for, on samples that did not enter the statistics. A pass of more than `LARGE` multiply–adds
leaves the regularisation alone to be tuned, one of more than `HUGE` in one round instead of two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import log2

from transquant.allocation.search import Closest, meet_size, slope_of
from transquant.allocation.steps import Grouping
from transquant.choices import Choice
from transquant.encoder import Draft
from transquant.quantizers.metric import Damping

DAMPINGS = (
    Damping(0.005, 0.02), Damping(0.02, 0.05), Damping(0.05, 0.2), Damping(0.1, 0.5), Damping(0.2, 1.0), Damping(0.5, 2.0),
    Damping(1.0, 4.0),
)  # fmt: skip
GROUPINGS = (Grouping("rc", 0.5), Grouping("r", 0.5), Grouping("", 0.0), Grouping("rc", 1.0), Grouping("r", 1.0))
DEAD_ZONES = (0.5, 0.55, 0.6, 0.65)
LEANS = ((0.25, 0.25), (0.5, 0.0), (0.5, 1.0), (1.0, 0.5), (1.0, 1.0))  # of a trellis: weight of a bit, shrinkage
SAME_SIZE = 0.02  # candidates are compared at the same size within this share; what is left is corrected by the rate's slope
ROUGHER = 0.06  # of large networks: one draft a candidate, nearly always

# multiply–adds of a quantization pass above which fewer candidates are tried; a rule on work, not on time, keeps files
# the same on fast and slow machines
LARGE, HUGE = 3e10, 1e12


class Tuner:
    """Compares choices at one file size. `draft(c, choice)`, `size(draft)` in bytes, `distortion(draft)` measured."""

    def __init__(
        self,
        draft: Callable[[float, Choice], Draft],
        size: Callable[[Draft], int],
        distortion: Callable[[Draft], float],
        target_bytes: float,
        num_values: int,
        rough: float = SAME_SIZE,
    ) -> None:
        self.rough = rough
        self.draft, self.size, self.distortion = draft, size, distortion
        self.target, self.num_values = target_bytes, num_values
        self.slope = num_values / 10  # −d bytes / d log2 c; every search corrects it for the next
        self.scores: dict[Choice, tuple[float, float]] = {}

    def score(self, choice: Choice, start: float) -> tuple[float, float]:
        """(distortion at the target size, c) of a choice; the search for c begins at `start`."""
        if choice not in self.scores:
            slack = 2 * self.rough * self.target
            closest: Closest[Draft] = Closest(self.target + slack / 2)
            sizes: dict[float, int] = {}

            def size_of(c: float) -> float:
                draft = self.draft(c, choice)
                sizes[c] = closest.offer(draft, self.size(draft))
                return sizes[c]

            meet_size(size_of, closest.limit, slack, start, self.slope, max_steps=6)
            self.slope = slope_of(sizes, self.slope)
            draft, size = closest.item, closest.size
            assert draft is not None
            # six decibels a bit: what a file of exactly the target size would measure, nearly
            excess = min(max(8 * (size - self.target) / max(self.num_values, 1), -2), 2)
            self.scores[choice] = self.distortion(draft) * 4.0**excess, draft.c
        return self.scores[choice]


def choose(tuner: Tuner, start: float, work: float, trellis: bool, progress: Callable[[int, int], None]) -> tuple[Choice, float]:
    """The best choice found, and its c. `work`: multiply–adds of one quantization pass; `trellis`: whether there is one."""
    best = Choice()
    rounds: list[Callable[[Choice], Sequence[Choice]]] = [lambda b: list(_neighbours(b))]
    if work <= HUGE:
        rounds += [lambda b: list(_neighbours(b))]
    if work <= LARGE:
        rounds += [
            lambda b: [replace(b, grouping=g) for g in GROUPINGS],
            lambda b: list(_leanings(b, trellis)),
            lambda b: [replace(b, damping=replace(b.damping, noise=n)) for n in (0.0, 0.3)],
        ]
    for number, candidates in enumerate(rounds):
        progress(number, len(rounds))
        value, c = tuner.score(best, start)
        for candidate in candidates(best):
            other, other_c = tuner.score(candidate, c)
            if other < value:
                best, value, start = candidate, other, other_c
    progress(len(rounds), len(rounds))
    return best, tuner.score(best, start)[1]


def _leanings(choice: Choice, trellis: bool) -> Iterator[Choice]:
    """Other ways to lean to zero."""
    if trellis:
        yield from (replace(choice, rate=rate, shrink=shrink) for rate, shrink in LEANS)
    else:
        yield from (replace(choice, dead_zone=zone) for zone in DEAD_ZONES)


def _neighbours(choice: Choice) -> Iterator[Choice]:
    """The next weaker and the next stronger regularisation."""
    levels = [replace(d, noise=choice.damping.noise) for d in DAMPINGS]
    place = min(range(len(levels)), key=lambda k: abs(log2(levels[k].alpha / choice.damping.alpha)))
    for k in (place - 1, place + 1):
        if 0 <= k < len(levels):
            yield replace(choice, damping=levels[k])
