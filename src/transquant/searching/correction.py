"""What removal costs, corrected by what it does to the outputs of the network.

Predictions see each layer by itself, and no further than the first order of what follows. So every group is tried at a few numbers
of channels: alone, and then with all the others as the solution by prices has them, since what one group loses weighs more where
others have lost something too.
"""

from __future__ import annotations

from collections.abc import Callable

from transquant.searching.budget import Budget
from transquant.searching.policy import Policy
from transquant.searching.prediction import TINY, Predictor
from transquant.searching.searchers.lagrange import solve
from transquant.searching.trial import Trials

SHARES = (0.25, 0.5, 0.75, 0.95)  # of a group's channels
ENOUGH = 128  # samples, about

Progress = Callable[[str, int, int], None]


def correct(predictor: Predictor, budget: Budget, trials: Trials, say: Progress) -> None:
    """Correct the removals of a predictor, in two rounds."""
    groups = predictor.space.groups
    none = Policy(dict.fromkeys(groups, 0), dict.fromkeys(predictor.space.weights, 8.0))
    _round(predictor, none, trials, lambda done: say("groups", done, 2 * len(groups)))
    near, _ = budget.enforced(predictor, solve(predictor, budget))
    if any(near.removed.values()):
        _round(predictor, near, trials, lambda done: say("groups", len(groups) + done, 2 * len(groups)))


def _round(predictor: Predictor, around: Policy, trials: Trials, say: Callable[[int], None]) -> None:
    """Each group's costs, the others as a policy has them; so that their sum at the policy is what it does to the outputs."""

    def distortion(removed: dict[str, int]) -> float:
        kept = trials.kept(predictor, Policy(removed, around.bits))
        return trials.reference.compared(trials.network(kept), ENOUGH) if kept else 0.0

    found = {}
    for done, (name, channels) in enumerate(predictor.space.groups.items()):
        others = dict(around.removed)
        without = distortion({**others, name: 0})
        counts = sorted({min(max(round(share * channels), 1), channels - 1) for share in SHARES})
        found[name] = counts, [max(distortion({**others, name: count}) - without, TINY) for count in counts]
        say(done + 1)
    for name, (counts, costs) in found.items():
        predictor.corrected(name, counts, costs)
    expected = predictor.removed(around.removed)
    if expected > TINY:
        predictor.scaled(distortion(dict(around.removed)) / expected)
