"""`transquant train`: a configuration in TOML, checked key by key, and what is made of it."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transquant.cli.calibration import Data, Preprocessing, load_data
from transquant.cli.models import call, load_model, named
from transquant.errors import InputError
from transquant.training import Moment
from transquant.training.methods import method_of

TEXT, WHOLE, NUMBER, FLAG = (str,), (int,), (int, float), (bool,)
WORDS = {TEXT: "a text", WHOLE: "an integer", NUMBER: "a number", FLAG: "true or false", (int, str): "an integer or a text",
         (list,): "a list"}  # fmt: skip
PICTURES: dict[str, tuple[type, ...]] = {
    "resize": WHOLE, "crop": WHOLE, "mean": (list,), "std": (list,), "scale": NUMBER, "limit": WHOLE,
}  # fmt: skip
KEYS: dict[str, dict[str, tuple[type, ...]]] = {
    "model": {"model": TEXT, "weights": TEXT},
    "data": {"train": TEXT, "test": TEXT, **PICTURES},
    "train": {
        "method": TEXT, "bits": NUMBER, "size": (int, str), "begin": NUMBER, "epochs": WHOLE, "batch": WHOLE, "rate": NUMBER,
        "vector_rate": NUMBER, "clip": NUMBER, "loss": TEXT, "augment": TEXT, "teacher": TEXT, "distill": NUMBER,
        "temperature": NUMBER, "hints": (list,), "hint": NUMBER, "patience": WHOLE, "autocast": TEXT, "micro_batches": WHOLE,
        "channels_last": FLAG,
        "calibration_samples": WHOLE, "transform": TEXT, "axis": TEXT, "exact": (list,), "effort": WHOLE, "seed": WHOLE,
        "work": TEXT, "keep_work": FLAG,
    },
}  # fmt: skip
FUNCTIONS = ("loss", "augment")


def read_config(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of a configuration, all keys known and of the right type. Raises InputError."""
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no TOML: {error}") from None
    for table, content in tables.items():
        if table not in KEYS or not isinstance(content, dict):
            raise InputError(f"{path} has {table!r}, allowed are the tables {', '.join(f'[{name}]' for name in KEYS)}")
    config = {table: dict(tables.get(table, {})) for table in KEYS}
    for table, content in config.items():
        for key, value in content.items():
            _check(path, table, key, value, config["train"].get("method", "transform"))
    for table, key in (("model", "model"), ("data", "train")):
        if key not in config[table]:
            raise InputError(f"{path} has no {key} in [{table}]")
    return config


def _check(path: Path, table: str, key: str, value: Any, method: str) -> None:
    allowed = KEYS[table]
    if table == "train" and key not in allowed:
        own = method_of(method, {})[0].options
        if key not in own:
            names = ", ".join([*allowed, *own])
            raise InputError(f"{path} has the key {key!r} in [{table}], allowed are {names}")
        return
    if key not in allowed:
        raise InputError(f"{path} has the key {key!r} in [{table}], allowed are {', '.join(allowed)}")
    if not isinstance(value, allowed[key]) or isinstance(value, bool) != (allowed[key] is FLAG):
        raise InputError(f"{path}: {key} in [{table}] is {value!r}, expected {WORDS[allowed[key]]}")
    if isinstance(value, list):
        kind, what = (str, "texts") if key in ("exact", "hints") else (int | float, "numbers")
        if not value or not all(isinstance(v, kind) and not isinstance(v, bool) for v in value):
            raise InputError(f"{path}: {key} in [{table}] is {value!r}, expected a list of {what}")


def network(config: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """The network to train. Raises InputError, MissingDependency."""
    weights = config["model"].get("weights")
    model = load_model(config["model"]["model"], None if weights is None else Path(weights))
    assert isinstance(model, nn.Module)
    return model


def training_data(config: Mapping[str, Mapping[str, Any]]) -> Any:
    """What `fit` takes as data: a function's result as it is, of files two tensors. Raises InputError."""
    source = config["data"]["train"]
    if ".py:" in source:
        return call(source, "train")
    data = load_data(source, "train", _pictures(config))
    if data.labels is None:
        raise InputError(f"train is {source}, which has no labels: expected a folder a class, or an .npz with x and y")
    return torch.cat(list(data.batches)), data.labels


def test_data(config: Mapping[str, Mapping[str, Any]]) -> Data | None:
    """Labelled samples to score on, None where the configuration names none. Raises InputError."""
    source = config["data"].get("test")
    return None if source is None else load_data(source, "test", _pictures(config))


def arguments(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Arguments of `fit`. Raises InputError."""
    given = {key: value for key, value in config["train"].items() if key not in ("exact", "work", "keep_work")}
    for key in FUNCTIONS:
        if key in given:
            given[key] = named(given[key], key)
    if "exact" in config["train"]:
        given["overrides"] = dict.fromkeys(config["train"]["exact"], "exact")
    return given


def _pictures(config: Mapping[str, Mapping[str, Any]]) -> Preprocessing:
    data = config["data"]
    return Preprocessing(
        data.get("resize"), data.get("crop"), tuple(map(float, data.get("mean", (0,)))), tuple(map(float, data.get("std", (1,)))),
        float(data.get("scale", 255)), data.get("limit"), 256, config["train"].get("seed", 0),
    )  # fmt: skip


@contextmanager
def live_table(quiet: bool) -> Iterator[tuple[Callable[[str, int, int], None], Callable[[Moment], None] | None]]:
    """`progress` and `watch` of `fit` that draw a bar with the figures of the moment on stderr; nothing where there is no
    terminal."""
    import sys

    if quiet or not sys.stderr.isatty():
        yield (lambda stage, done, total: None), None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int, figures: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total or None, figures="")
            bar.update(tasks[stage], completed=done, total=total or None, figures=figures)

        yield (
            (lambda stage, done, total: None if stage == "training" else show(stage, done, total)),
            (lambda moment: show("training", moment.step, moment.steps, figures(moment))),
        )


def figures(moment: Moment) -> str:
    """Of a moment, in one line."""
    parts = [f"epoch {moment.epoch}/{moment.epochs}", f"loss {moment.loss:.4f}"]
    if moment.accuracy is not None:
        parts.append(f"accuracy {moment.accuracy:.2f} %")
    if moment.score is not None:
        parts.append(f"score {moment.score:.2f}")
    return "  ".join([*parts, f"{moment.bytes:,} bytes", f"price {moment.price:.2e}"])
