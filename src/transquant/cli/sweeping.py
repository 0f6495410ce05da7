"""The rate–distortion curve: one compression a rate, a CSV, a picture."""

from __future__ import annotations

import copy
import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from transquant.cli.calibration import Data
from transquant.cli.scoring import outputs, top1
from transquant.codec import compress
from transquant.container import write_file
from transquant.plots import write_curve

COLUMNS = ("bits", "file_bytes", "bits_per_parameter", "predicted_distortion", "measured_distortion", "top1")


def sweep_rates(
    model: Any, calibration: Data | None, test: Data | None, rates: Sequence[float], metric: str, effort: int, seed: int,
    output: Path, progress: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of the curve, written as CSV and picture after every rate, so that an interruption keeps what is done."""
    rows: list[dict[str, Any]] = []
    batches = list(calibration.batches) if calibration else None
    for number, bits in enumerate(rates):
        progress("rates", number, len(rates))
        compressed = compress(model, batches, bits=bits, metric=metric, effort=effort, seed=seed)
        report = compressed.report
        row: dict[str, Any] = {
            "bits": bits,
            "file_bytes": report.file_bytes,
            "bits_per_parameter": report.bits_per_parameter,
        }
        row["predicted_distortion"], row["measured_distortion"] = (
            report.predicted_distortion,
            report.measured_distortion,
        )
        row["top1"] = None
        if test is not None and isinstance(model, nn.Module):
            row["top1"] = top1(outputs(compressed.install(copy.deepcopy(model)), test), test)
        rows.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_file(output, text.getvalue().encode())
    progress("rates", len(rates), len(rates))
    key, label = ("top1", "top-1 accuracy (%)") if rows[0]["top1"] is not None else ("measured_distortion", "output distortion")
    if rows[0][key] is None:
        key = "predicted_distortion"
    curve = [(r["bits_per_parameter"], r[key]) for r in rows]
    write_curve(output.with_suffix(".png"), {"transquant": curve}, label)
    return rows
