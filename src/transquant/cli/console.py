"""What a person sees while a command runs: progress and log on stderr, data on stdout."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import typer


def set_logging(quiet: bool, verbose: bool) -> None:
    """Log to stderr: warnings, with -v everything, with -q errors only."""
    level = logging.ERROR if quiet else logging.DEBUG if verbose else logging.WARNING
    logging.basicConfig(handlers=[_Stderr()], level=level, format="%(levelname)s: %(message)s", force=True)


class _Stderr(logging.Handler):
    """Writes to what is stderr then: a stream handler keeps its stream, which may be closed when the last is said (a prepared
    model that nobody hardened is only known when it is taken down)."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line; where there is nowhere to write, nothing."""
        with suppress(OSError, ValueError):
            print(self.format(record), file=sys.stderr)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(value, indent=1, default=str))


class Show(Protocol):
    """Says how far a stage is; `figures` stand behind its bar."""

    def __call__(self, stage: str, done: int, total: int, figures: str = "") -> None:
        """So many of `total` are done; 0: nobody knows how many there will be."""


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Show]:
    """A callback (stage, done, total) that draws a bar on stderr, or does nothing where there is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda stage, done, total, figures="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}
        last: dict[str, str] = {}

        def show(stage: str, done: int, total: int, figures: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total or None, figures="")
            last[stage] = figures or last.get(stage, "")
            bar.update(tasks[stage], completed=done, total=total or None, figures=last[stage])

        yield show
