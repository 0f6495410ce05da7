"""The table of layers by ways to run them in docs/layers.md. `python tests/layer_table.py` writes it; test_layer_table.py compares.

For each small model of one kind of layer (layer_models.py) a file without calibration is run in every mode: what runs, and as what."""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

import transquant as tq
from layer_models import MODELS, Pipe, make
from transquant import running
from transquant.errors import TransquantError

PAGE = Path(__file__).resolve().parents[1] / "docs" / "layers.md"
BEGIN, END = "<!-- table: tests/layer_table.py -->\n", "<!-- end of table -->\n"
MORE = {
    "conv2d": lambda: Pipe(nn.Conv2d(6, 24, 3, stride=2, padding=1, padding_mode="reflect"), 24),
    "conv2d_groups": lambda: Pipe(nn.Conv2d(12, 24, (3, 2), padding=(1, 0), groups=3, bias=False), 24),
    "depthwise": lambda: Pipe(nn.Conv2d(12, 24, 3, padding=2, dilation=2, groups=12), 24),
    "pointwise": lambda: Pipe(nn.Conv2d(12, 24, 1), 24),
    "linear": lambda: Pipe(nn.Linear(12, 24), 24),
}
INPUTS = {"conv2d": (6, 7, 8), "linear": (12,)}
NAMES = (*MORE, *MODELS)
AXES = ("input", "output", "kernel", "joint")
STEPS = {True: 0.002, False: 0.02}  # of weight norms: rows of zeros have no direction


def layer_model(name, samples=4):
    """A model of that name, always the same, and samples."""
    if name in MODELS:
        return make(name, samples)
    torch.manual_seed(0)
    return MORE[name]().eval(), torch.randn(samples, *INPUTS.get(name, (12, 7, 8)))


def relative(model, other, samples):
    with torch.no_grad():
        y, z = (m(samples).double() for m in (model, other))
    return float((y - z).norm() / y.norm())


def compressed(name, **how):
    return tq.compress(layer_model(name)[0], step=STEPS["weight_norm" in name], **how)


def row(name):
    """Cells of a layer: float, transform, packed, lazy. Each is a word for what ran and agreed, or why not."""
    samples = layer_model(name)[1]
    whole = compressed(name, coding="fixed", transform="identity")
    decoded = whole.install(layer_model(name)[0])
    cells = ["yes"]
    found, why = [], ""
    for axis in AXES:
        file = compressed(name, transform="elt", axis=axis)
        net = file.install(layer_model(name)[0], mode="transform")
        assert relative(file.install(layer_model(name)[0]), net, samples) < 1e-5, (name, axis)
        own = [how for n, how in running.installed(net).layers.items() if n.startswith(("layer", "cell"))]
        if any(how.startswith("two layers") for how in own):
            found.append(axis)
        elif not why and own:
            why = own[0].removeprefix("decoded: ")
    cells.append(", ".join(found) or f"decoded: {why}")
    for mode in ("packed", "lazy"):
        assert relative(decoded, whole.install(layer_model(name)[0], mode=mode), samples) < 1e-12, (name, mode)
        cells.append("yes")
    return cells


def onnx_cell(name):
    """Whether the decoded layer leaves as ONNX and ONNX Runtime agrees with torch; or the sentence that says why not."""
    import onnxruntime

    model, samples = layer_model(name)
    file = compressed(name)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "net.onnx"
        try:
            file.export_onnx(model, samples, path)
        except TransquantError as error:
            return f"no: {str(error).splitlines()[0][:100]}"
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: samples.numpy()})
    with torch.no_grad():
        expected = file.install(layer_model(name)[0])(samples).numpy()
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected), name
    return "yes"


def table(rows, onnx):
    lines = ["| layer | float | transform: axes with two layers | packed | lazy | ONNX |", "|---|---|---|---|---|---|"]
    return "\n".join(lines + [f"| `{n}` | {' | '.join(rows[n])} | {onnx[n]} |" for n in NAMES]) + "\n"


def on_page():
    """Cells of the page's table by layer."""
    body = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    cells = [line.strip("| ").split(" | ") for line in body.splitlines()[2:]]
    return {own[0].strip("`"): own[1:] for own in cells}


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    new = table({n: row(n) for n in NAMES}, {n: onnx_cell(n) for n in NAMES})
    PAGE.write_text(before + BEGIN + new + END + rest.partition(END)[2])
    sys.stdout.write(new)
