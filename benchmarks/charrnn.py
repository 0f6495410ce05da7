"""The character network: bits a character against the size of the whole file, beside plain rounding.

    python benchmarks/charrnn.py

Calibrated on the first tenth of the text in rows of 400 characters (278 rows), scored once on 64 rows from its middle. In
both, the first 50 characters of a row do not count: the state begins at zero. Writes benchmarks/charrnn.json.
"""

from __future__ import annotations

import copy
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

import transquant as tq
from networks import after_warm_up, bits_per_character, characters, network

BITS = (4.0, 3.0, 2.5, 2.0, 1.5)


def run(bits: float, calibrated: bool) -> dict[str, Any]:
    """One row: the network at one size, with or without calibration."""
    model, scored = network("charrnn"), characters(0.5, 64)
    calibration = characters(0.0, last=0.1)[:, :-1] if calibrated else None
    start = time.perf_counter()
    options = {"output": after_warm_up} if calibrated else {"transform": "identity", "trellis": False}
    compressed = tq.compress(model, calibration, bits=bits, **options)
    seconds = time.perf_counter() - start
    decoded = compressed.install(copy.deepcopy(model))
    score, float_score = bits_per_character(decoded, scored), bits_per_character(model, scored)
    report = compressed.report
    return {
        "bits": bits, "method": "transquant" if calibrated else "plain", "file_bytes": report.file_bytes,
        "bits_per_character": score, "float": float_score, "more": score - float_score,
        "predicted": report.predicted_distortion, "measured": report.measured_distortion, "seconds": seconds,
        "choice": str(report.settings["choice"]),
    }  # fmt: skip


def main() -> None:
    rows = []
    for bits in BITS:
        for calibrated in (True, False):
            rows.append(run(bits, calibrated))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    content = {"command": "python benchmarks/charrnn.py", "machine": machine, "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    for row in rows:
        print(f"{row['method']:>10} {row['bits']:.1f} bits: {row['bits_per_character']:.4f} bits/char ({row['more']:+.4f})")


if __name__ == "__main__":
    main()
