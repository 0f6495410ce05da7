"""What layers in execution order are worth: measured distortion with and without, at the same size.

    python benchmarks/in_order.py     # some minutes

Three networks of the shared data, calibrated on training data (MobileNetV1: on every other image of the sample), measured
by their outputs on training data (the other images) that was not calibrated on. Effort 4 and 5 differ in nothing else. Writes
in_order.json and the table in docs/method.md.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

import networks
import transquant as tq
from pages import insert_table

POINTS = {"resnet20": (1.0, 2.0), "charrnn": (2.0, 3.0), "mobilenet": (3.0,)}
NAMES = {"resnet20": "ResNet-20", "squeezenet": "SqueezeNet", "mobilenet": "MobileNetV1 0.25", "charrnn": "LSTM"}


def samples(name: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """(to calibrate, to measure, options)."""
    if name == "resnet20":
        images = networks.cifar10("train", 4096)[0]
        return images[:2048], images[2048:], {}
    if name == "charrnn":
        rows = networks.characters(0.0, 512)[:, :-1]
        return rows[::2], rows[1::2], {"output": networks.after_warm_up}
    images = networks.imagenet_sample("torch" if name == "squeezenet" else "tf")[0]
    return images[::2], images[1::2], {}


@torch.no_grad()
def divergence(one: torch.nn.Module, two: torch.nn.Module, inputs: torch.Tensor, name: str) -> float:
    """Mean KL divergence of outputs, nats."""
    total, count = 0.0, 0
    for batch in inputs.split(64):
        outputs = [networks.after_warm_up(m(batch)) if name == "charrnn" else m(batch) for m in (one, two)]
        p, q = (z.log_softmax(-1).flatten(0, -2) for z in outputs)
        total, count = total + float((p.exp() * (p - q)).sum()), count + len(p)
    return total / count


def run(name: str, bits: float) -> dict[str, Any]:
    """One row."""
    calibration, others, options = samples(name)
    model = networks.network(name)
    row: dict[str, Any] = {"network": name, "bits": bits}
    for effort in (4, 5):
        start = time.perf_counter()
        file = tq.compress(model, calibration.split(64), bits=bits, effort=effort, **options)
        row[f"seconds, effort {effort}"] = time.perf_counter() - start
        row[f"bytes, effort {effort}"] = len(file.data)
        row[f"kl, effort {effort}"] = divergence(model, file.install(networks.network(name)), others, name)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| KL in nats on other training samples | each layer for itself | in execution order | seconds |", "|---|---|---|---|"]
    for r in rows:
        plain, ordered = (
            [f"{r[f'{what}, effort {e}']:{form}}" for what, form in (("kl", ".4f"), ("seconds", ".0f"))] for e in (4, 5)
        )
        lines.append(f"| {NAMES[r['network']]}, {r['bits']:g} bits | {plain[0]} | {ordered[0]} | {plain[1]}, {ordered[1]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = []
    for name, points in POINTS.items():
        for bits in points:
            rows.append(run(name, bits))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    content = {"command": "python benchmarks/in_order.py", "machine": machine, "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    insert_table("docs/method.md", "in_order.py", table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
