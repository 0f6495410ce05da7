"""`transquant search`: channels and bits as one search."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from transquant.cli.console import print_json, progress_bar, set_logging
from transquant.cli.options import (
    Batch,
    Calibration,
    Crop,
    Effort,
    Force,
    Json,
    Limit,
    Mean,
    Metric,
    Model,
    Quiet,
    Resize,
    Scale,
    Seed,
    Std,
    TestData,
    Verbose,
    Weights,
    data_of,
    output_path,
)
from transquant.errors import InputError
from transquant.plots import check_picture

if TYPE_CHECKING:
    from transquant.searching.episodes import Episode


def search(
    output: Annotated[Path, typer.Option("-o", "--output", help="The compressed file.")],
    model: Model = None, weights: Weights = None, calibration: Calibration = None, data: TestData = None,
    bits: Annotated[float | None, typer.Option(help="Budget: bits of the file a parameter of the original network.")] = None,
    size: Annotated[str | None, typer.Option(help="Budget: bytes, 64KB, 64KiB, 1.5MB.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Budget: how many times smaller.")] = None,
    macs: Annotated[float | None, typer.Option(help="Budget: largest share of the network's multiply-adds, 0 to 1.")] = None,
    precision: Annotated[str, typer.Option(help="mixed; or 2 to 8, one depth for all rows.")] = "mixed",
    method: Annotated[str, typer.Option(help="auto, lagrange, random, tpe, cma-es, ddpg.")] = "auto",
    episodes: Annotated[int, typer.Option(help="Policies that are looked at.")] = 300,
    criterion: Annotated[str, typer.Option(help="What is important: sensitivity or norm.")] = "sensitivity",
    metric: Metric = "auto", effort: Effort = 5, seed: Seed = 0,
    work: Annotated[
        Path | None, typer.Option(help="Folder for the record of episodes: the same command goes on from it after it was killed.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of the frontier and of the policy: FILE.png, .svg, .pdf.")] = None,
    resize: Resize = None, crop: Crop = None, mean: Mean = "0", std: Std = "1", scale: Scale = 255.0,
    limit: Limit = None, batch: Batch = 100,
    as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False, force: Force = False,
) -> None:  # fmt: skip
    """Search for the channels and the bits that a network needs within a budget of bytes, multiply-adds, or both."""
    set_logging(quiet, verbose)
    output_path(output, force, model, weights, calibration, data)
    if plot is not None:
        output_path(plot, force)
        check_picture(plot)
    if calibration is None:
        raise InputError("search needs --calibration: an image folder, FILE.npz, or FILE.py:FUNCTION")
    from transquant.cli.models import load_model
    from transquant.searching import search as run

    net: Any = load_model(model, weights)
    how = (resize, crop, mean, std, scale, limit, batch, seed)
    samples, test = data_of(calibration, "--calibration", *how), data_of(data, "--data", *how)
    assert samples is not None
    with progress_bar(quiet or as_json) as show:
        best = -float("inf")

        def watch(episode: Episode) -> None:
            nonlocal best
            best = max(best, episode.reward)
            show("episodes", episode.number + 1, episodes, f"best reward {best:.4f}")

        result = run(
            net, samples.batches, bits=bits, size=size, ratio=ratio, macs=macs, precision=_precision(precision), method=method,
            episodes=episodes, criterion=criterion, metric=metric, effort=effort, seed=seed, work=work, progress=show, watch=watch,
        )  # fmt: skip
    result.compressed.save(output)
    if plot is not None:
        result.plot(plot)
    score: dict[str, Any] = {}
    if test is not None:
        from transquant.cli.scoring import compare

        score = compare(net, result.compressed, test, True)
    if as_json:
        chosen = {"removed": dict(result.policy.removed), "bits": dict(result.policy.bits)}
        content = {**result.report.as_dict(), "masked": result.masked, "policy": chosen, "score": score}
        print_json({"output": str(output), **content})
    elif not quiet:
        typer.echo(f"{output}: {result.report}")
        for name, channels in result.channels.items():
            typer.echo(f"  {name:<30} {channels - result.policy.removed[name]:>5} of {channels} channels")
        for key, value in score.items():
            typer.echo(f"{key:<16} {value:,.4f}" if isinstance(value, float) else f"{key:<16} {value}")


def _precision(value: str) -> str | int:
    return int(value) if value.isdecimal() else value
