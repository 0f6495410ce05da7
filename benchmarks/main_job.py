"""The main job on three real networks: score against the size of the whole file, beside plain rounding.

    python benchmarks/main_job.py            # everything, about fifteen minutes on two cores
    python benchmarks/main_job.py resnet20   # one network

ResNet-20: calibrated on 2,048 training images, scored once on all 10,000 test images. SqueezeNet and MobileNetV1: two
folds of the 1,000 sample images, calibrated on one half and scored on the other; mean of both folds. "plain" is rounding to
nearest with one step a tensor, proportional to its root mean square, in the same file format and entropy coder.
Writes benchmarks/main_job.json, the table in README.md and the picture docs/rate_distortion.png.
"""

from __future__ import annotations

import copy
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import transquant as tq
from networks import cifar10, imagenet_sample, logits, network
from pages import ROOT, insert_table
from transquant.plots import write_curve

JOBS = {"resnet20": (4.0, 3.0, 2.0, 1.5, 1.0), "squeezenet": (3.0, 2.0), "mobilenet": (4.0,)}
TITLES = {"resnet20": "ResNet-20", "squeezenet": "SqueezeNet 1.1", "mobilenet": "MobileNetV1 0.25"}
Fold = tuple[Tensor, Tensor, Tensor]  # calibration images, test images, test labels


def folds(name: str) -> list[Fold]:
    """Calibration and test data of a network."""
    if name == "resnet20":
        images, _ = cifar10("train", limit=2048)
        return [(images, *cifar10("test"))]
    images, labels = imagenet_sample("torch" if name == "squeezenet" else "tf")
    even, odd = slice(0, None, 2), slice(1, None, 2)
    return [(images[even], images[odd], labels[odd]), (images[odd], images[even], labels[even])]


def score(model: nn.Module, reference: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Per-image drop in top-1 (−1, 0, 1) against the float outputs, and the mean KL divergence in nats."""
    output = logits(model, images, 100)
    drop = (reference.argmax(1) == labels).float() - (output.argmax(1) == labels).float()
    log_p, log_q = reference.log_softmax(1), output.log_softmax(1)
    return drop, (log_p.exp() * (log_p - log_q)).sum(1).mean().item()


def run(name: str, bits: float, calibrated: bool, data: list[Fold]) -> dict[str, Any]:
    """One row: a network at one size, with or without calibration, over its folds."""
    model = network(name)
    drops, divergences, seconds, sizes, floats, share = [], [], [], [], [], []
    for calibration, images, labels in data:
        reference = logits(model, images, 100)
        start = time.perf_counter()
        if calibrated:
            compressed = tq.compress(model, calibration, bits=bits)
        else:
            compressed = tq.compress(model, bits=bits, transform="identity", trellis=False)
        seconds.append(time.perf_counter() - start)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "net.tq"
            compressed.save(file)
            sizes.append(file.stat().st_size)
            decoded = tq.load(file).install(copy.deepcopy(model))
        drop, divergence = score(decoded, reference, images, labels)
        drops.append(drop)
        divergences.append(divergence)
        floats.append(100 * (reference.argmax(1) == labels).float().mean().item())
        report = compressed.report
        share.append(100 * (report.header_bytes + report.side_info_bytes) / report.file_bytes)
    drop = torch.cat(drops)
    return {
        "network": name, "bits": bits, "method": "transquant" if calibrated else "plain",
        "file_bytes": sum(sizes) / len(sizes), "bits_per_parameter": 8 * sum(sizes) / len(sizes) / report.num_parameters,
        "float": sum(floats) / len(floats), "top1": sum(floats) / len(floats) - 100 * drop.mean().item(),
        "drop": 100 * drop.mean().item(), "standard_error": 100 * drop.std().item() / len(drop) ** 0.5,
        "kl": sum(divergences) / len(divergences), "seconds": max(seconds), "header_and_side_percent": max(share),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, ours beside plain rounding."""
    lines = [
        "| network | bits/param | file, bytes | plain | **transquant** | float | drop ± s.e. | KL, nats | header + side | time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["method"] == "transquant":
            plain = next(r for r in rows if r["method"] == "plain" and (r["network"], r["bits"]) == (row["network"], row["bits"]))
            lines.append(
                f"| {TITLES[row['network']]} | {row['bits_per_parameter']:.2f} | {row['file_bytes']:,.0f} | {plain['top1']:.1f} | "
                f"**{row['top1']:.2f}** | {row['float']:.2f} | {row['drop']:.2f} ± {row['standard_error']:.2f} | {row['kl']:.4f} | "
                f"{row['header_and_side_percent']:.1f} % | {row['seconds']:.0f} s |"
            )
    return "\n".join(lines) + "\n"


def publish(rows: list[dict[str, Any]]) -> None:
    """Put the table into the README and draw ResNet-20's curve."""
    insert_table("README.md", "main_job.py", table(rows))
    mine = [r for r in rows if r["network"] == "resnet20"]
    curves = {
        name: [(r["bits_per_parameter"], r["top1"]) for r in mine if r["method"] == method]
        for name, method in (("transquant", "transquant"), ("plain rounding", "plain"))
    }
    if mine:
        write_curve(ROOT / "docs" / "rate_distortion.png", curves, "top-1 accuracy (%)", floor=mine[0]["float"])


def main() -> None:
    path = Path(__file__).with_suffix(".json")
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for name in sys.argv[1:] or JOBS:
        data = folds(name)
        rows = [r for r in rows if r["network"] != name]
        for bits in JOBS[name]:
            for calibrated in (False, True):
                rows.append(run(name, bits, calibrated, data))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    rows.sort(key=lambda r: (list(JOBS).index(r["network"]), -r["bits"], r["method"]))
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    path.write_text(json.dumps({"command": "python benchmarks/main_job.py", "machine": machine, "rows": rows}, indent=1) + "\n")
    publish(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
