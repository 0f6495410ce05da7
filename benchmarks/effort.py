"""Bytes against time: what each effort costs, and how many bytes it takes at the same quality.

    python benchmarks/effort.py               # some minutes a network
    python benchmarks/effort.py demo          # one network

Every effort makes files of two sizes from the same calibration data. Quality is the KL divergence of outputs on training data that
was not calibrated on. Between the two files log KL is linear in bytes; where that line meets the KL of effort 5's larger file, the
bytes are compared. Time is that of one call of `compress`, compiling left out. Writes effort.json and the table in docs/method.md.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import in_order
import networks
import transquant as tq
from in_order import divergence
from pages import insert_table
from transquant.demo.network import load_digits_split, pretrained

SIZES = {"demo": (1.0, 1.5), "resnet20": (1.4, 2.0), "charrnn": (1.5, 2.0)}  # bits a parameter
NAMES = {**in_order.NAMES, "demo": "demo network"}
MOST = 1024  # samples
EFFORTS = tuple(range(1, 10))


def network(name: str) -> torch.nn.Module:
    """The network that ships with the package, or one of the shared data."""
    return pretrained() if name == "demo" else networks.network(name)


def samples(name: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """(to calibrate, to measure, options)."""
    if name != "demo":
        return in_order.samples(name)
    images = load_digits_split()[0][0]
    return images[::2], images[1::2], {}


def run(name: str, effort: int) -> dict[str, Any]:
    """One row."""
    calibration, others, options = samples(name)
    model = network(name)
    row: dict[str, Any] = {"network": name, "effort": effort, "bytes": [], "kl": [], "seconds": []}
    for bits in SIZES[name]:
        start = time.perf_counter()
        file = tq.compress(model, calibration[:MOST].split(64), bits=bits, effort=effort, **options)
        row["seconds"].append(time.perf_counter() - start)
        row["bytes"].append(len(file.data))
        row["kl"].append(divergence(model, file.install(network(name)), others, name))
    return row


def same_quality(row: dict[str, Any], kl: float) -> float:
    """Bytes at which a row's line meets a KL."""
    slope = (row["bytes"][1] - row["bytes"][0]) / np.log(row["kl"][1] / row["kl"][0])
    return float(row["bytes"][1] + slope * np.log(kl / row["kl"][1]))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    names = list(dict.fromkeys(r["network"] for r in rows))
    lines = ["| effort | " + " | ".join(f"{NAMES[n]}, bytes | seconds" for n in names) + " |", "|---" * (2 * len(names) + 1) + "|"]
    for effort in EFFORTS:
        cells = []
        for name in names:
            mine = {r["effort"]: r for r in rows if r["network"] == name}
            if effort in mine and 5 in mine:
                cells.append(f"{same_quality(mine[effort], mine[5]['kl'][1]):,.0f} | {mine[effort]['seconds'][1]:.0f}")
            else:
                cells.append("– | –")
        lines.append(f"| {effort} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    tq.compress(torch.nn.Linear(64, 64), torch.randn(128, 64), bits=4)  # compiles
    names = sys.argv[1:] or list(SIZES)
    path = Path(__file__).with_suffix(".json")
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    rows: list[dict[str, Any]] = [r for r in kept if r["network"] not in names]
    for name in names:
        for effort in EFFORTS:
            rows.append(run(name, effort))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    path.write_text(json.dumps({"command": "python benchmarks/effort.py", "machine": machine, "rows": rows}, indent=1) + "\n")
    insert_table("docs/method.md", "effort.py", table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
