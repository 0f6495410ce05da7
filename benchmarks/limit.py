"""How far files lie above the rate–distortion function: random matrices, squared error, bytes of the whole file.

    python benchmarks/limit.py     # some minutes

A matrix of 1024 × 1024 independent entries, Gaussian, Laplacian or Student's t with 5 degrees of freedom, goes through the
public API without calibration, at 0.5, 1, 2 and 3 bits an entry, at default effort, at the highest, and with rounding alone.
The gap is the file's bits an entry less R(D) at the measured error: in closed form for the Gaussian, by Blahut and Arimoto's
algorithm on a fine grid for the others.

Then matrices of 512 × 512 independent Gaussian entries whose errors count by a metric G ⊗ A that only the encoder knows: random
eigenvectors, eigenvalues from 1 to a condition number, evenly spaced in their logarithm; at 2 bits. The gap is to reverse
water-filling, which would ask of the decoder to know the metric too. Of decoders that do not, the best has code words of
independent entries with one law; how far that lies above reverse water-filling is in the table. `Wiener targets` is an experiment:
the encoder is given (G ⊗ A + τ I)⁻¹ (G ⊗ A) W in the place of W, τ from the water level. Writes limit.json and the tables in
docs/method.md.
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
from transquant.allocation.steps import Grouping
from transquant.choices import Choice, Method
from transquant.encoder import Encoder, Source
from transquant.quantizers.metric import Damping
from transquant.records import LayerStats, Plan, Statistics, WeightSpec
from transquant.workers import workers

SIDE = 1024
BITS = (0.5, 1.0, 2.0, 3.0)
WAYS: dict[str, dict[str, Any]] = {
    "trellis of 8 states": {"effort": 5}, "trellis of 64 states": {"effort": 9}, "rounding": {"trellis": False},
}  # fmt: skip
DOF = 5
CONDITIONS = ((1.0, 1.0), (1e2, 1e2), (1e4, 1.0), (1e4, 1e4))  # of A and G
KNOWN_BITS, KNOWN_SIDE = 2.0, 512
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


def eigenvalues(condition: float) -> Array:
    """KNOWN_SIDE values from 1 to `condition`."""
    return condition ** np.linspace(0, 1, KNOWN_SIDE)


def water_filling(values: Array, distortion: float) -> float:
    """Rate in bits of unit normals with weights `values` at a mean weighted error."""
    low, high = -60.0, 60.0
    for _ in range(100):
        level = (low + high) / 2
        low, high = (low, level) if np.minimum(values, 2**level).mean() > distortion else (level, high)
    return float(np.maximum(0, 0.5 * np.log2(values / 2**low)).mean())


def ignorant(values: Array, rate: float) -> float:
    """Bits above reverse water-filling of the best code whose words have independent normal entries of one variance: the entry of
    weight h costs E[−log2 Z], Z the mean of exp(−s h e²) over the code, at its best slope s and variance v."""
    found = []
    for v in np.linspace(0.6, 1.2, 25):
        low, high = -60.0, 60.0
        for _ in range(60):
            s = 2 ** ((low + high) / 2)
            u = 2 * s * values * v
            r = float((0.5 * np.log2(1 + u) + 0.5 / np.log(2) * u / (1 + u) * (u / (1 + u) / v - 1)).mean())
            low, high = (low, np.log2(s)) if r > rate else (np.log2(s), high)
        found.append(r - water_filling(values, float((values * (1 / (1 + u) ** 2 + v / (1 + u))).mean())))
    return min(found)


def known_metric(
    condition_in: float, condition_out: float, filtered: bool, state_bits: int, dampings: tuple[float, ...] = (1.0, 3.0, 10.0)
) -> dict[str, Any]:
    """One row: at 2 bits, of dampings the best."""
    rng = np.random.default_rng(1)
    weight, sides = rng.normal(size=(KNOWN_SIDE, KNOWN_SIDE)), []
    for condition in (condition_in, condition_out):
        basis = np.linalg.qr(rng.normal(size=(KNOWN_SIDE, KNOWN_SIDE)))[0] if condition > 1 else np.eye(KNOWN_SIDE)
        sides.append((eigenvalues(condition), basis))
    (a, q_a), (g, q_g) = sides
    layer = LayerStats(((q_a * a) @ q_a.T)[None], ((q_g * g) @ q_g.T)[None], 1, 1.0, 0.0)
    spec = WeightSpec("weight", None, "linear", weight.shape, "float32")
    plan = Plan((spec,), weight.size, 4 * weight.size)
    energy = np.outer(g, a)
    start = time.perf_counter()
    rows = []
    with workers() as pool:
        for noise in dampings:
            choice = Choice(Damping(0.0, 0.0, noise), Grouping("rc", 1.0))

            def at(c: float, choice: Choice = choice) -> tuple[float, float]:
                level = c * c / 12
                target = weight
                if filtered:
                    target = q_g @ ((q_g.T @ weight @ q_a) * (energy / (energy + 1.5 * level))) @ q_a.T
                source = Source({"weight": target}, {})
                encoder = Encoder(plan, source, Statistics({"weight": layer}, {}, "mse", 1), pool, Method(state_bits=state_bits))
                draft = encoder.draft(c, choice)
                error = weight - draft.state()["weight"].double().numpy()
                weighted = float(((q_g.T @ error @ q_a) ** 2 * energy).mean())
                return 8 * len(encoder.encode(draft).data) / weight.size, weighted

            low, high = -4.0, 16.0
            for _ in range(8):
                c = (low + high) / 2
                spent, distortion = at(2**c)
                low, high = (c, high) if spent > KNOWN_BITS else (low, c)
            rows.append((spent - water_filling(energy, distortion), spent, noise))
    gap, spent, noise = min(rows)
    return {
        "condition": [condition_in, condition_out], "filtered": filtered, "states": 1 << state_bits, "spent": spent, "gap": gap,
        "damping": noise, "ignorant": ignorant(energy, KNOWN_BITS), "seconds": time.perf_counter() - start,
    }  # fmt: skip


def known_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    ways = list(dict.fromkeys((r["states"], r["filtered"]) for r in rows))
    heads = [f"{states} states{', Wiener targets' if filtered else ''}" for states, filtered in ways]
    lines = [f"| bits above reverse water-filling at {KNOWN_BITS:g} bits | no decoder below | " + " | ".join(heads) + " |"]
    lines.append("|---" * (len(ways) + 2) + "|")
    for condition in dict.fromkeys(tuple(r["condition"]) for r in rows):
        mine = {(r["states"], r["filtered"]): r for r in rows if tuple(r["condition"]) == condition}
        gaps = [f"{mine[way]['gap']:.3f}" if way in mine else "–" for way in ways]
        bound = next(iter(mine.values()))["ignorant"]
        lines.append(f"| condition {condition[0]:g} of A, {condition[1]:g} of G | {bound:.3f} | " + " | ".join(gaps) + " |")
    return "\n".join(lines) + "\n"


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
    known = []
    for conditions in CONDITIONS:
        dampings: tuple[float, ...] = (1.0, 3.0, 10.0)
        for filtered, state_bits in ((False, 3), (True, 3), (True, 6)):
            known.append(known_metric(*conditions, filtered, state_bits, dampings))
            print(json.dumps(known[-1]), file=sys.stderr, flush=True)
            if filtered:
                dampings = (known[-1]["damping"],)
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    content = {"command": "python benchmarks/limit.py", "machine": machine, "rows": rows, "known metric": known}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    insert_table("docs/method.md", "limit.py", table(rows) + "\n" + known_table(known))
    print(table(rows))


if __name__ == "__main__":
    main()
