"""Bytes against score on four real networks, beside NNCodec (ISO/IEC 15938-17), Brevitas' GPTQ and plain rounding.

    python benchmarks/peers.py                                    # everything; resumes where it stopped
    python benchmarks/peers.py --networks resnet20 --methods ours --fresh    # again, these only

Every method's decoded float32 weights are scored in the same way, in this process. NNCodec 2.1.3 and Brevitas run in
environments of their own (made in benchmarks/.peers on first use; NNCodec needs a C++ compiler). NNCodec: qp swept, with and
without dependent quantization, the better of both at every score; BatchNorm is given to it as scale and shift, two vectors
instead of four. Brevitas: GPTQ and bias correction, integer bits a weight; it writes no small file, its bytes are counted,
and it has no GPTQ for recurrent layers, so not for the character network.
ResNet-20: calibrated on 2,048 training images, scored on all test images. SqueezeNet and MobileNetV1: ours is calibrated on
one half of the sample and scored on the other, both ways, the mean of both; methods without calibration are scored on
all of it, Brevitas one way only. Character network: calibrated on the first tenth of the text, scored on 64 rows from its middle.
"best" is ours at effort 9, as in main_job.py: rows that are in main_job.json are taken from there, others made in the same way; the
character network is then calibrated on 2,048 rows from all of the text but its middle.
Writes peers.json, peers.csv, docs/peers.md's tables and docs/peers.png.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import transquant as tq
from main_job import BEST, folds, measured, run, score
from networks import after_warm_up, bits_per_character, characters, logits, network
from peers_tables import publish
from transquant.modules import gather, plan_model
from transquant.records import BatchNormSpec

HERE = Path(__file__).resolve().parent
FOLDER = HERE / ".peers"
NNCODEC, BREVITAS = "nncodec==2.1.3", "brevitas==0.13.4"
QPS = {
    "resnet20": (-40, -36, -32, -30, *range(-28, -3)), "squeezenet": range(-44, -15), "mobilenet": range(-46, -24),
    "charrnn": range(-40, -8),
}  # fine to coarse, around the scores that are compared  # fmt: skip
BITS = {
    "resnet20": (0.6, 0.7, 0.85, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5),
    "squeezenet": (1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.75),
    "mobilenet": (2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0, 4.5),
    "charrnn": (1.0, 1.25, 1.5, 2.0, 2.5, 3.0),
}
BEST_BITS = {
    "resnet20": (0.5, 0.7, 1.0, 1.25, 1.5, 2.0, 3.0), "squeezenet": (1.25, 1.5, 2.0, 2.5, 3.0),
    "mobilenet": (2.0, 2.5, 3.0, 3.5, 4.0), "charrnn": (1.0, 1.25, 1.5, 2.0, 2.5, 3.0),
}  # fmt: skip
PLAIN = {
    "resnet20": (2.0, 2.5, 3.0, 3.5, 4.0), "squeezenet": (2.5, 3.0, 3.5, 4.0, 5.0, 6.0),
    "mobilenet": (5.0, 5.5, 6.0, 7.0, 8.0), "charrnn": (2.5, 3.0, 3.5, 4.0, 5.0, 6.0),
}  # fmt: skip
GPTQ = {"resnet20": (2, 3, 4, 5), "squeezenet": (3, 4, 5, 6), "mobilenet": (4, 5, 6, 8)}
LARGEST_DROP = {"charrnn": 0.4}  # in bits a character; in points elsewhere, 13
Row = dict[str, Any]


class Task:
    """One network with its data: what to calibrate on, and how far a decoded network is from the float one."""

    def __init__(self, name: str) -> None:
        self.name, self.model = name, network(name)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        if name == "charrnn":
            self.rows = characters(0.5, 64)
            self.float = bits_per_character(self.model, self.rows)
            self.calibration = [characters(0.0, last=0.1)[:, :-1]]
            self.reference = after_warm_up(logits(self.model, self.rows[:, :-1], 64)).flatten(0, 1)
        else:
            data = folds(name)
            self.calibration = [c for c, _, _ in data]
            self.images, self.labels = [i for _, i, _ in data], [y for _, _, y in data]
            self.references = [logits(self.model, i, 100) for i in self.images]

    def compress(self, fold: int | None, bits: float) -> bytes:
        """A file of ours; `fold` None without calibration."""
        output = after_warm_up if self.name == "charrnn" else None
        return tq.compress(self.model, None if fold is None else self.calibration[fold], bits=bits, output=output).data

    def score(self, networks: list[nn.Module], first_fold: bool = False) -> dict[str, float]:
        """Drop (points; bits a character) with its standard error, and KL in nats; one network a fold, or one for all."""
        if self.name == "charrnn":
            output = after_warm_up(logits(networks[0], self.rows[:, :-1], 64)).flatten(0, 1)
            log_p, log_q = self.reference.log_softmax(1), output.log_softmax(1)
            kl = (log_p.exp() * (log_p - log_q)).sum(1).mean().item()
            return {"drop": bits_per_character(networks[0], self.rows) - self.float, "standard_error": 0.0, "kl": kl}
        folds = list(zip(self.references, self.images, self.labels, strict=True))
        parts = [
            score(networks[min(k, len(networks) - 1)], reference, images, labels)
            for k, (reference, images, labels) in enumerate(folds[:1] if first_fold else folds)
        ]
        drop: Tensor = torch.cat([d for d, _ in parts])
        return {
            "drop": 100 * drop.mean().item(), "standard_error": 100 * drop.std().item() / len(drop) ** 0.5,
            "kl": sum(k for _, k in parts) / len(parts),
        }  # fmt: skip


def ours(task: Task, known: Callable[[str], bool]) -> Iterator[Row]:
    """Our files at several sizes, calibrated."""
    for bits in BITS[task.name]:
        if known(f"{bits:g} bits"):
            continue
        start = time.perf_counter()
        files = [task.compress(k, bits) for k in range(len(task.calibration))]
        seconds = (time.perf_counter() - start) / len(files)
        yield _row(f"{bits:g} bits", [len(f) for f in files], task.score([_installed(task, f) for f in files]), seconds)


def best(task: Task, known: Callable[[str], bool]) -> Iterator[Row]:
    """Our files with everything spent: the main job's rows, and the same job at sizes that it has not."""
    there = {row["bits"]: row for row in measured() if (row["network"], row["effort"]) == (task.name, BEST)}
    for bits in BEST_BITS[task.name]:
        if not known(f"{bits:g} bits"):
            row = there.get(bits) or run(task.name, bits, BEST, folds(task.name))
            scores = {key: row[key] for key in ("drop", "standard_error", "kl")}
            yield _row(f"{bits:g} bits", [row["file_bytes"]], scores, row["seconds"])


