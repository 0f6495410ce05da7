"""Multiply–adds against score: objective="macs" on real networks, run in the transform domain, without any training.

    python benchmarks/macs.py                    # everything; resumes where it stopped
    python benchmarks/macs.py resnet20 --fresh
    python benchmarks/macs.py --latency          # times of the rows that there are, on a machine that does nothing else

Files of 6 bits a parameter at default effort. Calibration and test data as in main_job.py.
Writes benchmarks/macs.json and the table in docs/running.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import transquant as tq
from main_job import TITLES, folds, score
from networks import logits, network
from pages import insert_table
from transquant import inference

SHARES = {"resnet20": (0.9, 0.85, 0.8, 0.75, 0.7), "squeezenet": (0.9, 0.85)}
BITS = 6.0


def run(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


def compressed(name: str, share: float, calibration: Tensor) -> tq.CompressedModel:
    return tq.compress(network(name), calibration, bits=BITS, objective="macs", macs=share)


def macs(model: nn.Module, images: Tensor) -> int:
    return sum(inference.count_macs(model, images[:1], run).values())


def row(name: str, share: float) -> dict[str, Any]:
    model = network(name)
    drops, divergences, shares, sizes = [], [], [], []
    start = time.perf_counter()
    for calibration, images, labels in folds(name):
        file = compressed(name, share, calibration)
        installed = file.install(copy.deepcopy(model), mode="transform")
        drop, divergence = score(installed.eval(), logits(model, images, 100), images, labels)
        drops.append(drop)
        divergences.append(divergence)
        shares.append(macs(installed, images) / macs(model, images))
        sizes.append(len(file.data))
    drop = 100 * torch.cat(drops)
    return {
        "network": name, "asked": share, "macs": sum(shares) / len(shares), "drop": drop.mean().item(),
        "standard_error": drop.std().item() / len(drop) ** 0.5, "kl": sum(divergences) / len(divergences),
        "file_bytes": sum(sizes) / len(sizes), "seconds": time.perf_counter() - start,
    }  # fmt: skip


def latency(rows: list[dict[str, Any]]) -> None:
    """Paired medians, float and two thin layers taking turns; the weights' values do not matter, so those of few samples do."""
    for one in rows:
        calibration, images, _ = folds(one["network"])[0]
        model = network(one["network"])
        file = tq.compress(model, calibration[:256], bits=BITS, effort=1, objective="macs", macs=one["asked"])
        installed = file.install(copy.deepcopy(model), mode="transform")
        for batch in (1, 32):
            costs = inference.measure({"float": model, "thin": installed}, images[:batch], run, {"float": 0, "thin": 0}, 40)
            one[f"latency_{batch}"] = costs["thin"].milliseconds / costs["float"].milliseconds


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| network | MACs | drop in top-1, points ± s.e. | KL, nats | file, bytes | time, batch of 1 | of 32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        times = [f"{one[k]:.2f}" if k in one else "–" for k in ("latency_1", "latency_32")]
        lines.append(
            f"| {TITLES[one['network']]} | {one['macs']:.3f} | {one['drop']:.2f} ± {one['standard_error']:.2f} | "
            f"{one['kl']:.4f} | {one['file_bytes']:,.0f} | {' | '.join(times)} |"
        )
    return (
        "\n".join(lines)
        + "\n\nMACs and times are shares of the float network's; times are of the two thin layers, paired medians.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=[])
    for flag in ("--fresh", "--latency"):
        parser.add_argument(flag, action="store_true")
    arguments = parser.parse_args()
    path = Path(__file__).with_suffix(".json")
    known = lambda: json.loads(path.read_text())["rows"] if path.exists() else []  # noqa: E731
    asked = [(n, s) for n in arguments.networks or SHARES for s in SHARES[n]]
    asked = [] if arguments.latency else asked
    for key in asked:
        rows = known()
        if any((r["network"], r["asked"]) == key for r in rows) and not arguments.fresh:
            continue
        made = row(*key)
        print(json.dumps(made), file=sys.stderr, flush=True)
        rows = [r for r in known() if (r["network"], r["asked"]) != key] + [made]
        save(path, rows)
    if arguments.latency:
        rows = known()
        latency(rows)
        save(path, rows)
    insert_table("docs/running.md", "macs.py", table(known()))
    print(table(known()))


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    rows.sort(key=lambda r: (list(SHARES).index(r["network"]), -r["asked"]))
    machine = {"processor": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    path.write_text(json.dumps({"command": "python benchmarks/macs.py", "machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
