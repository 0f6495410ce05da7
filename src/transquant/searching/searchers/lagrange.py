"""The same problem by Lagrange: each byte and each multiply–add has a price, and everything takes what is cheapest at it.

    least   D + λ · bytes + μ · macs   over the number of channels of each group and the mean bits of each weight

At given prices a weight's best bits depend on how many of its rows are left, not on its columns, which scale distortion and bits
alike; so with bits chosen in advance for every number of rows, groups are decided one after the other until none changes. λ and μ
come from bisection. That is the first proposal; the others are small steps from the best so far.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from transquant.records import FloatArray
from transquant.searching.budget import Budget
from transquant.searching.policy import LEAST, MOST, Policy
from transquant.searching.prediction import Predictor, Weight

COUNTS = 33  # numbers of channels of a group that are looked at
SWEEPS = 8  # over all groups, at most
HALVINGS = 30
CHANNELS, BITS = 0.08, 0.6  # standard deviations of small steps


class Lagrange:
    """The policy of least cost at the prices that meet the budgets, then small steps around the best."""

    def __init__(self, predictor: Predictor, budget: Budget, seed: int) -> None:
        self._predictor, self._budget = predictor, budget
        self._random = np.random.default_rng(seed)
        self._best: tuple[float, Policy] | None = None
        self._proposals = 0

    def propose(self) -> Policy:
        """The next policy."""
        self._proposals += 1
        if self._best is None or self._proposals == 1:
            return solve(self._predictor, self._budget)
        return self._near(self._best[1])

    def observe(self, policy: Policy, reward: float) -> None:
        """What is at least as good is where the next step begins."""
        if self._best is None or reward >= self._best[0]:
            self._best = reward, policy

    def _near(self, policy: Policy) -> Policy:
        """A policy that differs in a few numbers."""
        space = self._predictor.space
        removed, bits = dict(policy.removed), dict(policy.bits)
        names = [*space.groups, *(() if space.fixed else space.weights)]
        for k in self._random.choice(len(names), min(1 + int(self._random.integers(3)), len(names)), replace=False):
            name = names[int(k)]
            if k < len(space.groups):
                change = self._random.normal() * max(CHANNELS * space.groups[name], 1.0)
                moved = removed[name] + (int(np.sign(change)) or 1) * max(1, round(abs(change)))
                removed[name] = min(max(moved, 0), space.groups[name] - 1)
            else:
                bits[name] += float(self._random.normal()) * BITS
        return space.with_bits(removed, bits)


def solve(predictor: Predictor, budget: Budget) -> Policy:
    """The policy of least predicted distortion within the budget, as far as prices can tell."""
    tables = _Tables(predictor)
    # one price a time: μ for λ = 0, then λ for each μ, since bytes fall with multiply–adds
    if budget.macs is None:
        return tables.met(budget.bytes, 0.0)

    def within(log_price: float) -> Policy | None:
        policy = tables.met(budget.bytes, 2.0**log_price)
        return policy if predictor.costs(policy).macs <= (budget.macs or 0.0) else None

    cheap = tables.met(budget.bytes, 0.0)
    if predictor.costs(cheap).macs <= budget.macs:
        return cheap
    low, high, best = tables.log_scale - 40.0, tables.log_scale + 20.0, cheap
    for _ in range(HALVINGS // 2 + 3):
        middle = (low + high) / 2
        found = within(middle)
        if found is None:
            low = middle
        else:
            high, best = middle, found
    return best


class _Tables:
    """Bits and distortion of every weight for some numbers of its rows and all mean bits."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor, space = predictor, predictor.space
        self.counts = {g: np.unique(np.linspace(0, c - 1, min(COUNTS, c)).astype(int)) for g, c in space.groups.items()}
        self.bits = np.array([float(space.fixed)]) if space.fixed else np.arange(LEAST, MOST + 0.25, 0.5)
        self.known = {name: self._table(weight) for name, weight in predictor.weights.items()}
        self.rows_of: dict[str, list[Weight]] = {g: [] for g in space.groups}
        self.columns_of: dict[str, list[Weight]] = {g: [] for g in space.groups}
        for weight in predictor.weights.values():
            if weight.group is not None:
                self.rows_of[weight.group].append(weight)
            for group in weight.readers:
                self.columns_of[group].append(weight)
        whole = predictor.costs(space.with_bits(dict.fromkeys(space.groups, 0), dict.fromkeys(space.weights, float(MOST))))
        self.log_scale = float(np.log2(1 / max(whole.macs, 1.0)))

    def _table(self, weight: Weight) -> FloatArray:
        """float64 (2, counts, bits): bits and distortion."""
        counts = [0] if weight.group is None else self.counts[weight.group]
        found = [[self.predictor.weight(weight, int(k), float(b))[:2] for b in self.bits] for k in counts]
        return np.array(found).transpose(2, 0, 1)

    def met(self, num_bytes: float | None, mac_price: float) -> Policy:
        """The policy of least cost at a price of multiply–adds, with the price of bytes that meets their budget."""
        if num_bytes is None:
            return self.best(0.0, mac_price)
        low, high = -80.0, 10.0  # log2 of the distortion a byte is worth
        best = self.best(2.0**high, mac_price)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            found = self.best(2.0**middle, mac_price)
            if self.predictor.costs(found).bytes <= num_bytes:
                high, best = middle, found
            else:
                low = middle
            if high - low < 0.02:
                break
        return best

    def best(self, byte_price: float, mac_price: float) -> Policy:
        """The policy of least D + λ · bytes + μ · macs, one group after the other."""
        predictor, fit = self.predictor, self.predictor.fit
        price = byte_price * fit.slope / 8
        costs, choices = {}, {}
        for name, (bits, errors) in self.known.items():
            each = fit.rounding * errors + price * bits
            choices[name] = each.argmin(1)
            costs[name] = each.min(1)
        place = dict.fromkeys(self.counts, 0)
        for _ in range(SWEEPS):
            before = dict(place)
            for group in place:
                place[group] = int(np.argmin(self._along(group, place, costs, byte_price * fit.slope, mac_price)))
            if place == before:
                break
        removed = {g: int(self.counts[g][k]) for g, k in place.items()}
        bits = {n: float(self.bits[choices[n][0 if w.group is None else place[w.group]]]) for n, w in predictor.weights.items()}
        return predictor.space.with_bits(removed, bits)

    def _along(
        self, group: str, place: Mapping[str, int], costs: Mapping[str, FloatArray], byte_price: float, mac_price: float
    ) -> FloatArray:
        """What every number of channels of one group costs, the others as they are."""
        predictor, counts = self.predictor, self.counts[group]
        removed = {g: int(self.counts[g][k]) for g, k in place.items()}
        total: FloatArray = predictor.removals[group].costs[counts] - byte_price * predictor.vectors.get(group, 0.0) * counts
        for weight in self.rows_of[group]:
            gone = np.array([(weight.channels >= 0).mean() * k / predictor.space.groups[group] for k in counts])
            shares = np.full(len(counts), weight.share(removed))
            if group in weight.readers:  # it reads what it computes
                shares -= weight.readers[group] * (counts - removed[group]) / weight.columns
            total = total + shares * (costs[weight.name] + mac_price * weight.macs * (1 - gone))
        for weight in self.columns_of[group]:
            if weight.group == group:
                continue
            k = 0 if weight.group is None else place[weight.group]
            rows = 1.0
            if weight.group is not None:
                rows -= (weight.channels >= 0).mean() * self.counts[weight.group][k] / predictor.space.groups[weight.group]
            shares = weight.share({**removed, group: 0}) - weight.readers[group] * counts / weight.columns
            total = total + shares * (costs[weight.name][k] + mac_price * weight.macs * rows)
        return total
