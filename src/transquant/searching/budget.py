"""Budgets: what is the least that can be reached, and how a policy that is over is brought below.

As HAQ and AMC do (arXiv 1811.08886, 1802.03494): one walk after the other from the last layer to the first, each taking a bit, or
some channels, from every layer until the budget holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from transquant.errors import TargetError
from transquant.searching.policy import LEAST, Policy
from transquant.searching.prediction import Costs, Predictor

SHARE = 16  # a walk removes 1/16 of a group's channels


@dataclass(frozen=True, slots=True)
class Budget:
    """Most bytes of the file and most multiply–adds of a sample; None: no bound."""

    bytes: float | None = None
    macs: float | None = None

    def holds(self, costs: Costs) -> bool:
        """Whether what is predicted stays within."""
        return self._bytes(costs) and self._macs(costs)

    def _bytes(self, costs: Costs) -> bool:
        return self.bytes is None or costs.bytes <= self.bytes

    def _macs(self, costs: Costs) -> bool:
        return self.macs is None or costs.macs <= self.macs * (1 + 1e-9)

    def check(self, predictor: Predictor, size_of: Callable[[Policy], int]) -> None:
        """Raises TargetError, naming the smallest that is feasible, where even the least of all policies is over. `size_of`: bytes
        of a policy's real file."""
        space = predictor.space
        least = space.with_bits({g: c - 1 for g, c in space.groups.items()}, dict.fromkeys(space.weights, float(LEAST)))
        costs = predictor.costs(least)
        if self.bytes is not None and (smallest := size_of(least)) > self.bytes:
            raise TargetError(
                f"a file of {self.bytes:.0f} bytes cannot be reached: with one channel left of each group that may lose some, "
                f"the smallest takes {smallest} bytes"
            )
        if self.macs is not None and not self._macs(costs):
            whole = predictor.costs(replace(least, removed=dict.fromkeys(space.groups, 0))).macs
            least_share = min(1.005 * costs.macs / whole, 1.0)  # of three digits, and not less: it can be asked for
            raise TargetError(
                f"{self.macs / whole:.3g} of the multiply–adds cannot be reached: with one channel left of each group that may "
                f"lose some, it is {least_share:.3g}"
            )

    def enforced(self, predictor: Predictor, policy: Policy) -> tuple[Policy, Costs]:
        """The policy, or what is left of it when the budget holds, and what that costs. `check` has passed."""
        policy = _fewer_channels(predictor, policy, self._macs)
        if predictor.space.fixed is None:
            policy = _fewer_bits(predictor, policy, self._bytes)
        policy = _fewer_channels(predictor, policy, self._bytes)
        # what is spared makes steps finer, where steps are free
        return policy, predictor.costs(policy, None if predictor.space.fixed else self.bytes)


def _fewer_channels(predictor: Predictor, policy: Policy, holds: Callable[[Costs], bool]) -> Policy:
    groups = predictor.space.groups
    while not holds(predictor.costs(policy)):
        if all(policy.removed[g] == c - 1 for g, c in groups.items()):
            break
        for group, channels in reversed(list(groups.items())):
            more = min(policy.removed[group] + max(1, channels // SHARE), channels - 1)
            policy = replace(policy, removed={**policy.removed, group: more})
            if holds(predictor.costs(policy)):
                return policy
    return policy


def _fewer_bits(predictor: Predictor, policy: Policy, holds: Callable[[Costs], bool]) -> Policy:
    while not holds(predictor.costs(policy)) and any(bits > LEAST for bits in policy.bits.values()):
        for weight in reversed(predictor.space.weights):
            policy = replace(policy, bits={**policy.bits, weight: max(policy.bits[weight] - 1, float(LEAST))})
            if holds(predictor.costs(policy)):
                return policy
    return policy
