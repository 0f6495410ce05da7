"""How far files lie above the rate–distortion function: random matrices, squared error, bytes of the whole file.

    python benchmarks/limit.py     # some minutes

A matrix of 1024 × 1024 independent entries, Gaussian, Laplacian or Student's t with 5 degrees of freedom, goes through the
public API without calibration, at 0.5, 1, 2 and 3 bits an entry, at default effort, at the highest, and with rounding alone.
The gap is the file's bits an entry less R(D) at the measured error: in closed form for the Gaussian, by Blahut and Arimoto's
algorithm on a fine grid for the others. Writes limit.json and the table in docs/method.md.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import transquant as tq
from pages import insert_table

SIDE = 1024
BITS = (0.5, 1.0, 2.0, 3.0)
WAYS: dict[str, dict[str, Any]] = {
    "trellis of 8 states": {"effort": 5}, "trellis of 64 states": {"effort": 9}, "rounding": {"trellis": False},
}  # fmt: skip
DOF = 5
Array = np.ndarray


def gaussian_rate(distortion: float) -> float:
    """R(D) in bits of a normal variable of variance 1."""
    return max(0.0, -0.5 * np.log2(distortion))


def laplacian(x: Array) -> Array:
    """Density of variance 1."""
    return np.exp(-np.sqrt(2) * np.abs(x)) / np.sqrt(2)


def student(x: Array) -> Array:
    """Density of variance 1, up to a factor."""
    return (1 + x**2 / (DOF - 2)) ** (-(DOF + 1) / 2)


def blahut_arimoto(density: Callable[[Array], Array]) -> Callable[[float], float]:
    """R(D) in bits by interpolation between points of its parametric form; grid spacing grows with the distance from 0."""
    x = 0.25 * np.sinh(np.linspace(-5.6, 5.6, 1001))  # ± 34 standard deviations, 0.003 apart at zero
    p = density(x) * np.gradient(x)
    p /= p.sum()
    points = []
    for slope in 2.0 ** np.arange(-1, 6, 0.5):
        kernel = np.exp(-slope * (x[:, None] - x[None, :]) ** 2)
        q = np.full(len(x), 1 / len(x))
        for _ in range(600):
            norm = np.maximum(kernel @ q, 1e-300)
            factor = kernel.T @ (p / norm)
            q = q * factor
            if np.abs(factor[q > 1e-7] - 1).max() < 1e-4:
                break
        q /= q.sum()
        norm = np.maximum(kernel @ q, 1e-300)
        joint = (p / norm)[:, None] * kernel * q[None, :]
        distortion = float((joint * (x[:, None] - x[None, :]) ** 2).sum())
        points.append((distortion, float(-slope * distortion - (p * np.log(norm)).sum()) / np.log(2)))
    points.sort()
    log_d, rates = np.log([d for d, _ in points]), [r for _, r in points]
    return lambda distortion: float(np.interp(np.log(distortion), log_d, rates))


def sources() -> dict[str, tuple[Array, Callable[[float], float]]]:
    """Samples of variance about 1, and R(D)."""
    rng = np.random.default_rng(0)
    shape = (SIDE, SIDE)
    t = rng.standard_t(DOF, shape) * np.sqrt((DOF - 2) / DOF)
    return {
        "Gaussian": (rng.normal(size=shape), gaussian_rate),
        "Laplacian": (rng.laplace(scale=np.sqrt(0.5), size=shape), blahut_arimoto(laplacian)),
        "Student's t, 5 degrees": (t, blahut_arimoto(student)),
    }


def run(name: str, values: Array, rate: Callable[[float], float], bits: float, way: str) -> dict[str, Any]:
    """One row."""
    weight = torch.from_numpy(values).float()
    start = time.perf_counter()
    file = tq.compress({"weight": weight}, bits=bits, transform="identity", **WAYS[way]).data
    seconds = time.perf_counter() - start
    error = tq.reader.loads(file)["weight"] - weight.numpy()
    distortion = float(np.mean(error.astype(np.float64) ** 2))
    spent = 8 * len(file) / weight.numel()
    return {
        "source": name, "bits": bits, "way": way, "spent": spent, "distortion": distortion,
        "gap": spent - rate(distortion), "seconds": seconds,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: gaps by source and rate."""
    lines = ["| bits above R(D) at | " + " | ".join(f"{b:g} bits" for b in BITS) + " |", "|---" + "|---" * len(BITS) + "|"]
    for name, way in dict.fromkeys((r["source"], r["way"]) for r in rows):
        gaps = [r["gap"] for r in rows if (r["source"], r["way"]) == (name, way)]
        lines.append(f"| {name}, {way} | " + " | ".join(f"{g:.3f}" for g in gaps) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = []
    for name, (values, rate) in sources().items():
        for way in WAYS:
            for bits in BITS:
                rows.append(run(name, values, rate, bits, way))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    content = {"command": "python benchmarks/limit.py", "machine": machine, "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    insert_table("docs/method.md", "limit.py", table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
