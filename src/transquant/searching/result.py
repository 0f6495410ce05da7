"""What a search gives: the smaller network, its file, and how it came to that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from transquant.codec import CompressedModel
from transquant.plots import new_figure, write_figure
from transquant.searching.episodes import Episode, Measured
from transquant.searching.policy import Policy
from transquant.searching.prediction import Costs


@dataclass(frozen=True, slots=True)
class Summary:
    """The whole network and the one that was found. `bytes` of the tensors and of the file; `macs` of one sample and `milliseconds`
    of a batch of one, each before and after; `predicted` of the policy and `measured` of its file on the held-back samples,
    before the final compression and after it (`final`), beside the float network's value (`reference`)."""

    bytes: tuple[int, int]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    milliseconds: tuple[float, float]
    predicted: Costs
    measured: Measured
    final: float
    reference: float

    def __str__(self) -> str:
        (whole, file), (before, after), (slow, fast) = self.bytes, self.macs, self.milliseconds
        return (
            f"{file:,} bytes, {whole / file:.2f} times smaller; {after:,} multiply-adds, {100 * after / max(before, 1):.1f} % of "
            f"{before:,}; {fast:.2f} ms a sample, before {slow:.2f} ms; value on held-back samples {self.final:.5g} "
            f"(float {self.reference:.5g}); predicted distortion {self.predicted.distortion:.4g}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "bytes": self.bytes[1], "original_bytes": self.bytes[0], "ratio": self.bytes[0] / self.bytes[1],
            "parameters": self.parameters[1], "original_parameters": self.parameters[0],
            "macs": self.macs[1], "original_macs": self.macs[0],
            "milliseconds": self.milliseconds[1], "original_milliseconds": self.milliseconds[0],
            "predicted": {"bytes": self.predicted.bytes, "macs": self.predicted.macs, "distortion": self.predicted.distortion},
            "measured": {"bytes": self.measured.bytes, "value": self.measured.value},
            "value": self.final, "float_value": self.reference,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class SearchResult:
    """`model`: the network that was found, an ordinary module with the decoded weights; `network`: the same in float, its layers
    making up for the channels that are gone, before anything is rounded: for training. `compressed`: the file. `masked`: the
    network's graph could not be followed, so removed channels are still there, as zeros."""

    model: nn.Module
    compressed: CompressedModel
    policy: Policy
    episodes: Sequence[Episode]
    report: Summary
    network: nn.Module = field(repr=False)
    channels: Mapping[str, int] = field(repr=False)  # by group, before
    masked: bool = False

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the frontier, the best reward so far, and the policy layer by layer.

        Raises MissingDependency without matplotlib, InputError for the ending of another kind of file, OutputError."""
        figure = new_figure(11.0, 7.0)
        frontier, best, groups, weights = figure.subplots(2, 2).reshape(-1)
        self._draw_frontier(frontier)
        so_far, rewards = -float("inf"), []
        for episode in self.episodes:
            so_far = max(so_far, episode.reward)
            rewards.append(so_far)
        best.plot(range(1, len(rewards) + 1), rewards)
        best.set(xlabel="episode", ylabel="best reward so far, −log10 of the distortion")
        names = list(self.channels)
        groups.bar(names, [self.channels[n] for n in names], color="lightgray", label="removed")
        groups.bar(names, [self.channels[n] - self.policy.removed[n] for n in names], label="kept")
        groups.set(ylabel="channels")
        groups.legend()
        weights.bar(list(self.policy.bits), list(self.policy.bits.values()))
        weights.set(ylabel="mean bits of kept rows")
        for axes in (groups, weights):
            axes.tick_params("x", rotation=90, labelsize=5)
        for axes in (frontier, best):
            axes.grid(True, alpha=0.3)
        write_figure(Path(path), figure)

    def _draw_frontier(self, axes: Any) -> None:
        tried = [e.costs for e in self.episodes]
        axes.scatter([c.macs for c in tried], [c.distortion for c in tried], s=6, color="gray", label="episodes")
        least, front = float("inf"), list[Costs]()
        for costs in sorted(tried, key=lambda c: (c.macs, c.distortion)):
            if costs.distortion < least:
                least = costs.distortion
                front.append(costs)
        axes.plot([c.macs for c in front], [c.distortion for c in front], label="frontier")
        axes.scatter([self.report.predicted.macs], [self.report.predicted.distortion], marker="*", s=90, zorder=3, label="chosen")
        axes.set(xlabel="multiply–adds a sample", ylabel="predicted distortion", yscale="log")
        axes.legend()
