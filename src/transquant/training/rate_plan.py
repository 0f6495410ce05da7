"""What a bit costs from group to group of rows, so that all of them together take what they may.

Groups that come first are coarse, the last ones fine: what the first have lost the others make up for, what the last lose nobody
does. The price of a group follows from what the groups before it have taken.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from transquant.records import FloatArray

TILT = 1.2  # e-folds of a bit's price, from the first group to the last
TAPER = 0.6  # by how much the first group is larger than the mean, and the last one smaller
SLOPE = -0.45  # bits a weight for each e-fold of the price, about
MEMORY = 0.15  # share of the newest group in what is expected of those to come
LIMITS = 0.2, 1.2  # e-folds of correction, at first and at last: rows that have learned to take less come later


def share_of_rows(progress: float) -> float:
    """Of all rows, those in the first groups: a share `progress` of their number."""
    return (1 + TAPER) * progress - TAPER * progress * progress


@dataclass(slots=True)
class RatePlan:
    """Of `groups` groups. `aim`: bits a weight, of all; `offset`: what groups take at a log price of 0, as seen lately, bits a
    weight; `spent`: by groups so far, bits a weight of all; `group`: their number; `correction`: e-folds of the price."""

    groups: int
    aim: float
    offset: float
    spent: float = 0.0
    group: int = 0
    correction: float = 0.0

    @classmethod
    def of(cls, groups: int, aim: float) -> RatePlan:
        """At the beginning: a log price of 0 is expected to give the aim."""
        plan = cls(groups, aim, 0.0)
        shares = plan._shares()
        plan.offset = aim - SLOPE * float((shares * plan._tilts()).sum())
        return plan

    @property
    def log_price(self) -> float:
        """Of a bit in the group to come, in e-folds."""
        return float(self._tilts()[min(self.group, self.groups - 1)]) + self.correction

    def measure(self, spent: float) -> None:
        """A group was fixed; all groups so far take `spent` bits a weight of all."""
        shares, tilts, k = self._shares(), self._tilts(), self.group
        if k:  # the coder has yet to adapt in the first
            self.offset += MEMORY * ((spent - self.spent) / float(shares[k]) - SLOPE * self.log_price - self.offset)
        self.spent, self.group = spent, k + 1
        rest = shares[k + 1 :]
        if rest.size:
            left = float(rest.sum())
            expected = self.offset + SLOPE * float((rest * tilts[k + 1 :]).sum()) / left
            limit = LIMITS[0] + (LIMITS[1] - LIMITS[0]) * self.group / self.groups
            self.correction = float(np.clip(((self.aim - spent) / left - expected) / SLOPE, -limit, limit))

    def expected(self) -> float:
        """Bits a weight that all groups will take."""
        rest, tilts = self._shares()[self.group :], self._tilts()[self.group :]
        return self.spent + float((rest * (self.offset + SLOPE * (tilts + self.correction))).sum())

    def state(self) -> dict[str, Any]:
        """Numbers, to go on with."""
        return asdict(self)

    def _shares(self) -> FloatArray:
        return np.diff([share_of_rows(k / self.groups) for k in range(self.groups + 1)])

    def _tilts(self) -> FloatArray:
        return TILT * (0.5 - np.arange(self.groups) / max(self.groups - 1, 1))
