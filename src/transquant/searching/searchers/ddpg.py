"""DDPG on a walk over the layers, as HAQ and AMC do it (arXiv 1811.08886, 1802.03494; Lillicrap et al. 2015), by stable-baselines3.

    state of a layer ─ actor ─ (share of channels, bits) ─ next layer … ─ policy ─ reward

A layer's two actions are AJPQ's two controllers: the layer controller takes a share of the channels that the layer computes, the
channel controller gives its rows bits. All steps of an episode get its reward, less a moving average.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from transquant.errors import MissingDependency
from transquant.searching.policy import Policy
from transquant.searching.prediction import Predictor
from transquant.searching.searchers.walk import Walk, environment
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
        self._episode, self._steps = 0, list[tuple[Any, Any, Any]]()
        self._mean: float | None = None
        with self._stream.drawn():
            self._agent: Any = _agent(DDPG)(
                "MlpPolicy", environment(gymnasium, self._walk), learning_rate=CRITIC_RATE, tau=TAU, gamma=1.0, batch_size=BATCH,
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
                self._agent.train(gradient_steps=len(self._steps), batch_size=BATCH)
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


def _agent(base: Any) -> Any:
    """The class of agents, with a rate of its own for the actor."""

    class Agent(base):  # type: ignore[misc]
        def _update_learning_rate(self, optimizers: Any) -> None:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = ACTOR_RATE if optimizer is self.actor.optimizer else CRITIC_RATE

    return Agent
