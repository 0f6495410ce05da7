"""What a policy costs, in about a millisecond: bytes of the file, multiply–adds, distortion.

    bytes       overhead + slope · (bits of rows that are kept, less the columns that are gone, and a byte a vector's value)
    macs        each layer's, times the shares of its rows and columns that are kept
    distortion  of removal, group by group, and of rounding, row by row: as if one did not change the other

Overhead, slope and the scale of rounding come from two real files of the whole network, and what removal costs is corrected by what
it does to the outputs, each group alone, at a few numbers of channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from transquant.searching.candidates import Removal
from transquant.searching.policy import Policy, Space, row_depths
from transquant.searching.tables import RowTable

TINY = 1e-9  # distortions below are as good as none


@dataclass(frozen=True, slots=True)
class Fit:
    """What turns sums over the tables into bytes and distortion of real files."""

    overhead: float = 0.0
    slope: float = 1.0
    rounding: float = 1.0


@dataclass(frozen=True, slots=True)
class Costs:
    """Predicted: `bytes` of the file, `macs` of one sample, `distortion` of the output in units of the metric. `values`: of the
    weights that are kept."""

    bytes: float
    macs: float
    distortion: float
    values: float

    @property
    def reward(self) -> float:
        """Higher is better: −log10 of the distortion."""
        return -float(np.log10(max(self.distortion, 1e-12)))


@dataclass(frozen=True, slots=True)
class Weight:
    """How policies change one weight of O rows and n columns. `group` computes its rows (`channels` int64 (O,), −1 for rows of no
    group); `readers`: by group that its columns read, columns a channel. `macs` of one sample, with everything kept."""

    name: str
    columns: int
    table: RowTable
    group: str | None
    channels: np.ndarray
    readers: Mapping[str, int]
    macs: float
    known: dict[tuple[int, float], tuple[float, float, int]] = field(default_factory=dict, repr=False)

    def share(self, removed: Mapping[str, int]) -> float:
        """Of its columns that are kept."""
        return 1 - sum(width * removed[group] for group, width in self.readers.items()) / self.columns


class Predictor:
    """Predicts what policies of a space cost. `removals` by group; `vectors`: by group ("" for none), values of vectors a
    channel; `other_macs`: of layers that no policy changes."""

    def __init__(
        self, space: Space, removals: Mapping[str, Removal], weights: Sequence[Weight], vectors: Mapping[str, float],
        other_macs: float = 0.0,
    ) -> None:  # fmt: skip
        self.space, self.removals, self.vectors, self.other_macs = space, dict(removals), vectors, other_macs
        self.weights = {w.name: w for w in weights}
        self.fit = Fit()

    def fitted(self, points: Sequence[tuple[Policy, int, float]]) -> None:
        """Take over what real files of the whole network say: (policy, bytes, measured distortion), of different sizes."""
        self.fit = Fit()
        raw = [self.costs(policy) for policy, _, _ in points]
        spread = raw[0].bytes - raw[-1].bytes
        slope = (points[0][1] - points[-1][1]) / spread if abs(spread) > 1 else points[0][1] / raw[0].bytes
        ratios = [real / max(self._rounding(policy), 1e-300) for policy, _, real in points]
        self.fit = Fit(points[0][1] - slope * raw[0].bytes, slope, float(np.exp(np.mean(np.log(np.maximum(ratios, 1e-9))))))

    def corrected(self, group: str, counts: Sequence[int], measured: Sequence[float]) -> None:
        """Take over what the outputs say of a group that has lost some channels: in between, what they say of the prediction is
        interpolated."""
        costs, places = self.removals[group].costs, np.arange(len(self.removals[group].costs))
        ratios = np.log(np.maximum(measured, TINY) / np.maximum(costs[list(counts)], TINY))
        scaled = costs * np.exp(np.interp(places, counts, ratios))
        self.removals[group] = replace(self.removals[group], costs=np.maximum.accumulate(scaled))

    def scaled(self, factor: float) -> None:
        """Scale what removal costs, of all groups alike."""
        self.removals = {name: replace(r, costs=factor * r.costs) for name, r in self.removals.items()}

    def rows(self, weight: Weight, removed: Mapping[str, int]) -> np.ndarray:
        """Rows of a weight that are kept, bool (O,)."""
        kept = np.ones(len(weight.channels), bool)
        if weight.group is not None:
            gone = np.zeros(self.space.groups[weight.group] + 1, bool)  # the last: rows of no group
            gone[self.removals[weight.group].order[: removed[weight.group]]] = True
            kept = ~gone[weight.channels]
        return kept

    def depths(self, policy: Policy) -> dict[str, np.ndarray]:
        """Depths of all rows by weight, float64 (O,), 0 where the row is removed."""
        found = {}
        for name, weight in self.weights.items():
            kept = self.rows(weight, policy.removed)
            found[name] = np.zeros(len(kept))
            found[name][kept] = row_depths(policy.bits[name], weight.table.importance[kept])
        return found

    def weight(self, weight: Weight, removed: int, bits: float) -> tuple[float, float, int]:
        """Bits and distortion of a weight with all its columns, and the number of its rows, when its group loses some channels."""
        key = removed, bits
        if key not in weight.known:
            kept = self.rows(weight, {} if weight.group is None else {weight.group: removed})
            rows = np.flatnonzero(kept)
            weight.known[key] = *weight.table.at(rows, row_depths(bits, weight.table.importance[rows])), len(rows)
        return weight.known[key]

    def costs(self, policy: Policy, budget: float | None = None) -> Costs:
        """Of a policy. `budget` bytes: what is left of it makes all steps finer, as the search for a size will do."""
        bits, errors, macs, values = 0.0, 0.0, self.other_macs, 0.0
        for name, weight in self.weights.items():
            own, error, rows = self.weight(weight, policy.removed.get(weight.group or "", 0), policy.bits[name])
            share = weight.share(policy.removed)
            bits, errors = bits + share * own, errors + share * error
            macs += weight.macs * share * rows / len(weight.channels)
            values += rows * share * weight.columns
        num_bytes = self.fit.overhead + self.fit.slope * (bits / 8 + self._vector_bytes(policy.removed))
        errors *= self.fit.rounding
        if budget is not None and budget > num_bytes and values:
            errors *= 4.0 ** (-8 * (budget - num_bytes) / (self.fit.slope * values))
        return Costs(num_bytes, macs, errors + self.removed(policy.removed), values)

    def removed(self, removed: Mapping[str, int]) -> float:
        """Predicted distortion of what is removed."""
        return float(sum(self.removals[group].costs[count] for group, count in removed.items()))

    def _vector_bytes(self, removed: Mapping[str, int]) -> float:
        channels = {group: count - removed[group] for group, count in self.space.groups.items()} | {"": 1}
        return sum(per_channel * channels[group] for group, per_channel in self.vectors.items())

    def _rounding(self, policy: Policy) -> float:
        none = replace(policy, removed=dict.fromkeys(policy.removed, 0))
        return self.costs(none).distortion - self.removed(none.removed)
