"""Speed of the parts: entropy coder, both readers, feedback pass, start of the command line.

    python benchmarks/speed.py               # about two minutes on two cores

A layer of 1024 x 1024 weights from a Laplace distribution, at three rates; every figure is that of the fastest of several runs
in one process. Writes benchmarks/speed.json.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import transquant as tq
from transquant.entropy import lanes_for
from transquant.entropy.lanes import encode_planes
from transquant.quantizers.feedback import Rounding, quantize_feedback
from transquant.records import Plane

SIDE = 1024
SCALES = {"1 bit": 0.4, "2 bits": 1.2, "4 bits": 5.0}


def best(task: Callable[[], object], runs: int = 3) -> float:
    """Seconds of the fastest of some runs, after one to warm up."""
    task()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        task()
        times.append(time.perf_counter() - start)
    return min(times)


def coder(symbols: np.ndarray, name: str) -> dict[str, float]:
    """Rates in million weights a second, and the overhead over the information content of the models."""
    layer = nn.Linear(SIDE, SIDE, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(symbols).float())
    energy = float((symbols.astype(float) ** 2).sum())
    compressed = tq.compress(layer, None, step=1 / energy**0.5)  # the step that gives these symbols
    planes = [Plane(symbols, 0)]
    lanes = lanes_for(symbols.size, symbols.size, SIDE, float(np.abs(symbols).mean()))
    data, bits = encode_planes(planes, lanes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.tq"
        compressed.save(path)
        return {
            f"bits a weight, {name}": 8 * len(compressed.data) / symbols.size,
            f"section over information content, {name}, %": 100 * (8 * len(data) / sum(bits) - 1),
            f"encode, {name}, M weights/s": symbols.size / best(lambda: encode_planes(planes, lanes)) / 1e6,
            f"load and state_dict, {name}, M weights/s": symbols.size / best(lambda: tq.load(path).state_dict()) / 1e6,
            f"numpy reader, {name}, M weights/s": symbols.size / best(lambda: tq.reader.load(path), 2) / 1e6,
        }


def feedback(side: int, rng: np.random.Generator) -> float:
    """Seconds of one two-sided pass over a square layer."""
    lower = np.tril(rng.normal(size=(side, side)) * 0.3 / side**0.5, -1) + np.eye(side)
    weight, steps = rng.normal(size=(side, side)), np.full((side, side), 0.5)
    return best(lambda: quantize_feedback(weight, steps, lower, lower, Rounding()), 1)


def main() -> None:
    rng = np.random.default_rng(0)
    figures: dict[str, float] = {}
    for name, scale in SCALES.items():
        figures |= coder(np.rint(rng.laplace(0, scale, (SIDE, SIDE))).astype(np.int32), name)
    for side in (1024, 4096):
        figures[f"two-sided feedback pass, {side} x {side}, s"] = feedback(side, rng)
    command = [sys.executable, "-m", "transquant", "--help"]
    figures["transquant --help, s"] = best(lambda: subprocess.run(command, check=True, capture_output=True), 5)
    machine = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    record = {"command": "python benchmarks/speed.py", "machine": machine, "figures": figures}
    Path(__file__).with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    for name, value in figures.items():
        print(f"{name:<50} {value:8.3f}")


if __name__ == "__main__":
    main()
