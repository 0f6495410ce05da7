"""Modes of running side by side: outputs against the decoded network's, weights in memory, time.

    python benchmarks/running.py                  # all; resumes where it stopped; timm and transformers: extra "zoo"
    python benchmarks/running.py resnet50 --fresh

Files without calibration, effort 1: fixed-length codes of about 4 bits with a forced ELT ("transform", "packed") and without a
transform ("lazy", entropy-coded, and "packed, no transform"). The four trained networks on real data; timm's and a GPT-2 of two
layers with random weights; ResNet-50's shapes of scale.py. Times are paired medians of a batch of 8 beside float weights.
Writes benchmarks/running.json and the table in docs/running.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import transquant as tq
from networks import characters, cifar10, imagenet_sample, network
from pages import insert_table
from transquant import inference, running

TRAINED = ("resnet20", "squeezenet", "mobilenet", "charrnn")
RANDOM = ("resnet18", "densenet121", "mobilenetv3_small_050", "vit_tiny_patch16_224", "convnext_atto", "gpt2")
NAMES = (*TRAINED, *RANDOM, "resnet50")
BITS = 4.0
FILES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "ELT, fixed": ({"coding": "fixed", "transform": "elt"}, ("transform", "packed")),
    "fixed": ({"coding": "fixed", "transform": "identity"}, ("packed",)),
    "entropy": ({}, ("lazy",)),
}


def load(name: str) -> tuple[nn.Module, Tensor]:
    """A network and eight samples."""
    if name in TRAINED:
        samples = {
            "resnet20": lambda: cifar10("train", limit=8)[0],
            "squeezenet": lambda: imagenet_sample("torch")[0][:8],
            "mobilenet": lambda: imagenet_sample("tf")[0][:8],
            "charrnn": lambda: characters(0.0, 8)[:, :-1],
        }[name]()
        return network(name), samples
    torch.manual_seed(0)
    if name == "resnet50":
        from scale import resnet, smooth_images

        return resnet().eval(), smooth_images(8)
    from zoo import language_network, waves

    if name == "gpt2":
        make, samples, _, _ = language_network(name)
        return make().eval(), samples[:8]
    from zoo import declare_vision_ops

    declare_vision_ops()
    import timm

    return timm.create_model(name).eval(), waves(8, (224, 224), 3, 1)


def run(model: nn.Module, batch: Tensor) -> Any:
    return model(batch)


def output(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        result = run(model, batch)
    return (result if isinstance(result, Tensor) else result.logits).double()


def rows_of(name: str) -> list[dict[str, Any]]:
    model, samples = load(name)
    rows = []
    for title, (how, modes) in FILES.items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "net.tq"
            tq.compress(model, bits=BITS, effort=1, **how).save(file)
            compressed = tq.load(file, lazy=True)
        decoded = compressed.install(copy.deepcopy(model))
        expected = output(decoded, samples)
        for mode in modes:
            installed = compressed.install(copy.deepcopy(model), mode=mode)
            difference = (output(installed, samples) - expected).norm() / expected.norm()
            costs = inference.measure({"float": decoded, mode: installed}, samples, run, {"float": 0, mode: 0}, 5)
            weights = [m for m in running.installed(installed).layers.values() if m.startswith("two layers")]
            in_float = running.weight_bytes(decoded)
            largest = sorted(4 * t.numel() for n, t in decoded.state_dict().items() if t.ndim > 1)[-3:]
            rows.append({
                "network": name, "file": title, "mode": mode, "file_bytes": len(compressed.data), "difference": difference.item(),
                "float_bytes": in_float, "weight_bytes": running.weight_bytes(installed),
                "peak_bytes": running.weight_bytes(installed, peak=True), "allowed_bytes": len(compressed.data) + sum(largest),
                "macs": costs[mode].macs / costs["float"].macs, "time": costs[mode].milliseconds / costs["float"].milliseconds,
                "two_layers": len(weights),
            })  # fmt: skip
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| network | file | mode | bytes on disk | difference | in memory, of float | at most | MACs | time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['network']} | {r['file']} | {r['mode']} | {r['file_bytes']:,} | {r['difference']:.0e} | "
            f"{r['weight_bytes'] / r['float_bytes']:.3f} | {r['peak_bytes'] / r['float_bytes']:.3f} | "
            f"{r['macs']:.2f} | {r['time']:.2f} |"
        )
    return (
        "\n".join(lines)
        + "\n\nDifference: ‖Δ‖/‖y‖ to the decoded network. MACs and time (batch of 8, paired medians) are shares of the "
        "decoded network's.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=[], choices=[[], *NAMES])
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    path = Path(__file__).with_suffix(".json")
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for name in arguments.networks or NAMES:
        if arguments.fresh or not any(r["network"] == name for r in rows):
            rows = [r for r in rows if r["network"] != name] + rows_of(name)
            rows.sort(key=lambda r: NAMES.index(r["network"]))
            machine = {"processor": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
            path.write_text(
                json.dumps({"command": "python benchmarks/running.py", "machine": machine, "rows": rows}, indent=1) + "\n"
            )
    insert_table("docs/running.md", "running.py", table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
