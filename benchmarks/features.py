"""Feature maps of three networks: real bits a value against the score, beside the published ways of coding them.

    python benchmarks/features.py                                  # everything; resumes where it stopped
    python benchmarks/features.py --networks resnet20 --methods auto --fresh    # again, these only

Every map that an activation function makes is coded, one packet a sample and map, headers and checksums counted; the network goes
on with what comes out of the packets. Networks, splits and scores are those of main_job.py: ResNet-20 calibrated on 2,048 training
images and scored on all test images, SqueezeNet and MobileNetV1 on one half of the sample and scored on the other, both ways.
"auto, 8-bit weights": the network's weights are a compressed file of fixed 8-bit codes, and the drop is still against float.
Writes features.json and the table in docs/features.md.
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

import transquant as tq
from main_job import TITLES, folds, score
from networks import logits, network
from pages import insert_table
from transquant import features

RATES = {
    "auto": {"resnet20": (1.5, 1.8, 1.2), "squeezenet": (1.4, 2.0, 1.0), "mobilenet": (2.8, 2.4, 2.0)},
    "auto, 8-bit weights": {"resnet20": (1.5,), "squeezenet": (1.4,), "mobilenet": (2.8,)},
    "pca": {"resnet20": (3.0, 3.5, 2.5), "squeezenet": (3.0, 2.5, 3.5), "mobilenet": (4.5, 6.0, 7.0)},
    "dct-cm": {"resnet20": (4.9,), "squeezenet": (4.3,), "mobilenet": (5.5,)},
    "dct-cm-huffman": {"resnet20": (2.4, 2.0), "squeezenet": (2.4,), "mobilenet": (4.0,)},
}
LABELS = {
    "auto": "transquant", "auto, 8-bit weights": "transquant, 8-bit weights", "pca": "PCA + Huffman, as published",
    "dct-cm": "DCT-CM, reconstructed", "dct-cm-huffman": "DCT-CM, values coded",
}  # fmt: skip
DROPS = {"resnet20": (0.5, 1.0), "squeezenet": (0.5, 1.5), "mobilenet": (0.5, 1.0)}
Row = dict[str, Any]


def run(name: str, method: str, bits: float) -> Row:
    """One row, over the network's folds."""
    drops, kls, sizes, values, codecs, seconds = [], [], 0, 0, [], []
    for calibration, images, labels in folds(name):
        model = network(name)
        reference = logits(model, images, 100)
        start = time.perf_counter()
        if "8-bit" in method:
            model = tq.compress(model, calibration, bits=8.0, coding="fixed", effort=1).install(copy.deepcopy(model))
        codec = features.calibrate(model, [calibration], bits_per_value=bits, method=method.partition(",")[0])
        seconds.append(time.perf_counter() - start)
        with codec.attach(model) as ledger:
            drop, kl = score(model, reference, images, labels)
        drops.append(drop)
        kls.append(kl)
        codecs.append(len(codec.data))
        sizes, values = sizes + ledger.bytes, values + ledger.values
    drop = 100 * torch.cat(drops)
    return {
        "network": name, "method": method, "asked": bits, "bits_per_value": 8 * sizes / values, "drop": drop.mean().item(),
        "standard_error": drop.std().item() / len(drop) ** 0.5, "kl": sum(kls) / len(kls), "bytes_per_image": sizes / len(drop),
        "codec_bytes": max(codecs), "calibration_seconds": max(seconds),
    }  # fmt: skip


def table(rows: list[Row]) -> str:
    """All rows as Markdown."""
    heads = ("network", "method", "bits/value", "against 8 bits", "drop ± s.e., points", "KL, nats", "bytes an image", "codec file")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        lines.append(
            f"| {TITLES[row['network']]} | {LABELS[row['method']]} | **{row['bits_per_value']:.2f}** | "
            f"{8 / row['bits_per_value']:.1f} × | {row['drop']:.2f} ± {row['standard_error']:.2f} | {row['kl']:.4f} | "
            f"{row['bytes_per_image']:,.0f} | {row['codec_bytes'] / 1000:,.0f} KB |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(DROPS), choices=list(DROPS))
    parser.add_argument("--methods", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--most", type=int, default=9, help="so many rates of each")
    parser.add_argument("--fresh", action="store_true", help="measure again what is known")
    options = parser.parse_args()
    path = Path(__file__).with_suffix(".json")
    for method in options.methods:
        for name in options.networks:
            for bits in RATES[method][name][: options.most]:
                if not options.fresh and len(_others(path, name, method, bits)) < len(_rows(path)):
                    continue
                row = run(name, method, bits)
                print(json.dumps(row), file=sys.stderr, flush=True)
                order = [(n, m) for n in DROPS for m in RATES]
                rows = sorted(
                    [*_others(path, name, method, bits), row], key=lambda r: (order.index((r["network"], r["method"])), -r["asked"])
                )
                machine = {"processor": platform.machine(), "torch": torch.__version__}
                record = {"command": "python benchmarks/features.py", "machine": machine, "rows": rows}
                path.write_text(json.dumps(record, indent=1) + "\n")
    rows = _rows(path)
    insert_table("docs/features.md", "features.py rates", table(rows))


def _rows(path: Path) -> list[Row]:
    return json.loads(path.read_text())["rows"] if path.exists() else []


def _others(path: Path, name: str, method: str, bits: float) -> list[Row]:
    return [r for r in _rows(path) if (r["network"], r["method"], r["asked"]) != (name, method, bits)]


if __name__ == "__main__":
    main()
