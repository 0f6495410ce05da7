"""A walk over the layers of a network, at the end of which there is a policy: what an agent lives in."""

from __future__ import annotations

from typing import Any

import numpy as np

from transquant.searching.policy import LEAST, MOST, Policy
from transquant.searching.prediction import Predictor


class Walk:
    """A walk over the layers: states float32 (11,) in [0, 1], actions (2,) in [0, 1], or (1,) where the depth is fixed."""

    def __init__(self, predictor: Predictor) -> None:
        self._space = predictor.space
        self._layers = [predictor.weights[name] for name in predictor.space.weights]
        self.actions = 1 if predictor.space.fixed else 2
        first: dict[str, str] = {}
        for weight in self._layers:
            if weight.group is not None:
                first.setdefault(weight.group, weight.name)
        self._decides = {name: group for group, name in first.items()}  # by weight, the group whose share it decides
        facts = np.array([self._facts(k) for k in range(len(self._layers))])
        low, high = facts.min(0), facts.max(0)
        self._states = ((facts - low) / np.where(high > low, high - low, 1)).astype(np.float32)
        macs = np.array([w.macs for w in self._layers])
        self._left = (macs[::-1].cumsum()[::-1] - macs) / max(macs.sum(), 1.0)
        self.begin()

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def width(self) -> int:
        """Numbers of a state."""
        return int(self._states.shape[1]) + 4

    def begin(self) -> Any:
        """The first state."""
        self._place, self._shares, self._bits = 0, dict.fromkeys(self._space.groups, 0.0), dict[str, float]()
        self._last, self._taken = np.zeros(2, np.float32), 0.0
        return self._state()

    def step(self, action: Any) -> Any:
        """Decide one layer; the next state."""
        weight = self._layers[self._place]
        share = float(action[0])
        if group := self._decides.get(weight.name):
            self._shares[group] = share
            self._taken += share * weight.macs / max(sum(w.macs for w in self._layers), 1.0)
        self._bits[weight.name] = float(action[1]) if self.actions == 2 else 1.0
        self._last = np.array([share, self._bits[weight.name]], np.float32)
        self._place = min(self._place + 1, len(self._layers) - 1)
        return self._state()

    def policy(self) -> Policy:
        """What the walk has decided; bits as HAQ rounds them, each of 1 … 8 with an equal part of the range."""
        bits = {}
        for name, x in self._bits.items():
            bits[name] = min(max(LEAST - 0.5 + (MOST - LEAST + 1) * x, LEAST), MOST)
        removed = {g: min(int(self._shares[g] * c), c - 1) for g, c in self._space.groups.items()}
        return self._space.with_bits(removed, bits)

    def _state(self) -> Any:
        own = self._states[self._place]
        return np.concatenate([own, self._last, np.array([self._taken, self._left[self._place]], np.float32)]).astype(np.float32)

    def _facts(self, k: int) -> list[float]:
        weight = self._layers[k]
        rows, values = len(weight.channels), len(weight.channels) * weight.columns
        own = self._space.groups.get(weight.group or "", 0)
        return [float(k), float(weight.group is not None and not weight.readers), np.log2(rows), np.log2(weight.columns),
                np.log2(values), np.log2(max(weight.macs / values, 1.0)), float(own)]  # fmt: skip


def environment(gymnasium: Any, walk: Walk) -> Any:
    """The walk as a gymnasium environment: for its spaces. Rewards come when the policy has been looked at, in `observe`."""

    class Environment(gymnasium.Env):  # type: ignore[misc]
        observation_space = gymnasium.spaces.Box(0.0, 1.0, (walk.width,), np.float32)
        action_space = gymnasium.spaces.Box(-1.0, 1.0, (walk.actions,), np.float32)

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
            super().reset(seed=seed)
            self.steps = 0
            return walk.begin(), {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            self.steps += 1
            return walk.step((action + 1) / 2), 0.0, self.steps >= len(walk), False, {}

    return Environment()
