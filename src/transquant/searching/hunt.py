"""Episodes: propose, keep within the budget, predict; and some of them for real."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from math import isclose

from transquant.errors import InputError
from transquant.searching.budget import Budget
from transquant.searching.episodes import Episode, Record
from transquant.searching.policy import Policy
from transquant.searching.prediction import Predictor
from transquant.searching.searchers import searcher
from transquant.searching.trial import Trials

_log = logging.getLogger("transquant")

FINALISTS = 6  # policies that are tried for real at the end
APART = 0.03  # of all channels: predictions of what differs by less err alike

Progress = Callable[[str, int, int], None]


class Hunt:
    """Episodes, and what is tried for real."""

    def __init__(
        self, predictor: Predictor, budget: Budget, trials: Trials, record: Record, say: Progress,
        watch: Callable[[Episode], None] | None,
    ) -> None:  # fmt: skip
        self.predictor, self.budget, self.trials, self.record = predictor, budget, trials, record
        self.say, self.watch = say, watch
        self.best: Episode | None = None

    def walk(self, method: str, episodes: int, check_every: int, seed: int) -> None:
        """All episodes; those that are on record are replayed. Raises InputError where the record is another search's."""
        agent = searcher(method, self.predictor, self.budget, episodes, seed)
        for number in range(episodes):
            start = time.perf_counter()
            policy, costs = self.budget.enforced(self.predictor, agent.propose())
            agent.observe(policy, costs.reward)
            known = self.record.known.get(number)
            # of outputs and ways to run a model, which are functions, the fingerprint knows nothing
            if known and (known.policy != policy or not isclose(known.reward, costs.reward, rel_tol=1e-6, abs_tol=1e-6)):
                raise InputError("the record of episodes is not this search's: delete it, or give another folder")
            episode = known or Episode(number, policy, costs, time.perf_counter() - start)
            if known is None:
                self.record.add(episode)
            if self.best is None or episode.reward > self.best.reward:
                self.best = episode
            if (number + 1) % check_every == 0 and number + 1 < episodes:
                self.best = self.tried(self.best)
            if self.watch:
                self.watch(episode)
            self.say("episodes", number + 1, episodes)

    def tried(self, episode: Episode) -> Episode:
        """The episode with what was measured, which goes on record."""
        if episode.measured is None:
            most = None if self.predictor.space.fixed else self.budget.bytes
            found = self.trials.measured(self.predictor, episode.policy, most)
            episode = replace(episode, measured=found)
            self.record.add(episode)
            gap = f"{episode.costs.bytes:.0f} bytes and distortion {episode.costs.distortion:.4g} predicted"
            _log.info("episode %d: %s, %d bytes and value %.5g measured", episode.number, gap, found.bytes, found.value)
        return episode

    def choose(self) -> Episode:
        """Of some that are predicted to be best, and differ in what they remove, the one that is worth most for real."""
        channels = sum(self.predictor.space.groups.values())
        ranked = sorted(self.record.known.values(), key=lambda e: (-e.reward, e.number))
        taken: list[Episode] = []
        for least in (APART * channels, 0.0):  # then what is nearer, where there are not enough
            for episode in ranked:
                apart = all(episode.policy != e.policy and _apart(episode.policy, e.policy) >= least for e in taken)
                if apart and len(taken) < FINALISTS:
                    taken.append(episode)
        finalists = []
        for k, episode in enumerate(taken):
            finalists.append(self.tried(episode))
            self.say("trials", k + 1, len(taken))
        return max(finalists, key=lambda e: (e.measured.value if e.measured else -float("inf"), e.reward))


def _apart(one: Policy, other: Policy) -> int:
    """Channels that one of two policies removes and the other does not, at least."""
    return sum(abs(count - other.removed[name]) for name, count in one.removed.items())
