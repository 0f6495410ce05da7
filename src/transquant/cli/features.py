"""`transquant features`: verbs about feature maps. Each reads its inputs, calls the library once, and prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from transquant.cli.console import print_json, progress_bar, set_logging
from transquant.cli.options import (
    Batch,
    Calibration,
    Crop,
    Force,
    Json,
    Limit,
    Mean,
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
    one_target,
    output_path,
)
from transquant.errors import InputError
from transquant.plots import check_picture

Codec = Annotated[Path, typer.Argument(help="A codec file that `features calibrate` wrote.")]


def calibrate(
    output: Annotated[Path, typer.Option("-o", "--output", help="The codec file.")],
    model: Model = None, weights: Weights = None, calibration: Calibration = None, data: TestData = None,
    bits_per_value: Annotated[float | None, typer.Option(help="Target: bits of all packets a value of all maps.")] = None,
    max_drop: Annotated[float | None, typer.Option(help="Target: points of top-1 accuracy lost on --data.")] = None,
    method: Annotated[
        str, typer.Option(help="auto; pca, pca-quantized, pca-truncated, none; dct-cm, dct-cm-4, dct-cm-16, dct-cm-32.")
    ] = "auto",
    seed: Seed = 0, resize: Resize = None, crop: Crop = None, mean: Mean = "0", std: Std = "1", scale: Scale = 255.0,
    limit: Limit = None, batch: Batch = 100,
    as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False, force: Force = False,
) -> None:  # fmt: skip
    """Make a codec for the feature maps of a network from unlabelled samples."""
    set_logging(quiet, verbose)
    output_path(output, force, model, weights, calibration, data)
    one_target(bits_per_value=bits_per_value, max_drop=max_drop)
    if calibration is None:
        raise InputError("features calibrate needs --calibration: an image folder, FILE.npz, or FILE.py:FUNCTION")
    from transquant.cli.scoring import evaluator
    from transquant.features import calibrate as run

    net = _network(model, weights)
    how = (resize, crop, mean, std, scale, limit, batch, seed)
    samples, test = data_of(calibration, "--calibration", *how), data_of(data, "--data", *how)
    assert samples is not None
    drop = None if max_drop is None else (evaluator(test), max_drop)
    with progress_bar(quiet or as_json) as progress:
        codec = run(net, samples.batches, bits_per_value=bits_per_value, max_drop=drop, method=method, seed=seed, progress=progress)
    codec.save(output)
    if as_json:
        print_json({"output": str(output), **codec.as_dict()})
    elif not quiet:
        typer.echo(f"{output}: {codec!r}")


def evaluate(
    codec: Codec, model: Model = None, weights: Weights = None, data: TestData = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Also write the ledger to this FILE.csv.")] = None,
    picture: Annotated[Path | None, typer.Option("--picture", help="Also draw it to this FILE.png, .svg or .pdf.")] = None,
    resize: Resize = None, crop: Crop = None, mean: Mean = "0", std: Std = "1", scale: Scale = 255.0,
    limit: Limit = None, batch: Batch = 100, seed: Seed = 0,
    as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False, force: Force = False,
) -> None:  # fmt: skip
    """Score a network that runs on coded maps beside the network as it is, and show where the bytes of the maps went."""
    set_logging(quiet, verbose)
    if data is None:
        raise InputError("features evaluate needs --data: a folder a class, FILE.npz with x and y, or FILE.py:FUNCTION")
    if picture is not None:
        check_picture(picture)
    for path in (csv, picture):
        if path is not None:
            output_path(path, force, codec, model, weights, data)
    from transquant.cli.scoring import outputs, scores
    from transquant.features import load

    loaded, net = load(codec), _network(model, weights)
    test = data_of(data, "--data", resize, crop, mean, std, scale, limit, batch, seed)
    assert test is not None
    reference = outputs(net, test)
    with loaded.attach(net) as ledger:
        coded = outputs(net, test)
    result: dict[str, Any] = {"codec": str(codec), "codec_bytes": len(loaded.data), **scores(coded, reference, test)}
    if csv is not None:
        ledger.to_csv(csv)
    if picture is not None:
        ledger.to_picture(picture)
    if as_json:
        print_json({**result, **ledger.as_dict()})
        return
    for key, value in result.items():
        typer.echo(f"{key:<16} {value:,.4f}" if isinstance(value, float) else f"{key:<16} {value}")
    typer.echo(f"\n{ledger}")


def split(
    codec: Codec,
    at: Annotated[str, typer.Option("--at", help="Where to cut: path of a module, such as layer2.1, or name of a point.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for both halves.")],
    model: Model = None, weights: Weights = None,
    as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False, force: Force = False,
) -> None:  # fmt: skip
    """Cut a network in two: weights of the device's half, of the server's, and a codec for what is sent between them."""
    set_logging(quiet, verbose)
    from transquant.cli.halves import FILES, make_folder, write_halves
    from transquant.features import load

    loaded = load(codec)
    halves = loaded.split(_network(model, weights), at)
    make_folder(output)
    for name in FILES:
        output_path(output / name, force, codec, model, weights)
    result = write_halves(loaded, *halves, at, output)
    if as_json:
        print_json(result)
    elif not quiet:
        for name, size in result["files"].items():
            typer.echo(f"{output / name}: {size:,} bytes")
        typer.echo(f"what is sent: {result['channels']} channels of {result['point']}")


def _network(model: str | None, weights: Path | None) -> Any:
    """The network itself, with weights."""
    if model is None:
        raise InputError("verbs about feature maps need --model: FILE.py:FACTORY, timm:NAME, torchvision:NAME or hf:NAME")
    from transquant.cli.models import load_model

    return load_model(model, weights)


COMMANDS: dict[str, Callable[..., None]] = {"calibrate": calibrate, "evaluate": evaluate, "split": split}