def plain(task: Task, known: Callable[[str], bool]) -> Iterator[Row]:
    """Rounding to nearest, one step for all weights, in our format."""
    for bits in PLAIN[task.name]:
        if not known(f"{bits:g} bits"):
            start = time.perf_counter()
            state = tq.compress(task.model.state_dict(), bits=bits, transform="identity", trellis=False).data
            yield _row(f"{bits:g} bits", [len(state)], task.score([_installed(task, state)]), time.perf_counter() - start)


def nncodec(task: Task, known: Callable[[str], bool]) -> Iterator[Row]:
    """NNCodec from fine to coarse, until the score is far below what is compared."""
    folder = FOLDER / task.name
    folder.mkdir(parents=True, exist_ok=True)
    plan = plan_model(task.model)
    values, _ = gather(plan, task.model.state_dict())
    norms = {s.name: s for s in plan.specs if isinstance(s, BatchNormSpec)}
    shapes = {k: v.shape for k, v in task.model.state_dict().items()}
    weights = {k.replace(".scale", ".weight").replace(".shift", ".bias") if k.rpartition(".")[0] in norms else k: v
               for k, v in values.items()}  # fmt: skip
    np.savez(folder / "weights.npz", **{k: v.reshape(shapes[k]).astype(np.float32) for k, v in weights.items()})
    for dependent in (True, False):
        for qp in QPS[task.name]:
            setting = f"qp {qp}, {'dependent' if dependent else 'scalar'}"
            if known(setting):
                continue
            stem = folder / f"{qp}_{int(dependent)}"
            start = time.perf_counter()
            if not stem.with_suffix(".npz").exists():
                _run_nncodec(folder, [(q, dependent) for q in QPS[task.name] if q >= qp])
            seconds = time.perf_counter() - start
            decoded = dict(np.load(stem.with_suffix(".npz")))
            state = {k: torch.from_numpy(v).reshape(shapes[k]) for k, v in decoded.items()}
            for name, norm in norms.items():
                state[f"{name}.running_mean"] = torch.zeros(norm.channels)
                state[f"{name}.running_var"] = torch.full((norm.channels,), 1 - norm.eps)
            twin = copy.deepcopy(task.model)
            missing = twin.load_state_dict(state, strict=False)
            assert not missing.unexpected_keys
            assert all("num_batches" in k for k in missing.missing_keys), missing
            row = _row(setting, [stem.with_suffix(".nnc").stat().st_size], task.score([twin]), seconds)
            yield row
            if row["drop"] > LARGEST_DROP.get(task.name, 13.0):
                break


