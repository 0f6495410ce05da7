"""What a person sees while a command runs: progress and log on stderr, data on stdout."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

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


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A callback (stage, done, total) that draws a bar on stderr, or does nothing where there is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total or None)
            bar.update(tasks[stage], completed=done, total=total or None)

        yield show
