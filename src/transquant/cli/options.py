"""Options that several verbs take, and what is made of them before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from transquant.errors import InputError

if TYPE_CHECKING:
    from transquant.cli.calibration import Data

Model = Annotated[
    str | None,
    typer.Option("--model", help="FILE.py:FACTORY (returns an nn.Module), timm:NAME, torchvision:NAME, hf:FOLDER_OR_NAME."),
]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", help="Float weights: FILE.safetensors, or a state dict in FILE.pt, .pth, .bin; or FILE.onnx alone."),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration", help="Unlabelled samples: image folder, FILE.npz with x (float32, samples first), FILE.py:FUNCTION."
    ),
]
TestData = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Labelled samples to score on: a folder a class, FILE.npz with x and y, FILE.py:FUNCTION of (x, y) batches.",
    ),
]
Resize = Annotated[int | None, typer.Option(min=1, help="Images: length of the shorter side.")]
Crop = Annotated[int | None, typer.Option(min=1, help="Images: side of the centre crop.")]
Mean = Annotated[str, typer.Option(help="Images: mean a channel, after the division by --scale.")]
Std = Annotated[str, typer.Option(help="Images: standard deviation a channel.")]
Scale = Annotated[float, typer.Option(help="Images: pixels are divided by this.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use at most so many samples.")]
Batch = Annotated[int, typer.Option(min=1, help="Samples a batch.")]
Metric = Annotated[str, typer.Option(help="auto, kl, mse or weights.")]
Transform = Annotated[str, typer.Option(help="auto, identity, dct, klt or elt.")]
Axis = Annotated[str | None, typer.Option(help="Of the transform: kernel, input, output or joint; the best one if not given.")]
Coding = Annotated[str, typer.Option(help="entropy, or fixed: packed bit depths.")]
Feedback = Annotated[bool, typer.Option("--feedback/--no-feedback", help="Closed loop, or plain rounding.")]
Coder = Annotated[str, typer.Option(help="adaptive, or static: tables that stay, files that decode faster, about 1 % larger.")]
Trellis = Annotated[bool, typer.Option("--trellis/--no-trellis", help="Best path of a trellis, or rounding with a dead zone.")]
Effort = Annotated[
    int,
    typer.Option(
        min=1, max=9, help="1, 2: nothing is tuned; from 3 all is; from 5 layers go in order; from 6 vectors learn; 8: rows."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Same seed, same file.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress, errors only.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="More log; tracebacks.")]
Force = Annotated[bool, typer.Option("-f", "--force", help="Overwrite an existing output.")]
File = Annotated[Path, typer.Argument(help="A compressed file.")]
Mode = Annotated[str, typer.Option(help="How it runs: float, transform, packed, lazy, activations, int8.")]


def output_path(path: Path, force: bool, *inputs: str | Path | None) -> Path:
    """Checked before long work; never one of the inputs."""
    from transquant.container import check_writable

    check_writable(path)
    for given in inputs:
        file = str(given).rpartition(":")[0] if given and ".py:" in str(given) else given
        if file and path.exists() and Path(file).exists() and path.samefile(file):
            raise InputError(f"{path} is both an input and the output")
    if path.exists() and not force:
        raise InputError(f"{path} exists already; give --force to overwrite it")
    return path


def data_of(source: str | None, option: str, *how: Any) -> Data | None:
    """Data named by an option, prepared as the other options say; None where it is not given. Raises InputError."""
    if source is None:
        return None
    from transquant.cli.calibration import Preprocessing, load_data, numbers

    resize, crop, mean, std, scale, limit, batch, seed = how
    means, stds = numbers(mean, "--mean"), numbers(std, "--std")
    return load_data(source, option, Preprocessing(resize, crop, means, stds, scale, limit, batch, seed))


def one_target(**targets: Any) -> None:
    """Fail before anything is loaded."""
    given = [f"--{k.replace('_', '-')}" for k, v in targets.items() if v is not None]
    if len(given) != 1:
        names = ", ".join(f"--{k.replace('_', '-')}" for k in targets)
        raise InputError(f"give exactly one target of {names}; given: {' and '.join(given) or 'none'}")