def _run_nncodec(folder: Path, settings: list[tuple[int, bool]]) -> None:
    tool = HERE / "peer_tools" / "nncodec_files.py"
    command = [_python("nncodec", NNCODEC), str(tool), str(folder / "weights.npz"), str(folder), json.dumps(settings)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def brevitas(task: Task, known: Callable[[str], bool]) -> Iterator[Row]:
    """Brevitas' GPTQ, calibrated as ours is on the first fold."""
    widths = [b for b in GPTQ.get(task.name, ()) if not known(f"{b} bits")]
    folder = FOLDER / task.name
    folder.mkdir(parents=True, exist_ok=True)
    for bits in widths:
        stem = folder / f"brevitas_{bits}"
        start = time.perf_counter()
        if not stem.with_suffix(".json").exists():
            np.save(folder / "images.npy", task.calibration[0].numpy())
            tool = HERE / "peer_tools" / "brevitas_gptq.py"
            command = [_python("brevitas", BREVITAS, "pillow", "safetensors"), str(tool), task.name, str(folder / "images.npy")]
            subprocess.run([*command, str(folder), json.dumps([bits])], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        twin = copy.deepcopy(task.model)
        for key, value in np.load(stem.with_suffix(".npz")).items():
            layer, _, attribute = key.rpartition(".")
            setattr(twin.get_submodule(layer), attribute, nn.Parameter(torch.from_numpy(value)))
        size = json.loads(stem.with_suffix(".json").read_text())["bytes"]
        yield _row(f"{bits} bits", [size], task.score([twin], first_fold=True), seconds)


def _python(name: str, *packages: str) -> str:
    """The interpreter of a peer's own environment, made on first use."""
    python = FOLDER / name / "bin" / "python"
    if not python.exists():
        print(f"setting up {name} (some minutes)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER / name)], check=True)
        torch_version = f"torch=={torch.__version__.partition('+')[0]}"
        subprocess.run([str(python), "-m", "pip", "install", "-q", torch_version, *packages], check=True)
    return str(python)


def _installed(task: Task, file: bytes) -> nn.Module:
    state = {k: torch.from_numpy(np.array(v)) for k, v in tq.reader.loads(file).items()}
    twin = copy.deepcopy(task.model)
    twin.load_state_dict(state)
    return twin


def _row(setting: str, sizes: Sequence[float], scores: dict[str, float], seconds: float) -> Row:
    return {"setting": setting, "bytes": sum(sizes) / len(sizes), **scores, "seconds": seconds}


METHODS: dict[str, Callable[[Task, Callable[[str], bool]], Iterator[Row]]] = {
    "nncodec": nncodec, "ours": ours, "best": best, "plain": plain, "brevitas": brevitas,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(BITS), choices=list(BITS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--fresh", action="store_true", help="forget these methods' earlier points on these networks")
    options = parser.parse_args()
    path = HERE / "peers.json"
    record = json.loads(path.read_text()) if path.exists() else {"rows": []}
    rows: list[Row] = record["rows"]
    if options.fresh:
        rows = [r for r in rows if not (r["network"] in options.networks and r["method"] in options.methods)]
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    for name in options.networks:
        task = Task(name)
        for method in options.methods:
            done = {r["setting"] for r in rows if (r["network"], r["method"]) == (name, method)}
            for row in METHODS[method](task, done.__contains__):
                rows.append({"network": name, "method": method, "parameters": task.parameters, **row})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                record = {"command": "python benchmarks/peers.py", "peers": [NNCODEC, BREVITAS], "machine": machine, "rows": rows}
                path.write_text(json.dumps(record, indent=1) + "\n")
    with (HERE / "peers.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    publish(rows)


if __name__ == "__main__":
    main()
