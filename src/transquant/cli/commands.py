"""The verbs. Each reads its inputs, calls the library once, and prints; heavy imports wait until then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from transquant.cli.console import print_json, progress_bar, set_logging
from transquant.cli.launch import leads
from transquant.cli.options import (
    Axis,
    Batch,
    Calibration,
    Coder,
    Coding,
    Crop,
    Effort,
    Feedback,
    File,
    Force,
    Json,
    Limit,
    Mean,
    Metric,
    Mode,
    Model,
    Quiet,
    Resize,
    Scale,
    Seed,
    Std,
    TestData,
    Transform,
    Trellis,
    Verbose,
    Weights,
    data_of,
    one_target,
    output_path,
)
from transquant.errors import InputError, OutputError


def compress(
    output: Annotated[Path, typer.Option("-o", "--output", help="The compressed file.")],
    model: Model = None, weights: Weights = None, calibration: Calibration = None, data: TestData = None,
    bits: Annotated[float | None, typer.Option(help="Target: bits of the file a parameter.")] = None,
    size: Annotated[str | None, typer.Option(help="Target: bytes, 64KB, 64KiB, 1.5MB.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Target: how many times smaller.")] = None,
    distortion: Annotated[float | None, typer.Option(help="Target: measured output distortion.")] = None,
    step: Annotated[float | None, typer.Option(help="The global step itself (`c` in the settings of --json); no search.")] = None,
    max_drop: Annotated[float | None, typer.Option(help="Target: points of top-1 accuracy lost on --data.")] = None,
    activations: Annotated[
        float | None, typer.Option(help="Quantize inputs of layers too: bits a value on average, 2 to 8; 8 is for mode int8.")
    ] = None,
    exact: Annotated[list[str] | None, typer.Option(help="Store tensors of this name (a glob pattern) exactly.")] = None,
    metric: Metric = "auto", transform: Transform = "auto", axis: Axis = None, coding: Coding = "entropy",
    objective: Annotated[str, typer.Option(help="bytes; or macs: also few multiply-adds in mode transform.")] = "bytes",
    macs: Annotated[float | None, typer.Option(help="With --objective macs: their largest share of the network's, 0 to 1.")] = None,
    coder: Coder = "adaptive", feedback: Feedback = True, trellis: Trellis = True, effort: Effort = 5, seed: Seed = 0,
    verify: Annotated[bool, typer.Option(help="Measure the distortion group by group and compare with the closed form.")] = False,
    work: Annotated[
        Path | None, typer.Option(help="Folder for finished parts: the same command goes on from them after it was killed.")
    ] = None,
    resize: Resize = None, crop: Crop = None, mean: Mean = "0", std: Std = "1", scale: Scale = 255.0,
    limit: Limit = None, batch: Batch = 100,
    as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False, force: Force = False,
) -> None:  # fmt: skip
    """Compress a trained network to a file of a given size."""
    set_logging(quiet, verbose)
    if leads():
        output_path(output, force, model, weights, calibration, data)
    one_target(bits=bits, size=size, ratio=ratio, distortion=distortion, step=step, max_drop=max_drop)
    from transquant.cli.models import load_model
    from transquant.codec import compress as run

    net = load_model(model, weights)
    how = (resize, crop, mean, std, scale, limit, batch, seed)
    samples, test = data_of(calibration, "--calibration", *how), data_of(data, "--data", *how)
    drop = None
    if max_drop is not None:
        from transquant.cli.scoring import evaluator

        drop = evaluator(test), max_drop
    with progress_bar(quiet or as_json) as progress:
        compressed = run(
            net, samples.batches if samples else None, bits=bits, size=size, ratio=ratio, distortion=distortion,
            step=step, max_drop=drop, activations=activations, metric=metric, transform=transform, axis=axis, coding=coding,
            coder=coder, feedback=feedback, trellis=trellis, objective=objective, macs=macs, effort=effort, seed=seed,
            verify=verify, work=work,
            overrides=dict.fromkeys(exact or [], "exact"), progress=progress,
        )  # fmt: skip
    if not leads():
        return
    compressed.save(output)
    score: dict[str, Any] = {}
    if test is not None:
        from transquant.cli.scoring import compare

        score = compare(net, compressed, test, True)
    if as_json:
        print_json({"output": str(output), **compressed.report.as_dict(), "score": score})
    elif not quiet:
        typer.echo(f"{output}: {compressed.report}")
        _print_score(score)


def train(
    config: Annotated[Path, typer.Argument(help="CONFIG.toml with the tables [model], [data] and [train].")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The compressed file.")],
    as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False, force: Force = False,
) -> None:  # fmt: skip
    """Train a network for a file of a given size; the same command goes on where it was when it is killed."""
    set_logging(quiet, verbose)
    from transquant.cli import training

    tables = training.read_config(config)
    if leads():
        output_path(output, force, config, tables["model"]["model"], tables["model"].get("weights"), tables["data"]["train"])
    from transquant.cli.scoring import compare, evaluator
    from transquant.training import fit
    from transquant.training.checkpoint import Checkpoints
    from transquant.work import make_folder

    net, test = training.network(tables), training.test_data(tables)
    work = Path(tables["train"].get("work", f"{output}.work"))
    make_folder(work)  # without a mark: it outlives the call, and goes when the file has been written
    score = None if test is None or test.labels is None else evaluator(test)
    with training.live_table(quiet or as_json) as (progress, watch):
        result = fit(
            net, training.training_data(tables), **training.arguments(tables), evaluate=score, work=work, progress=progress,
            watch=watch,
        )  # fmt: skip
    if not leads():
        return
    result.compressed.save(output)
    if not tables["train"].get("keep_work", False):
        Checkpoints(work).clear()
    scored = compare(net, result.compressed, test, True) if test is not None else {}
    if as_json:
        epochs = [asdict(epoch) for epoch in result.history]
        print_json({"output": str(output), **result.compressed.report.as_dict(), "score": scored, "history": epochs})
    elif not quiet:
        typer.echo(f"{output}: {result.compressed.report}")
        _print_score(scored)


def decompress(
    file: File,
    output: Annotated[Path, typer.Option("-o", "--output", help="FILE.safetensors or FILE.onnx")],
    as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False, force: Force = False,
) -> None:  # fmt: skip
    """Decode a compressed file to .safetensors, with all keys of the original, or to .onnx if it was made from one."""
    set_logging(quiet, verbose)
    if output.suffix not in (".safetensors", ".onnx"):
        raise InputError(f"the output is {output}, expected a name that ends in .safetensors or .onnx")
    output_path(output, force, file)
    from transquant.cli.exporting import write_decoded
    from transquant.codec import load

    result = write_decoded(load(file), file, output)
    if as_json:
        print_json(result)
    elif not quiet:
        typer.echo(f"{output}: {result['bytes']:,} bytes, {result['tensors']} tensors")


def export(
    file: File,
    output: Annotated[Path, typer.Option("-o", "--output", help="FILE.onnx")],
    model: Model = None,
    example: Annotated[str | None, typer.Option("--example", help="Example input: FILE.py:FUNCTION returns it.")] = None,
    input_shape: Annotated[str | None, typer.Option(help="Shape of one float32 input, samples first: 1,3,32,32.")] = None,
    weights: Annotated[str, typer.Option(help="float, int8 (a scale an output channel) or int4 (one for 32 inputs).")] = "float",
    as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False, force: Force = False,
) -> None:  # fmt: skip
    """Write a decoded network as an ONNX file, with float or integer weights."""
    set_logging(quiet, verbose)
    if model is None:
        raise InputError("export needs --model FILE.py:FACTORY (decompress gives back the .onnx file of a network that was one)")
    if output.suffix != ".onnx":
        raise InputError(f"the output is {output}, expected a name that ends in .onnx")
    output_path(output, force, file, model, example)
    from dataclasses import asdict

    from transquant.cli.exporting import example_input
    from transquant.cli.models import load_model
    from transquant.codec import load

    compressed = load(file)
    net = cast(Any, load_model(model, None))
    records = compressed.export_onnx(net, example_input(example, input_shape), output, weights)
    size, worst = output.stat().st_size, max((r.relative_error for r in records), default=0.0)
    if as_json:
        print_json({"output": str(output), "bytes": size, "weights": [asdict(r) for r in records]})
    elif not quiet:
        added = f", relative errors up to {worst:.2g}" if weights != "float" else ""
        typer.echo(f"{output}: {size:,} bytes, {len(records)} weights as {weights}{added}")


def inspect(file: File, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Show where every byte of a compressed file went."""
    set_logging(quiet, verbose)
    from transquant.codec import load

    report = load(file).report
    if as_json:
        print_json({"file": str(file), **report.as_dict()})
    else:
        typer.echo(f"{file}: {report}")


