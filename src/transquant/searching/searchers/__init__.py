"""Who proposes policies: `propose` gives one, `observe` is told what became of it. The same seed proposes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from transquant.errors import InputError
from transquant.searching.budget import Budget
from transquant.searching.policy import Policy
from transquant.searching.prediction import Predictor


class Searcher(Protocol):
    """Proposes policies, one at a time."""

    def propose(self) -> Policy:
        """The policy of the next episode; it may be over the budget."""

    def observe(self, policy: Policy, reward: float) -> None:
        """What became of the proposal within the budget, and its reward, higher is better."""


def _lagrange(predictor: Predictor, budget: Budget, episodes: int, seed: int) -> Searcher:
    from transquant.searching.searchers.lagrange import Lagrange

    return Lagrange(predictor, budget, seed)


def _random(predictor: Predictor, budget: Budget, episodes: int, seed: int) -> Searcher:
    from transquant.searching.searchers.independent import Independent

    return Independent(predictor.space, seed)


def _tpe(predictor: Predictor, budget: Budget, episodes: int, seed: int) -> Searcher:
    from transquant.searching.searchers.sampled import Sampled

    return Sampled(predictor.space, "tpe", seed)


def _cma_es(predictor: Predictor, budget: Budget, episodes: int, seed: int) -> Searcher:
    from transquant.searching.searchers.sampled import Sampled

    return Sampled(predictor.space, "cma-es", seed)


def _ddpg(predictor: Predictor, budget: Budget, episodes: int, seed: int) -> Searcher:
    from transquant.searching.searchers.ddpg import Ddpg

    return Ddpg(predictor, episodes, seed)


METHODS: dict[str, Callable[[Predictor, Budget, int, int], Searcher]] = {
    "lagrange": _lagrange, "random": _random, "tpe": _tpe, "cma-es": _cma_es, "ddpg": _ddpg,
}  # fmt: skip
BEST = "lagrange"  # what method "auto" is: benchmarks/search.py


def searcher(method: str, predictor: Predictor, budget: Budget, episodes: int, seed: int) -> Searcher:
    """A searcher by name. Raises InputError for another name, MissingDependency."""
    if method not in ("auto", *METHODS):
        raise InputError(f"method is {method!r}, allowed are 'auto', {', '.join(map(repr, METHODS))}")
    return METHODS[BEST if method == "auto" else method](predictor, budget, episodes, seed)
