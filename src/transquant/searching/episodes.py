"""A record of every episode, one JSON line each: a search that was killed goes on from it, with the same result.

Searchers are deterministic by their seed, so they are replayed: each proposes again what it has proposed, and is told the reward
that is known. The first line is the fingerprint of all that the search depends on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from transquant.errors import InputError, OutputError
from transquant.searching.policy import Policy
from transquant.searching.prediction import Costs
from transquant.work import make_folder

NAME = "episodes.jsonl"


@dataclass(frozen=True, slots=True)
class Measured:
    """Of a real file: its bytes, and the value on held-back samples, higher is better."""

    bytes: int
    value: float


@dataclass(frozen=True, slots=True)
class Episode:
    """`policy` within the budget, what is predicted of it, and what was measured, where it was."""

    number: int
    policy: Policy
    costs: Costs
    seconds: float
    measured: Measured | None = None

    @property
    def reward(self) -> float:
        """Higher is better."""
        return self.costs.reward

    def as_dict(self) -> dict[str, Any]:
        """A line of the record."""
        measured = None if self.measured is None else asdict(self.measured)
        return {
            "number": self.number, "removed": dict(self.policy.removed), "bits": dict(self.policy.bits),
            "predicted": asdict(self.costs), "reward": self.reward, "measured": measured, "seconds": round(self.seconds, 4),
        }  # fmt: skip


class Record:
    """The lines of a search in a work folder; without a folder nothing is kept.

    Raises InputError for a folder of another search, OutputError where none can be made."""

    def __init__(self, folder: str | PathLike[str] | None, fingerprint: str) -> None:
        self._path = None if folder is None else Path(folder) / NAME
        self.known: dict[int, Episode] = {}
        if self._path is None:
            return
        make_folder(self._path.parent)
        lines = _whole_lines(self._path)
        if not lines:
            self._write(json.dumps({"search": fingerprint}) + "\n", "w")
            return
        if lines[0].get("search") != fingerprint:
            raise InputError(
                f"{self._path.parent} holds a search of another model, other samples or options; give another folder, or delete it"
            )
        try:
            for line in lines[1:]:
                episode = _episode(line)
                self.known[episode.number] = episode
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{self._path} is damaged; delete it to search again") from None
        self._write("".join(json.dumps(line) + "\n" for line in lines), "w")  # without what was cut off

    def add(self, episode: Episode) -> None:
        """Keep an episode; a later line of the same number takes its place."""
        self.known[episode.number] = episode
        if self._path is not None:
            self._write(json.dumps(episode.as_dict()) + "\n", "a")

    def _write(self, text: str, mode: str) -> None:
        assert self._path is not None
        try:
            with self._path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise OutputError(f"cannot write {self._path}: {error.strerror}") from None


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Lines up to the first that is cut off."""
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    found = []
    for line in text.split("\n")[:-1]:
        try:
            value = json.loads(line)
        except ValueError:
            break
        if not isinstance(value, dict):
            break
        found.append(value)
    return found


def _episode(line: Mapping[str, Any]) -> Episode:
    measured = None if line["measured"] is None else Measured(**line["measured"])
    return Episode(line["number"], Policy(line["removed"], line["bits"]), Costs(**line["predicted"]), line["seconds"], measured)
