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
from transquant.errors import InputError
from transquant.plots import write_curve

COLUMNS = ("bits", "file_bytes", "bits_per_parameter", "predicted_distortion", "measured_distortion", "top1")


def sweep_rates(
    model: Any, calibration: Data | None, test: Data | None, rates: Sequence[float], metric: str, effort: int, seed: int,
    output: Path, resume: bool, progress: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of the curve, written as CSV after every rate, so that an interruption keeps what is done; then as a picture.

    With `resume`, rows that the CSV has are kept. Raises InputError where it is the CSV of something else."""
    done = _read(output) if resume and output.exists() else {}
    rows: list[dict[str, Any]] = []
    batches = list(calibration.batches) if calibration else None
    for number, bits in enumerate(rates):
        progress("rates", number, len(rates))
        rows.append(done.get(bits) or _row(model, batches, test, bits, metric, effort, seed))
        kept = [row for rate, row in done.items() if rate not in rates]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*rows, *kept], key=lambda row: row["bits"]))
        write_file(output, text.getvalue().encode())
    progress("rates", len(rates), len(rates))
    key, label = ("top1", "top-1 accuracy (%)") if rows[0]["top1"] is not None else ("measured_distortion", "output distortion")
    if rows[0][key] is None:
        key = "predicted_distortion"
    curve = [(r["bits_per_parameter"], r[key]) for r in [*rows, *kept]]
    write_curve(output.with_suffix(".png"), {"transquant": curve}, label)
    return rows


def _row(
    model: Any, batches: list[Any] | None, test: Data | None, bits: float, metric: str, effort: int, seed: int
) -> dict[str, Any]:
    compressed = compress(model, batches, bits=bits, metric=metric, effort=effort, seed=seed)
    report = compressed.report
    score = None
    if test is not None and isinstance(model, nn.Module):
        score = top1(outputs(compressed.install(copy.deepcopy(model)), test), test)
    values = (report.bits_per_parameter, report.predicted_distortion, report.measured_distortion, score)
    return {"bits": bits, "file_bytes": report.file_bytes, **dict(zip(COLUMNS[2:], values, strict=True))}


def _read(path: Path) -> dict[float, dict[str, Any]]:
    """Rows of a CSV that an earlier sweep wrote, by rate."""
    complaint = InputError(f"{path} is not the CSV of an earlier sweep")
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = [{k: float(v) if v else None for k, v in row.items()} for row in reader]
    except (OSError, ValueError, TypeError):
        raise complaint from None
    if tuple(reader.fieldnames or ()) != COLUMNS or any(not r["bits"] or not r["file_bytes"] for r in rows):
        raise complaint
    return {float(r["bits"]): {**r, "file_bytes": int(r["file_bytes"])} for r in rows if r["bits"] and r["file_bytes"]}