def verify(
    files: Annotated[list[Path], typer.Argument(help="Compressed files.")],
    max_decoded_bytes: Annotated[
        int | None, typer.Option(min=0, help="Refuse files that ask for more memory; 4 GiB where it is not given.")
    ] = None,
    max_expansion: Annotated[
        int | None, typer.Option(min=0, help="Refuse files above 16 MiB that ask for so many times their size; 4,096.")
    ] = None,
    as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Decode whole files, check every limit and checksum, and print their SHA-256; stops at the first bad one."""
    set_logging(quiet, verbose)
    from transquant.cli.verifying import NOTE, line, verify_file

    results = []
    for file in files:
        results.append(verify_file(file, max_decoded_bytes, max_expansion))
        if not as_json and not quiet:
            typer.echo(line(results[-1]))
    if as_json:
        print_json({"files": results, "note": NOTE})
    elif not quiet:
        typer.echo(NOTE)


def evaluate(
    file: File, model: Model = None, weights: Weights = None, data: TestData = None, mode: Mode = "float",
    resize: Resize = None, crop: Crop = None, mean: Mean = "0", std: Std = "1", scale: Scale = 255.0,
    limit: Limit = None, batch: Batch = 100, seed: Seed = 0,
    as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Score a compressed network on data, beside the float weights where they are given."""
    set_logging(quiet, verbose)
    if model is None or data is None:
        raise InputError("evaluate needs --model (FILE.py:FACTORY, timm:NAME, torchvision:NAME or hf:NAME) and --data")
    from transquant.cli.models import load_model
    from transquant.cli.scoring import compare
    from transquant.codec import load

    compressed = load(file)
    net = load_model(model, weights, pretrained=False)
    test = data_of(data, "--data", resize, crop, mean, std, scale, limit, batch, seed)
    assert test is not None
    result = {
        "file": str(file),
        "file_bytes": len(compressed.data),
        **compare(net, compressed, test, weights is not None, mode),
    }
    if as_json:
        print_json(result)
    else:
        _print_score(result)


def profile(
    file: File, model: Model = None, weights: Weights = None, data: TestData = None, mode: Mode = "transform",
    memory: Annotated[str | None, typer.Option(help="Mode lazy: decoded weights that are kept, bytes or 64MB.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, taking turns; the median counts.")] = 20,
    resize: Resize = None, crop: Crop = None, mean: Mean = "0", std: Std = "1", scale: Scale = 255.0,
    limit: Limit = None, batch: Batch = 1, seed: Seed = 0,
    as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Measure multiply-adds, memory and time of a compressed network beside the float one, on one batch."""
    set_logging(quiet, verbose)
    if model is None or data is None:
        raise InputError("profile needs --model (FILE.py:FACTORY, timm:NAME, torchvision:NAME or hf:NAME) and --data")
    from transquant.cli.models import load_model
    from transquant.cli.profiling import profile_file, table

    samples = data_of(data, "--data", resize, crop, mean, std, scale, limit, batch, seed)
    assert samples is not None
    result = profile_file(file, load_model(model, weights, pretrained=False), samples, mode, memory, repeats)
    if as_json:
        print_json(result)
    else:
        typer.echo(table(result))


def sweep(
    output: Annotated[Path, typer.Option("-o", "--output", help="FILE.csv; a picture FILE.png is written beside it.")],
    model: Model = None, weights: Weights = None, calibration: Calibration = None, data: TestData = None,
    bits: Annotated[str, typer.Option(help="Sizes to visit, bits a parameter.")] = "1,1.5,2,3,4",
    metric: Metric = "auto", effort: Effort = 5, seed: Seed = 0,
    resize: Resize = None, crop: Crop = None, mean: Mean = "0", std: Std = "1", scale: Scale = 255.0,
    limit: Limit = None, batch: Batch = 100,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rates that the CSV has already.")] = False,
    as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False, force: Force = False,
) -> None:  # fmt: skip
    """Write the rate–distortion curve of a network as CSV and picture."""
    set_logging(quiet, verbose)
    if output.suffix != ".csv":
        raise InputError(f"the output is {output}, expected a name that ends in .csv")
    for path in (output, output.with_suffix(".png")):
        output_path(path, force or resume)
    from transquant.cli.calibration import numbers
    from transquant.cli.models import load_model
    from transquant.cli.sweeping import sweep_rates

    rates = numbers(bits, "--bits")
    how = (resize, crop, mean, std, scale, limit, batch, seed)
    samples, test = data_of(calibration, "--calibration", *how), data_of(data, "--data", *how)
    net = load_model(model, weights)
    with progress_bar(quiet or as_json) as progress:
        rows = sweep_rates(net, samples, test, rates, metric, effort, seed, output, resume, progress)
    if as_json:
        print_json(rows)
    elif not quiet:
        typer.echo(output.read_text(), nl=False)


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the file and the curve.")] = Path("demo-output"),
    bits: Annotated[float, typer.Option(help="Size of the file, bits a parameter.")] = 1.5,
    as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Compress a small network that ships with the package, decode it, and score it on real digits."""
    set_logging(quiet, verbose)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {output}: {error.strerror}") from None
    from transquant.demo.run import format_table, run

    with progress_bar(quiet or as_json) as progress:
        result = run(output, bits, progress)
    if as_json:
        print_json(result)
    elif not quiet:
        typer.echo(format_table(result))


def _print_score(score: dict[str, Any]) -> None:
    for key, value in score.items():
        typer.echo(f"{key:<16} {value:,.4f}" if isinstance(value, float) else f"{key:<16} {value}")


COMMANDS: dict[str, Callable[..., None]] = {
    "compress": compress, "decompress": decompress, "inspect": inspect, "verify": verify, "evaluate": evaluate, "profile": profile,
    "sweep": sweep, "train": train, "export": export, "demo": demo,
}  # fmt: skip
