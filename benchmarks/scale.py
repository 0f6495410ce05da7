"""Time and memory against the size of a model: each point in a process of its own.

    python benchmarks/scale.py                # an hour on two cores
    python benchmarks/scale.py linear 6       # one point: six layers, printed, nothing written

Three kinds of point. `linear`: stacks of linear layers, all 512 wide, random weights, 128 samples, default effort. `state`: the
same as a state dict alone, 1024 wide, effort 1. `resnet`: a network of ResNet-50's shapes, 256 smooth random images, default
effort. `file`: a file of 1.5 GB on disk, effort 1. Peak memory is the largest resident set of the process, imports included; time
is that of `compress`, after a small network has been compressed, so that nothing is compiled in it. Writes scale.json and the
tables of docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.nn import functional

import transquant as tq
from pages import insert_table

LINEAR = (1, 4, 12)  # layers of 512 x 512: 2.6e5 to 3.1e6 weights
STATE = (1, 4, 12, 32, 96)  # layers of 1024 x 1024: 1e6 to 1e8
FILE_LAYERS, FILE_SIDE = 90, 2048  # 1.5 GB
BITS = 3.0


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, each with a BatchNorm, and a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        shapes = ((inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1))
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, k, s, k // 2, bias=False) for a, b, k, s in shapes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b, _, _ in shapes)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != 4 * width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for k, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            y = norm(convolution(y))
            y = y.relu() if k < 2 else y
        return (y + self.shortcut(x)).relu()


def resnet() -> nn.Module:
    """ResNet-50's layers, 25.6 million parameters, He-initialised; the last norm of a block is damped, as training would."""
    torch.manual_seed(0)
    parts: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for k in range(depth):
            parts.append(Bottleneck(inputs, width, stride if k == 0 else 1))
            inputs = 4 * width
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, Bottleneck):
            nn.init.constant_(module.norms[2].weight, 0.3)  # type: ignore[arg-type]
    return model.eval()


def smooth_images(count: int) -> Tensor:
    """Random images 3 x 224 x 224 whose neighbouring pixels are alike, as those of photographs are."""
    torch.manual_seed(1)
    scales = [functional.interpolate(torch.randn(count, 3, s, s), 224, mode="bilinear") / k for k, s in ((1, 7), (2, 28), (4, 112))]
    return sum(scales[1:], start=scales[0])


def stack(layers: int, side: int) -> nn.Sequential:
    """Linear layers of one width, with ReLU between them."""
    torch.manual_seed(0)
    parts = [m for _ in range(layers) for m in (nn.Linear(side, side), nn.ReLU())][:-1]
    model = nn.Sequential(*parts)
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


def write_state(path: Path, layers: int, side: int) -> None:
    """A state dict of random matrices and vectors, `layers` of each, written as a .safetensors file."""
    rng = np.random.default_rng(0)
    arrays = {}
    for k in range(layers):
        arrays[f"{k}.weight"] = rng.standard_normal((side, side), np.float32) * np.float32(1 + k % 3) / side**0.5
        arrays[f"{k}.bias"] = rng.standard_normal(side, np.float32)
    save_file(arrays, path)


def point(kind: str, size: int, folder: Path) -> dict[str, Any]:
    """One point, in this process."""
    torch.manual_seed(0)
    job: Callable[[], tq.CompressedModel]
    if kind == "linear":
        model = stack(size, 512)
        job = lambda: tq.compress(model, torch.randn(128, 512), bits=BITS)  # noqa: E731
    elif kind == "state":
        state = stack(size, 1024).state_dict()
        job = lambda: tq.compress(state, bits=BITS, effort=1)  # noqa: E731
    elif kind == "resnet":
        net, images = resnet(), smooth_images(size)
        job = lambda: tq.compress(net, images, bits=BITS)  # noqa: E731
    else:
        job = lambda: tq.compress(folder / "model.safetensors", bits=BITS, effort=1)  # noqa: E731
    warm = stack(2, 64)
    tq.compress(warm, torch.randn(64, 64), bits=6.0, effort=3)
    tq.compress(warm.state_dict(), bits=6.0)
    before, start = peak(), time.perf_counter()
    compressed = job()
    seconds = time.perf_counter() - start
    return {
        "kind": kind, "size": size, "weights": compressed.report.num_parameters, "seconds": seconds, "MiB": peak(),
        "MiB before": before, "bits": compressed.report.bits_per_parameter, "original bytes": compressed.report.original_bytes,
    }  # fmt: skip


