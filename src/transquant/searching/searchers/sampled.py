"""TPE and CMA-ES by Optuna: the numbers of a policy as that many parameters in [0, 1], shares of channels as squares of them, so
that both begin around a quarter."""

from __future__ import annotations

from typing import Any

import numpy as np

from transquant.errors import MissingDependency
from transquant.searching.policy import Policy, Space


class Sampled:
    """One of Optuna's samplers. Raises MissingDependency."""

    def __init__(self, space: Space, method: str, seed: int) -> None:
        try:
            import optuna
        except ImportError:
            raise MissingDependency(f'method {method!r} needs Optuna: pip install "transquant[search]"') from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._study = optuna.create_study(direction="maximize", sampler=_sampler(optuna, method, seed))
        self._trial: Any = None

    def propose(self) -> Policy:
        """The next policy."""
        self._trial = self._study.ask()
        numbers = np.array([self._trial.suggest_float(f"x{k}", 0.0, 1.0) for k in range(self._space.size)])
        numbers[: len(self._space.groups)] **= 2
        return self._space.policy(numbers)

    def observe(self, policy: Policy, reward: float) -> None:
        """The sampler learns what its own numbers were worth."""
        self._study.tell(self._trial, reward)


def _sampler(optuna: Any, method: str, seed: int) -> Any:
    if method == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    try:
        import cmaes  # noqa: F401
    except ImportError:
        raise MissingDependency("method 'cma-es' needs cmaes: pip install \"transquant[search]\"") from None
    return optuna.samplers.CmaEsSampler(seed=seed)
