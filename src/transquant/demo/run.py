"""The demo: a small network for real handwritten digits, compressed, decoded and scored, beside plain rounding."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from transquant.codec import CompressedModel, compress, load
from transquant.demo.network import load_digits_split, pretrained
from transquant.plots import write_curve

RATES = (1.0, 2.0, 3.0)  # of the curve, beside the rate that is asked for
PLAIN: dict[str, Any] = {"transform": "identity", "trellis": False}  # nothing but rounding


def run(output: Path, bits: float, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Write digits.tq and curve.png into the folder; scores of float, plain rounding and transquant at the same size.

    Calibrated on the unlabelled training images; scored on the test images. "Plain" is the same file format and
    coder without calibration data: one step for all weights, rounding to nearest."""
    start = time.perf_counter()
    (train, _), (images, labels) = load_digits_split()
    model = pretrained()
    curves: dict[str, list[tuple[float, float]]] = {"transquant": [], "plain rounding": []}
    result: dict[str, Any] = {}
    for number, rate in enumerate(rates := sorted({*RATES, bits})):
        progress("rates", number, len(rates))
        for name, calibration in (("transquant", train), ("plain rounding", None)):
            compressed = compress(model, calibration, bits=rate, **({} if calibration is not None else PLAIN))
            if name == "transquant" and rate == bits:
                compressed.save(output / "digits.tq")
                compressed = load(output / "digits.tq")  # what is scored is what a receiver gets
            score = accuracy(_decoded(model, compressed), images, labels)
            curves[name].append((compressed.report.bits_per_parameter, score))
            if rate == bits:
                result[name] = {"file_bytes": len(compressed.data), "top1": score}
    progress("rates", len(rates), len(rates))
    floating = accuracy(model, images, labels)
    write_curve(output / "curve.png", curves, "top-1 accuracy on test digits (%)", floor=floating)
    return {
        "float": {"file_bytes": compressed.report.original_bytes, "top1": floating},
        **result,
        "bits": bits,
        "file": str(output / "digits.tq"),
        "curve": str(output / "curve.png"),
        "seconds": time.perf_counter() - start,
    }


def format_table(result: dict[str, Any]) -> str:
    """The table that the command prints."""
    lines = [f"{'':<16}{'bytes':>10}{'smaller':>10}{'top-1 %':>10}"]
    for name in ("float", "plain rounding", "transquant"):
        row = result[name]
        ratio = result["float"]["file_bytes"] / row["file_bytes"]
        lines.append(f"{name:<16}{row['file_bytes']:>10,}{ratio:>9.1f}x{row['top1']:>10.2f}")
    lines.append(f"\nwrote {result['file']} and {result['curve']} in {result['seconds']:.0f} s")
    return "\n".join(lines)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 in per cent."""
    return 100 * float((model(images).argmax(1) == labels).float().mean())


def _decoded(model: nn.Module, compressed: CompressedModel) -> nn.Module:
    return compressed.install(copy.deepcopy(model))
