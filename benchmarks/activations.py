"""Quantized inputs of layers beside 8-bit weights: score at 8, 6, 5 and 4 bits a value, and how long integers take.

    python benchmarks/activations.py               # everything, half an hour on two cores; resumes where it stopped
    python benchmarks/activations.py resnet20 --fresh

ResNet-20: calibrated on 2,048 training images, each row scored once on all 10,000 test images. SqueezeNet: two folds of the 1,000
sample images, calibrated on 256 of one half and scored on the other; mean of both. Weights take 8 bits a parameter, and in mode
int8 codes of eight bits. "same" gives every layer the same bits, "min-max" takes ranges from smallest to largest value as well;
both with the float network's weights. Latency: medians of runs that take turns. Writes benchmarks/activations.json and the tables
in docs/activations.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import transquant as tq
from main_job import TITLES, Fold, folds, score
from networks import logits, network
from pages import insert_table
from transquant.allocation.activations import best_quantizer
from transquant.codec import KEPT
from transquant.grid import global_step
from transquant.inference import measure, quantize_input
from transquant.modules import micro_batches, plan_model, run_batch
from transquant.records import Activation, InputStats
from transquant.running import weight_bytes
from transquant.stats import collect
from transquant.work import WorkFolder
from transquant.workers import workers

NETWORKS = ("resnet20", "squeezenet")
BITS = (8.0, 6.0, 5.0, 4.0)
BATCHES = (1, 32)
REPEATS = {"resnet20": 60, "squeezenet": 9}
CALIBRATION = {"resnet20": 2048, "squeezenet": 256}
PARTS = ("rows", "latency", "low_rate")
PATH = Path(__file__).with_suffix(".json")


def evaluate(models: list[nn.Module], data: list[Fold], references: list[Tensor]) -> dict[str, float]:
    """Points of top-1 that are lost over all folds, their paired standard error, and the KL divergence."""
    found = [
        score(m.to(memory_format=torch.channels_last), r, images, labels)
        for m, r, (_, images, labels) in zip(models, references, data, strict=True)
    ]
    drop = torch.cat([d for d, _ in found])
    return {
        "drop": 100 * drop.mean().item(), "standard_error": 100 * drop.std().item() / len(drop) ** 0.5,
        "kl": float(np.mean([kl for _, kl in found])),
    }  # fmt: skip


def score_row(name: str, bits: float, data: list[Fold], folder: Path) -> dict[str, Any]:
    """A network at one mean of bits; statistics are taken once, and kept in `folder`: they depend on no bits."""
    model = network(name).to(memory_format=torch.channels_last)
    references = [logits(model, images, 100) for _, images, _ in data]
    accuracy = np.mean([(r.argmax(1) == labels).float().mean().item() for r, (_, _, labels) in zip(references, data, strict=True)])
    pairs = [compressed(name, bits, calibration, folder / str(k)) for k, (calibration, _, _) in enumerate(data)]
    files, inputs = [f for f, _ in pairs], [s for _, s in pairs]
    row: dict[str, Any] = {"network": name, "bits": bits, "top1": 100 * accuracy}
    row["mean_bits"] = float(np.mean([f.report.activations[0] for f in files]))
    row["predicted"] = float(np.mean([f.report.activations[1] for f in files]))
    for mode in ("float", "activations", "int8") if bits == 8 else ("activations",):
        row[mode] = evaluate([f.install(network(name), mode=mode) for f in files], data, references)
    for how in ("same", "min-max"):
        row[how] = evaluate([with_inputs(name, stats, int(bits), how) for stats in inputs], data, references)
    return row


def compressed(name: str, bits: float, calibration: Tensor, work: Path) -> tuple[tq.CompressedModel, dict[str, InputStats]]:
    """A file, and the histograms that it was made of."""
    work.mkdir(parents=True, exist_ok=True)
    model, options = network(name), {"effort": 1, "transform": "identity", "trellis": False}
    file = tq.compress(model, calibration, bits=8.0, activations=bits, work=work, **options)  # type: ignore[arg-type]
    return file, input_statistics(model, calibration, work)


def input_statistics(model: nn.Module, calibration: Tensor, work: Path) -> dict[str, InputStats]:
    """Histograms of the inputs, those of `compress`: without the micro-batches that it holds back."""
    batches = [b for k, b in enumerate(micro_batches([calibration])) if k % 5 != 4]
    with workers(lambda: WorkFolder(work, KEPT)) as pool:
        return dict(collect(model, batches, plan_model(model), run_batch, pool, inputs=True).inputs)


def with_inputs(name: str, stats: dict[str, InputStats], bits: int, how: str) -> nn.Module:
    """The float network with all inputs quantized to so many bits."""
    model = network(name)
    for key, of in stats.items():
        quantizer = best_quantizer(of, bits)[0] if how == "same" else whole_range(of, bits)
        quantize_input(model.get_submodule(key.removesuffix(".weight")), quantizer)
    return model


def whole_range(stats: InputStats, bits: int) -> Activation:
    """From the smallest value that was seen to the largest."""
    low, high = min(stats.low, 0.0), max(stats.high, 0.0)
    mantissa, exponent = global_step((high - low) / (2**bits - 1))
    return Activation(bits, round(-low / (mantissa * 2.0**exponent)), mantissa, exponent)


def latency(name: str, data: list[Fold], folder: Path) -> list[dict[str, Any]]:
    """Milliseconds a run and bytes of weights of each mode."""
    calibration, images, _ = data[0]
    file, _ = compressed(name, 8.0, calibration, folder / "0")
    rows = []
    for batch in BATCHES:
        models = {mode: file.install(network(name), mode=mode) for mode in ("float", "activations", "int8")}
        models["float, channels last"] = file.install(network(name)).to(memory_format=torch.channels_last)
        models["int8, channels last"] = file.install(network(name), mode="int8")
        sizes = {k: weight_bytes(m) for k, m in models.items()}
        last = {id(m) for k, m in models.items() if "last" in k}
        costs = measure(models, images[:batch], partial(run, last), sizes, REPEATS[name])
        rows += [
            {"network": name, "batch": batch, "mode": k, "milliseconds": c.milliseconds, "weight_bytes": c.weight_bytes}
            for k, c in costs.items()
        ]
    return rows


def run(last: set[int], model: nn.Module, x: Tensor) -> Tensor:
    """Of models in `last`, by id, the images have their channels last in memory."""
    return model(x.contiguous(memory_format=torch.channels_last) if id(model) in last else x)


def low_rate(data: list[Fold]) -> dict[str, Any]:
    """ResNet-20 with weights of two bits, and that with inputs of eight."""
    model, (calibration, images, _) = network("resnet20"), data[0]
    references = [logits(model, images, 100)]
    file = tq.compress(model, calibration, bits=2.0, activations=8.0)
    modes = ("float", "activations", "int8")
    scores = {mode: evaluate([file.install(network("resnet20"), mode=mode)], data, references) for mode in modes}
    return {"network": "resnet20", "bits": 2.0, **scores}


def table(rows: list[dict[str, Any]]) -> str:
    """Scores as Markdown."""
    lines = [
        "| network | bits a value | float top-1 | **drop** ± s.e. | KL, nats | KL, same bits for all | KL, min–max |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        modes = [("8, in integers", "int8")] if "int8" in row else []
        for label, mode in [(f"{row['bits']:g}", "activations"), *modes]:
            own = row[mode]
            others = " | ".join(f"{row[k]['kl']:.4f}" for k in ("same", "min-max")) if mode == "activations" else " | "
            lines.append(
                f"| {TITLES[row['network']]} | {label} | {row['top1']:.2f} | **{own['drop']:.2f}** ± {own['standard_error']:.2f} "
                f"| {own['kl']:.4f} | {others} |"
            )
    return "\n".join(lines) + "\n"


def latency_table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds as Markdown."""
    modes = ("float", "float, channels last", "int8", "int8, channels last", "activations")
    lines = ["| network, batch | " + " | ".join(modes) + " |", "|---" * (len(modes) + 1) + "|"]
    for key in dict.fromkeys((r["network"], r["batch"]) for r in rows):
        own = {r["mode"]: r["milliseconds"] for r in rows if (r["network"], r["batch"]) == key}
        lines.append(f"| {TITLES[key[0]]}, {key[1]} | " + " | ".join(f"{own[m]:.1f}" for m in modes) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantized inputs of layers: score and time.")
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--fresh", action="store_true", help="measure again what is known")
    parser.add_argument("--work", type=Path, help="folder where statistics are kept")
    arguments = parser.parse_args()
    for name in arguments.networks:
        data = [(calibration[: CALIBRATION[name]], *rest) for calibration, *rest in folds(name)]
        known = {part: [r for r in _read()[part] if r["network"] == name and not arguments.fresh] for part in PARTS}
        with tempfile.TemporaryDirectory() as folder:
            work = Path(arguments.work or folder)
            for bits in [b for b in BITS if b not in [r["bits"] for r in known["rows"]]]:
                known["rows"].append(score_row(name, bits, data, work))
                print(json.dumps(known["rows"][-1]), file=sys.stderr, flush=True)
                _write("rows", name, sorted(known["rows"], key=lambda r: -r["bits"]))
            if not known["latency"]:
                _write("latency", name, latency(name, data, work))
        if name == "resnet20" and not known["low_rate"]:
            _write("low_rate", name, [low_rate(data)])
    content = _read()
    insert_table("docs/activations.md", "activations.py", table(content["rows"]))
    insert_table("docs/activations.md", "activations.py latency", latency_table(content["latency"]))
    print(table(content["rows"]), latency_table(content["latency"]), json.dumps(content["low_rate"]), sep="\n")


def _read() -> dict[str, Any]:
    return json.loads(PATH.read_text()) if PATH.exists() else {part: [] for part in PARTS}


def _write(part: str, name: str, rows: list[dict[str, Any]]) -> None:
    """Replace a network's rows of a part of the JSON."""
    content = _read()
    kept = [r for r in content[part] if r["network"] != name] + rows
    content[part] = sorted(kept, key=lambda r: NETWORKS.index(r["network"]))
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    content = {
        "command": "python benchmarks/activations.py",
        "machine": machine,
        **{k: content[k] for k in PARTS},
    }
    PATH.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
