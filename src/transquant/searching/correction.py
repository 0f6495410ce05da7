"""What removal costs, corrected by what it does to the outputs of the network.

Predictions see each layer by itself, and no further than the first order of what follows. So every group is tried at a few numbers
of channels: alone, and then with all the others as the solution by prices has them, since what one group loses weighs more where
others have lost something too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from transquant.searching.budget import Budget
from transquant.searching.policy import Policy
from transquant.searching.prediction import TINY, Predictor
from transquant.searching.searchers.lagrange import solve
from transquant.searching.trial import Trials

SHARES = (0.25, 0.5, 0.9)  # of a group's channels
ENOUGH = 4  # micro-batches
LEAST, MOST = 0.5, 8.0  # times what a group costs alone: beside others it may seem to cost nothing, and would then be used up

Progress = Callable[[str, int, int], None]


def correct(predictor: Predictor, budget: Budget, trials: Trials, say: Progress) -> None:
    """Correct the removals of a predictor, in two rounds."""
    groups = predictor.space.groups
    none = Policy(dict.fromkeys(groups, 0), dict.fromkeys(predictor.space.weights, 8.0))
    shares = {g: {min(max(round(share * c), 1), c - 1) for share in SHARES} for g, c in groups.items()}
    _round(predictor, none, shares, trials, lambda done: say("groups", done, 2 * len(groups)))
    near, _ = budget.enforced(predictor, solve(predictor, budget))
    if any(near.removed.values()):
        around = {g: {k // 2, k, (k + c) // 2} - {0, c} for (g, k), c in zip(near.removed.items(), groups.values(), strict=True)}
        _round(predictor, near, around, trials, lambda done: say("groups", len(groups) + done, 2 * len(groups)))


def _round(
    predictor: Predictor, around: Policy, counts: Mapping[str, Iterable[int]], trials: Trials, say: Callable[[int], None]
) -> None:
    """Each group's costs at some numbers of channels, the others as a policy has them; so that their sum at the policy is what it
    does to the outputs."""

    def distortion(removed: Mapping[str, int]) -> float:
        kept = trials.kept(predictor, Policy(removed, around.bits))
        return trials.reference.compared(trials.network(kept).eval(), ENOUGH) if kept else 0.0

    here, found, beside = distortion(around.removed), {}, any(around.removed.values())
    for done, (name, numbers) in enumerate(counts.items()):
        own, others = around.removed[name], dict(around.removed)
        each = {k: here if k == own else distortion({**others, name: k}) for k in {0, *numbers}}
        costs = {k: max(each[k] - each[0], TINY) for k in sorted(numbers)}
        if beside:
            alone = predictor.removals[name].costs
            costs = {k: min(max(cost, LEAST * alone[k]), MOST * alone[k]) for k, cost in costs.items()}
        found[name] = list(costs), list(costs.values())
        say(done + 1)
    for name, (places, values) in found.items():
        predictor.corrected(name, places, values)
    expected = predictor.removed(around.removed)
    if expected > TINY:
        predictor.scaled(here / expected)
