"""Speed of the parts: entropy coder, both readers, feedback pass, start of the command line.

    python benchmarks/speed.py               # about two minutes on two cores

A layer of 2048 x 2048 weights from a Laplace distribution, at four rates; every figure is that of the fastest of several runs
in one process. Where peers.py has made NNCodec's environment its speed is measured too, before and after ours; it decodes to
float tensors, as "load and state_dict" does. Writes benchmarks/speed.json and the table of docs/method.md.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import transquant as tq
from pages import insert_table
from transquant import bitstream, codec
from transquant.choices import CODERS
from transquant.container import read_container
from transquant.entropy.lanes import encode_planes
from transquant.quantizers.feedback import Rounding, quantize_feedback
from transquant.records import CodedEntry, CodedTensor

SIDE = 2048
SCALES = {"0.5 bits": 0.2, "1 bit": 0.32, "2 bits": 0.7, "4 bits": 2.9}
PEER = Path(__file__).resolve().parent / ".peers" / "nncodec" / "bin" / "python"


def best(task: Callable[[], object], runs: int = 3) -> float:
    """Seconds of the fastest of some runs, after one to warm up."""
    task()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        task()
        times.append(time.perf_counter() - start)
    return min(times)


def coder(symbols: np.ndarray, rate: str, kind: str) -> dict[str, float]:
    """Of one matrix: bits a weight, and rates in million weights a second; decoding to integers, loading to float32 tensors."""
    entry = CodedEntry("weight", symbols.shape, "float32", 0)
    tensor = CodedTensor(entry, symbols)

    def encode() -> bytes:
        parts = [(entry, tensor)]
        return bitstream.encode((2048, -20), parts, {}, lambda jobs: [encode_planes(*job) for job in jobs], CODERS[kind]).data

    data = encode()
    container = read_container(data)
    name = f"{kind}, {rate}"
    figures = {
        f"bits a weight, {name}": 8 * len(data) / symbols.size,
        f"encode, {name}, M weights/s": symbols.size / best(encode) / 1e6,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.tq"
        path.write_bytes(data)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seconds = best(lambda: codec._decode(container), 9), best(lambda: tq.load(path).state_dict(), 9)
            figures[f"decode, {name}, {threads} threads, M weights/s"] = symbols.size / seconds[0] / 1e6
            figures[f"load and state_dict, {name}, {threads} threads, M weights/s"] = symbols.size / seconds[1] / 1e6
        figures[f"numpy reader, {name}, M weights/s"] = symbols.size / best(lambda: tq.reader.load(path), 1) / 1e6
    return figures


def nncodec() -> dict[str, float]:
    """The peer on a matrix of the same kind, one thread, where peers.py has made its environment."""
    if not PEER.exists():
        return {}
    command = [str(PEER), str(PEER.parents[3] / "peer_tools" / "nncodec_speed.py"), str(SIDE)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    figures = {}
    for row in json.loads(done.stdout.splitlines()[-1]):
        name = f"NNCodec, qp {row['qp']}{', dependent' if row['dependent'] else ''}, {row['bits']:.2f} bits, M weights/s"
        figures |= {f"encode, {name}": row["encode"], f"decode, {name}": row["decode"]}
    return figures


def peer_speed(figures: dict[str, float], bits: float) -> float:
    """Decoded by NNCodec at so many bits a weight, M weights/s, on lines between its points: the faster of both of its ways."""
    points: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for name, speed in figures.items():
        if name.startswith("decode, NNCodec"):
            points["dependent" in name].append((float(name.split(", ")[-2].split()[0]), speed))
    return max(float(np.interp(bits, *zip(*sorted(p), strict=True))) for p in points.values())


def table(figures: dict[str, float]) -> str:
    """Decoding on one thread, as rows of a page."""
    rows = "| bits a weight | static over adaptive | adaptive | static | NNCodec | static / NNCodec "
    rows += "| static, to float tensors | … / NNCodec |\n"
    rows += "|---|---|---|---|---|---|---|---|\n"
    for rate in SCALES:
        bits, more = figures[f"bits a weight, static, {rate}"], figures[f"static over adaptive, {rate}, %"]
        speeds = [figures[f"decode, {kind}, {rate}, 1 threads, M weights/s"] for kind in ("adaptive", "static")]
        peer, load = peer_speed(figures, bits), figures[f"load and state_dict, static, {rate}, 1 threads, M weights/s"]
        rows += f"| {bits:.2f} | {more:+.1f} % | {speeds[0]:.0f} | {speeds[1]:.0f} | {peer:.0f} "
        rows += f"| {speeds[1] / peer:.1f} | {load:.0f} | {load / peer:.1f} |\n"
    return rows


def feedback(side: int, rng: np.random.Generator) -> float:
    """Seconds of one two-sided pass over a square layer."""
    lower = np.tril(rng.normal(size=(side, side)) * 0.3 / side**0.5, -1) + np.eye(side)
    weight, steps = rng.normal(size=(side, side)), np.full((side, side), 0.5)
    return best(lambda: quantize_feedback(weight, steps, lower, lower, Rounding()), 1)


def main() -> None:
    rng = np.random.default_rng(0)
    figures: dict[str, float] = {}
    threads = torch.get_num_threads()
    peer = nncodec()
    for rate, scale in SCALES.items():
        symbols = np.rint(rng.laplace(0, scale, (SIDE, SIDE))).astype(np.int32)
        for kind in CODERS:
            figures |= coder(symbols, rate, kind)
        sizes = [figures[f"bits a weight, {kind}, {rate}"] for kind in ("adaptive", "static")]
        figures[f"static over adaptive, {rate}, %"] = 100 * (sizes[1] / sizes[0] - 1)
    torch.set_num_threads(threads)
    figures |= {name: max(value, peer[name]) for name, value in nncodec().items()}
    for side in (1024, 4096):
        figures[f"two-sided feedback pass, {side} x {side}, s"] = feedback(side, rng)
    command = [sys.executable, "-m", "transquant", "--help"]
    figures["transquant --help, s"] = best(lambda: subprocess.run(command, check=True, capture_output=True), 5)
    machine = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    record = {"command": "python benchmarks/speed.py", "machine": machine, "figures": figures}
    Path(__file__).with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    if PEER.exists():
        insert_table("docs/method.md", "speed.py", table(figures))
    for name, value in figures.items():
        print(f"{name:<50} {value:8.3f}")


if __name__ == "__main__":
    main()
