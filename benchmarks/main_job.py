"""The main job on four real networks: score against the size of the whole file, at default effort and with everything spent.

    python benchmarks/main_job.py                         # everything, some hours on two cores; resumes where it stopped
    python benchmarks/main_job.py resnet20 --fresh        # one network, again
    python benchmarks/main_job.py resnet20 --efforts 5    # at default effort only

ResNet-20: calibrated on 2,048 training images, scored once on all 10,000 test images. SqueezeNet and MobileNetV1: two folds
of the 1,000 sample images, calibrated on one half and scored on the other; mean of both folds. Character network: calibrated
on 2,048 rows from all of the text but its middle, scored on 64 rows of that, bits a character. "plain" is rounding to nearest
with one step a tensor, proportional to its root mean square, in the same file format and entropy coder.
Writes benchmarks/main_job.json, the tables in README.md and docs/method.md, and the picture docs/rate_distortion.png.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import transquant as tq
from networks import WARM_UP, after_warm_up, characters, characters_around, cifar10, imagenet_sample, logits, network
from pages import ROOT, insert_table
from transquant.plots import write_curve

JOBS = {
    "resnet20": (4.0, 3.0, 2.0, 1.5, 1.0, 0.7), "squeezenet": (3.0, 2.0, 1.5), "mobilenet": (4.0, 3.0), "charrnn": (3.0, 2.0),
}  # fmt: skip
TITLES = {"resnet20": "ResNet-20", "squeezenet": "SqueezeNet 1.1", "mobilenet": "MobileNetV1 0.25", "charrnn": "character LSTM"}
RESULTS = Path(__file__).with_suffix(".json")
PLAIN, DEFAULT, BEST = 0, 5, 9  # efforts; 0: without calibration
Fold = tuple[Tensor, Tensor, Tensor]  # calibration samples, test samples, test labels


def measured() -> list[dict[str, Any]]:
    """All rows so far."""
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []


def folds(name: str) -> list[Fold]:
    """Calibration and test data of a network."""
    if name == "resnet20":
        images, _ = cifar10("train", limit=2048)
        return [(images, *cifar10("test"))]
    if name == "charrnn":
        rows = characters(0.5, 64)
        return [(characters_around(0.5, 64, 2048)[:, :-1], rows[:, :-1], rows[:, WARM_UP + 1 :])]
    images, labels = imagenet_sample("torch" if name == "squeezenet" else "tf")
    even, odd = slice(0, None, 2), slice(1, None, 2)
    return [(images[even], images[odd], labels[odd]), (images[odd], images[even], labels[even])]


def score(model: nn.Module, reference: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Per-image drop in top-1 (−1, 0, 1) against the float outputs, or of each row of text how many bits a character more it takes;
    and the mean KL divergence in nats."""
    output = logits(model, images, 100)
    if output.ndim == 3:
        reference, output = after_warm_up(reference).log_softmax(2), after_warm_up(output).log_softmax(2)
        losses = (reference - output).gather(2, labels[:, :, None])[:, :, 0] / math.log(2)
        return losses.mean(1), (reference.exp() * (reference - output)).sum(2).mean().item()
    drop = (reference.argmax(1) == labels).float() - (output.argmax(1) == labels).float()
    log_p, log_q = reference.log_softmax(1), output.log_softmax(1)
    return drop, (log_p.exp() * (log_p - log_q)).sum(1).mean().item()


def run(name: str, bits: float, effort: int, data: list[Fold]) -> dict[str, Any]:
    """One row: a network at one size and effort, over its folds."""
    model = network(name)
    drops, divergences, seconds, sizes, floats, share = [], [], [], [], [], []
    for calibration, images, labels in data:
        reference = logits(model, images, 100)
        start = time.perf_counter()
        if effort == PLAIN:
            compressed = tq.compress(model, bits=bits, transform="identity", trellis=False)
        else:
            output = after_warm_up if name == "charrnn" else None
            compressed = tq.compress(model, calibration, bits=bits, effort=effort, output=output)
        seconds.append(time.perf_counter() - start)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "net.tq"
            compressed.save(file)
            sizes.append(file.stat().st_size)
            decoded = tq.load(file).install(copy.deepcopy(model))
        drop, divergence = score(decoded, reference, images, labels)
        drops.append(drop)
        divergences.append(divergence)
        floats.append(float_score(reference, labels))
        report = compressed.report
        share.append(100 * (report.header_bytes + report.side_info_bytes) / report.file_bytes)
    drop, unit = torch.cat(drops), 1 if name == "charrnn" else 100
    mean = unit * drop.mean().item()
    return {
        "network": name, "bits": bits, "effort": effort,
        "file_bytes": sum(sizes) / len(sizes), "bits_per_parameter": 8 * sum(sizes) / len(sizes) / report.num_parameters,
        "float": sum(floats) / len(floats), "score": sum(floats) / len(floats) + (mean if name == "charrnn" else -mean),
        "drop": mean, "standard_error": unit * drop.std().item() / len(drop) ** 0.5,
        "kl": sum(divergences) / len(divergences), "seconds": max(seconds), "threads": torch.get_num_threads(),
        "header_and_side_percent": max(share), "version": tq.__version__,
    }  # fmt: skip


