"""DDPG on a walk over the layers, as HAQ and AMC do it (arXiv 1811.08886, 1802.03494; Lillicrap et al. 2015), by stable-baselines3.

    state of a layer ─ actor ─ (share of channels, bits) ─ next layer … ─ policy ─ reward

A layer's two actions are AJPQ's two controllers: the layer controller takes a share of the channels that the layer computes, the
channel controller gives its rows bits. All steps of an episode get its reward, less a moving average.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from transquant.errors import MissingDependency
from transquant.searching.policy import LEAST, MOST, Policy
from transquant.searching.prediction import Predictor
from transquant.training.randomness import Stream

HIDDEN = [300, 300]
ACTOR_RATE, CRITIC_RATE = 1e-4, 1e-3
TAU, BATCH, REPLAY = 0.01, 64, 128  # soft updates; replayed steps; episodes that are kept
NOISE, DECAY, WARM_UP = 0.5, 0.99, 20  # of the exploration: truncated normal; a fifth of few episodes are warm-up
MEMORY = 0.5  # of the moving average of rewards


class Ddpg:
    """An agent that walks over the layers. Raises MissingDependency."""

    def __init__(self, predictor: Predictor, episodes: int, seed: int) -> None:
        try:
            import gymnasium
            from stable_baselines3 import DDPG
            from stable_baselines3.common.logger import Logger
        except ImportError as error:
            raise MissingDependency(f"method 'ddpg' needs {error.name}: pip install \"transquant[search]\"") from None
        self._walk = Walk(predictor)
        self._warm_up = min(WARM_UP, max(episodes // 5, 1))
        self._random = np.random.default_rng(seed)
        self._stream = Stream("ddpg", seed)  # stable-baselines3 draws from the global generators
        self._episode, self._mean, self._steps = 0, None, list[tuple[Any, Any, Any]]()
        with self._stream.drawn():
            self._agent: Any = DDPG(
                "MlpPolicy", _environment(gymnasium, self._walk), learning_rate=CRITIC_RATE, tau=TAU, gamma=1.0, batch_size=BATCH,
                buffer_size=REPLAY * len(self._walk), policy_kwargs={"net_arch": HIDDEN}, seed=seed, device="cpu",
            )  # fmt: skip
            self._agent.set_logger(Logger(folder=None, output_formats=[]))

    def propose(self) -> Policy:
        """Walk once, with noise."""
        self._steps = []
        spread = NOISE * DECAY ** max(self._episode - self._warm_up, 0)
        state = self._walk.begin()
        with self._stream.drawn():
            for _ in range(len(self._walk)):
                action = self._act(state, spread)
                following = self._walk.step((action + 1) / 2)
                self._steps.append((state, action, following))
                state = following
        return self._walk.policy()

    def observe(self, policy: Policy, reward: float) -> None:
        """Replay, one gradient step for each step of the walk once warm-up is over."""
        self._mean = reward if self._mean is None else MEMORY * self._mean + (1 - MEMORY) * reward
        with self._stream.drawn():
            for k, (state, action, following) in enumerate(self._steps):
                last = np.array([k == len(self._steps) - 1])
                centred = np.array([reward - self._mean], np.float32)
                self._agent.replay_buffer.add(state[None], following[None], action[None], centred, last, [{}])
            if self._episode >= self._warm_up:
                self._train(len(self._steps))
        self._episode += 1

    def _act(self, state: Any, spread: float) -> Any:
        """Actions in [−1, 1]; even in warm-up."""
        if self._episode < self._warm_up:
            return self._random.uniform(-1, 1, self._walk.actions).astype(np.float32)
        mean, _ = self._agent.predict(state, deterministic=True)
        noisy = mean + 2 * spread * self._random.normal(size=mean.shape)
        for _ in range(20):  # truncated: what falls outside is drawn again
            outside = np.abs(noisy) > 1
            if not outside.any():
                break
            noisy[outside] = (mean + 2 * spread * self._random.normal(size=mean.shape))[outside]
        return np.clip(noisy, -1, 1).astype(np.float32)

    def _train(self, steps: int) -> None:
        rates = ((self._agent.actor.optimizer, ACTOR_RATE), (self._agent.critic.optimizer, CRITIC_RATE))
        self._agent.lr_schedule = lambda _: CRITIC_RATE
        self._agent._update_learning_rate = lambda _: [g.update(lr=rate) for o, rate in rates for g in o.param_groups]
        self._agent.train(gradient_steps=steps, batch_size=BATCH)


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
        return self._states.shape[1] + 4

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


def _environment(gymnasium: Any, walk: Walk) -> Any:
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
