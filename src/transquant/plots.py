"""Pictures: rate–distortion curves, and what others draw themselves."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transquant.container import write_file
from transquant.errors import InputError, MissingDependency


def write_curve(path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], label: str, floor: float | None = None) -> None:
    """Write a picture of curves {name: [(bits a parameter, value)]}; `floor` draws a dashed line, the float network's value.

    Raises MissingDependency without matplotlib, OutputError."""
    figure = new_figure(6.4, 4.2)
    axes = figure.add_subplot()
    for (name, points), marker in zip(curves.items(), "osd^v<>ph" * 9, strict=False):
        ordered = sorted(points)
        axes.plot([x for x, _ in ordered], [y for _, y in ordered], marker=marker, label=name)
    if floor is not None:
        axes.axhline(floor, color="gray", linestyle="--", linewidth=1, label="float")
    axes.set_xlabel("bits per parameter, whole file")
    axes.set_ylabel(label)
    if "distortion" in label:
        axes.set_yscale("log")
    axes.grid(True, alpha=0.3)
    axes.legend()
    write_figure(path, figure)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure, in inches. Raises MissingDependency without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependency('pictures need matplotlib: pip install "transquant[plots]"') from None
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_picture(path: Path) -> None:
    """Raises InputError where a name ends in no format that pictures have, MissingDependency without matplotlib."""
    _format(path, new_figure(1, 1))


def write_figure(path: Path, figure: Any) -> None:
    """Write a Figure in the format that the path's ending names. Raises InputError for another, OutputError."""
    ending = _format(path, figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=ending, metadata={"Software": None} if ending == "png" else None)
    write_file(path, buffer.getvalue())


def _format(path: Path, figure: Any) -> str:
    formats = figure.canvas.get_supported_filetypes()
    ending = path.suffix.removeprefix(".") or "png"
    if ending not in formats:
        raise InputError(f"the picture is {path}, expected a name that ends in one of {', '.join(sorted(formats))}")
    return ending