def float_score(reference: Tensor, labels: Tensor) -> float:
    """Top-1 in per cent, or bits a character, of the float network."""
    if reference.ndim == 3:
        return -after_warm_up(reference).log_softmax(2).gather(2, labels[:, :, None]).mean().item() / math.log(2)
    return 100 * (reference.argmax(1) == labels).float().mean().item()


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of default effort as Markdown, beside plain rounding."""
    lines = [
        "| network | bits/param | file, bytes | plain | **transquant** | float | drop ± s.e. | KL, nats | header + side | time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row, plain in ((r, _at(rows, r, PLAIN)) for r in rows if r["effort"] == DEFAULT):
        digits = 3 if row["network"] == "charrnn" else 2
        lines.append(
            f"| {TITLES[row['network']]} | {row['bits_per_parameter']:.2f} | {row['file_bytes']:,.0f} | "
            f"{plain['score'] if plain else float('nan'):.{digits - 1}f} | "
            f"**{row['score']:.{digits}f}** | {row['float']:.{digits}f} | {_drop(row)} | {row['kl']:.4f} | "
            f"{row['header_and_side_percent']:.1f} % | {row['seconds']:.0f} s |"
        )
    return "\n".join(lines) + "\n"


def efforts_table(rows: list[dict[str, Any]]) -> str:
    """Default effort and everything spent side by side, as Markdown."""
    lines = [
        "| network | bits/param | float | effort 5 | drop ± s.e. | KL, nats | effort 9 | drop ± s.e. | KL, nats | time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for best, row in ((r, _at(rows, r, DEFAULT)) for r in rows if r["effort"] == BEST):
        digits = 3 if best["network"] == "charrnn" else 2
        usual = f"{row['score']:.{digits}f} | {_drop(row)} | {row['kl']:.4f}" if row else "– | – | –"
        lines.append(
            f"| {TITLES[best['network']]} | {best['bits_per_parameter']:.2f} | {best['float']:.{digits}f} | {usual} | "
            f"**{best['score']:.{digits}f}** | {_drop(best)} | {best['kl']:.4f} | {best['seconds']:.0f} s |"
        )
    return "\n".join(lines) + "\n"


def _drop(row: dict[str, Any]) -> str:
    digits = 3 if row["network"] == "charrnn" else 2
    return f"{row['drop']:.{digits}f} ± {row['standard_error']:.{digits}f}"


def _at(rows: list[dict[str, Any]], row: dict[str, Any], effort: int) -> dict[str, Any] | None:
    return next((r for r in rows if (r["network"], r["bits"], r["effort"]) == (row["network"], row["bits"], effort)), None)


def publish(rows: list[dict[str, Any]]) -> None:
    """Put the table into the README and draw ResNet-20's curve."""
    insert_table("README.md", "main_job.py", table(rows))
    insert_table("docs/method.md", "main_job.py", efforts_table(rows))
    mine = [r for r in rows if r["network"] == "resnet20"]
    curves = {
        name: [(r["bits_per_parameter"], r["score"]) for r in mine if r["effort"] == effort]
        for name, effort in (("transquant", DEFAULT), ("plain rounding", PLAIN))
    }
    if mine:
        write_curve(ROOT / "docs" / "rate_distortion.png", curves, "top-1 accuracy (%)", floor=mine[0]["float"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Score against file size on four networks.")
    parser.add_argument("networks", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--efforts", nargs="*", type=int, default=[PLAIN, DEFAULT, BEST])
    parser.add_argument("--fresh", action="store_true", help="measure again what is known")
    arguments = parser.parse_args()
    asked = [(n, b, e) for n in arguments.networks for e in arguments.efforts for b in JOBS[n]]
    for name, bits, effort in asked:
        rows = measured()
        known = any((r["network"], r["bits"], r["effort"]) == (name, bits, effort) for r in rows)
        if known and not arguments.fresh:
            continue
        row = run(name, bits, effort, folds(name))
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows = [r for r in measured() if (r["network"], r["bits"], r["effort"]) != (name, bits, effort)] + [row]
        rows.sort(key=lambda r: (list(JOBS).index(r["network"]), -r["bits"], r["effort"]))
        machine = {"processor": platform.machine(), "torch": torch.__version__}
        content = {"command": "python benchmarks/main_job.py", "machine": machine, "rows": rows}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    publish(measured())
    print(table(measured()), efforts_table(measured()), sep="\n")


if __name__ == "__main__":
    main()
