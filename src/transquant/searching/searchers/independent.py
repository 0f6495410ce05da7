"""Random search: policies that know nothing of each other."""

from __future__ import annotations

import numpy as np

from transquant.searching.policy import Policy, Space


class Independent:
    """Draws every number of a policy evenly; shares of channels up to a bound that is drawn too, so that light and heavy pruning
    are equally likely."""

    def __init__(self, space: Space, seed: int) -> None:
        self._space, self._random = space, np.random.default_rng(seed)

    def propose(self) -> Policy:
        """The next policy."""
        numbers = self._random.random(self._space.size)
        numbers[: len(self._space.groups)] *= self._random.random()
        return self._space.policy(numbers)

    def observe(self, policy: Policy, reward: float) -> None:
        """Nothing is learned."""
