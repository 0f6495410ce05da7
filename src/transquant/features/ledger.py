"""Where the bytes of feature maps went: counted on the packets themselves, point by point."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log10, nan
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transquant.container import write_file
from transquant.features.traffic import Traffic, traffic

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "name", "activation", "mode", "samples", "values", "bytes", "bits_per_value", "ideal_bits", "overhead_bytes", "sparsity",
    "coded_sparsity", "snr_db",
)  # fmt: skip


@dataclass(slots=True)
class Row:
    """One point, or all of them. `values`: of maps, before any transform. `bytes`: of whole packets. `ideal_bits`: information
    content of the symbols under their coders' models. `zeros`, `coded_zeros`: values that are exactly 0 behind the activation,
    in the network as it is and after coding. `signal`, `noise`: sums of squares behind the activation, of values and errors."""

    name: str
    activation: str
    mode: str
    samples: int = 0
    values: int = 0
    bytes: int = 0
    ideal_bits: float = 0.0
    zeros: int = 0
    coded_zeros: int = 0
    signal: float = 0.0
    noise: float = 0.0

    @property
    def bits_per_value(self) -> float:
        """8 · bytes / values."""
        return 8 * self.bytes / self.values if self.values else nan

    @property
    def overhead_bytes(self) -> float:
        """Bytes above the information content: heads of packets, and what the coder loses."""
        return self.bytes - self.ideal_bits / 8

    @property
    def sparsity(self) -> float:
        """Share of exact zeros, of the maps before coding."""
        return self.zeros / self.values if self.values else nan

    @property
    def coded_sparsity(self) -> float:
        """Share of exact zeros, of what the network goes on with."""
        return self.coded_zeros / self.values if self.values else nan

    @property
    def snr_db(self) -> float:
        """10 · log10(signal / noise)."""
        if not self.noise or not self.signal:
            return nan if not self.values or self.noise else inf
        return 10 * log10(self.signal / self.noise)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; numbers that are not finite are None."""
        row = {name: getattr(self, name) for name in COLUMNS}
        return {k: None if isinstance(v, float) and not -inf < v < inf else v for k, v in row.items()}


class Ledger:
    """What a codec did while it was attached; grows with every forward pass. `points`: a row each, in execution order."""

    def __init__(self, points: Sequence[Row]) -> None:
        self.points = list(points)

    @property
    def total(self) -> Row:
        """All points together; `samples`: those that passed the first of them."""
        total = Row("total", "", "", samples=self.points[0].samples if self.points else 0)
        for row in self.points:
            total.values += row.values
            total.bytes += row.bytes
            total.ideal_bits += row.ideal_bits
            total.zeros += row.zeros
            total.coded_zeros += row.coded_zeros
            total.signal += row.signal
            total.noise += row.noise
        return total

    @property
    def values(self) -> int:
        """Values of all maps."""
        return self.total.values

    @property
    def bytes(self) -> int:
        """Bytes of all packets."""
        return self.total.bytes

    @property
    def bits_per_value(self) -> float:
        """8 · bytes / values."""
        return self.total.bits_per_value

    @property
    def traffic(self) -> Traffic:
        """Memory traffic, coded and not."""
        return traffic(self.values, self.bytes)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        moved = self.traffic
        return {
            "total": self.total.as_dict(),
            "traffic": {"coded": moved.coded, "eight_bit": moved.eight_bit, "sixteen_bit": moved.sixteen_bit},
            "points": [row.as_dict() for row in self.points],
        }

    def table(self) -> Table:
        """For a terminal; `print(ledger)` is the same as text."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="")
        for title in ("point", "mode"):
            table.add_column(title, no_wrap=True)
        for title in ("values", "bytes", "bits/value", "ideal", "zeros %", "coded %", "SNR dB"):
            table.add_column(title, justify="right", no_wrap=True)
        for row in [*self.points, self.total]:
            ideal = row.ideal_bits / row.values if row.values else nan
            table.add_row(
                row.name, row.mode, f"{row.values:,}", f"{row.bytes:,}", f"{row.bits_per_value:.3f}", f"{ideal:.3f}",
                f"{100 * row.sparsity:.1f}", f"{100 * row.coded_sparsity:.1f}", f"{row.snr_db:.1f}",
            )  # fmt: skip
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=160).print(self.table())
        moved = self.traffic
        text.write(
            f"\nmemory traffic, each map written once and read once: {moved.coded:,} bytes; {moved.against_eight_bit:.2f} x less "
            f"than with 8 bits a value, {moved.against_sixteen_bit:.2f} x less than with 16\n"
        )
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write a line a point and a last one for all of them. Raises OutputError."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.as_dict() for row in [*self.points, self.total])
        write_file(path, text.getvalue().encode())

    def to_json(self, path: str | PathLike[str]) -> None:
        """Write `as_dict()`. Raises OutputError."""
        write_file(path, (json.dumps(self.as_dict(), indent=1) + "\n").encode())

    def to_picture(self, path: str | PathLike[str]) -> None:
        """Write a picture: bits a value and signal-to-noise of each point. Raises MissingDependency, OutputError."""
        from transquant.plots import new_figure, write_figure

        figure = new_figure(max(6.4, 1.5 + 0.22 * len(self.points)), 5.2)
        places, names = range(len(self.points)), [row.name for row in self.points]
        above, below = figure.subplots(2, 1, sharex=True)
        above.bar(places, [row.bits_per_value for row in self.points], label="packets")
        above.plot(
            places, [row.ideal_bits / max(row.values, 1) for row in self.points], "k_", markersize=12, label="information content"
        )
        above.axhline(self.bits_per_value, color="gray", linestyle="--", linewidth=1, label="mean")
        above.set_ylabel("bits per value")
        above.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)  # beside no bar is there room
        below.bar(places, [row.snr_db if -inf < row.snr_db < inf else 0 for row in self.points], color="C2")
        below.set_ylabel("signal to noise (dB)")
        below.set_xticks(places, names, rotation=90, fontsize=7)
        write_figure(Path(path), figure)