def peak() -> float:
    """The largest resident set so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def measured(kind: str, size: int, folder: Path) -> dict[str, Any]:
    """One point, in a process of its own."""
    command = [sys.executable, __file__, kind, str(size), "--folder", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def slope(rows: list[dict[str, Any]], what: Callable[[dict[str, Any]], float]) -> float:
    """Exponent of a power law: the slope of the least-squares line through the logarithms."""
    x, y = (np.log([f(r) for r in rows]) for f in (lambda r: r["weights"], what))
    return float(np.polyfit(x, y, 1)[0])


def exponents(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of time, and of the memory that is taken on top of what the process had before."""
    result = {}
    for kind in ("linear", "state"):
        own = [r for r in rows if r["kind"] == kind]
        result[f"{kind}, time"] = slope(own, lambda r: r["seconds"])
        result[f"{kind}, memory"] = slope(own, lambda r: max(r["MiB"] - r["MiB before"], 1.0))
    return result


TITLES = {
    "linear": "{size} linear layers 512 x 512, 128 samples, effort 5",
    "state": "state dict of {size} matrices 1024 x 1024, effort 1",
    "resnet": "ResNet-50's shapes, {size} images at 224 x 224, effort 5",
    "file": "file of 1.5 GB, {size} matrices 2048 x 2048, effort 1",
}


def table(rows: list[dict[str, Any]], fitted: dict[str, float]) -> str:
    """Markdown."""
    lines = ["| model | weights | tensors, MiB | time, s | peak memory, MiB | before, MiB |", "|---|---|---|---|---|---|"]
    for r in rows:
        lines.append(
            f"| {TITLES[r['kind']].format(**r)} | {r['weights']:.2g} | {r['original bytes'] / 2**20:.0f} | {r['seconds']:.0f} "
            f"| {r['MiB']:.0f} | {r['MiB before']:.0f} |"
        )
    lines += ["", "| fitted exponent of the number of weights | time | memory |", "|---|---|---|"]
    for kind, name in (("linear", "linear layers, effort 5"), ("state", "state dicts, effort 1")):
        lines.append(f"| {name} | {fitted[f'{kind}, time']:.2f} | {fitted[f'{kind}, memory']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", nargs="?", choices=list(TITLES))
    parser.add_argument("size", nargs="?", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--resume", action="store_true", help="keep the points that scale.json has")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        if given.folder is None and given.kind in (None, "file"):  # written by another process: what that takes is not to count
            layers = FILE_LAYERS if given.kind is None else given.size
            code = f"import scale; scale.write_state(scale.Path({str(folder)!r}) / 'model.safetensors', {layers}, {FILE_SIDE})"
            subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
        if given.kind is not None:
            print(json.dumps(point(given.kind, given.size, folder)))
            return
        points = [("linear", n) for n in LINEAR] + [("state", n) for n in STATE] + [("file", FILE_LAYERS), ("resnet", 256)]
        path = Path(__file__).with_suffix(".json")
        kept = json.loads(path.read_text())["rows"] if path.exists() and given.resume else []
        for kind, size in sorted(points, key=lambda p: -list(TITLES).index(p[0])):  # long ones first
            if not any((r["kind"], r["size"]) == (kind, size) for r in kept):
                kept.append(measured(kind, size, folder))
                write(path, kept)
        rows = [r for p in points for r in kept if (r["kind"], r["size"]) == p]
    fitted = exponents(rows)
    write(path, rows, fitted)
    insert_table("docs/scale.md", "scale.py", table(rows, fitted))
    print(table(rows, fitted))


def write(path: Path, rows: list[dict[str, Any]], fitted: dict[str, float] | None = None) -> None:
    """The record, so far."""
    machine = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    content = {"command": "python benchmarks/scale.py", "machine": machine, "rows": rows, "exponents": fitted or {}}
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
