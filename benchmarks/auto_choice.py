"""What the choice of transforms is worth: bytes of "auto" over bytes of forced identity at equal predicted distortion.

    python benchmarks/auto_choice.py               # about half an hour on two cores; resumes where it stopped
    python benchmarks/auto_choice.py squeezenet    # one network

For each network and rate: a file without transforms of that many bits a parameter, with its predicted distortion; the
transforms are chosen at its scalar c; then the file with transforms of the same predicted distortion (within 0.02 %, the rest by
the slope of the rate). Default damping and groups, nothing tuned, no test data. The report's gains,
bits a value at equal distortion, add up to "reported". Writes auto_choice.json and the table in docs/transforms.md.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Iterator
from math import log, log2
from pathlib import Path
from typing import Any

import torch

from main_job import TITLES, folds
from networks import after_warm_up, characters, network
from pages import insert_table
from transquant import codec, modules
from transquant.allocation.search import Closest, meet_size
from transquant.choices import Choice, Method
from transquant.encoder import Draft, Encoder, Source
from transquant.transform_choice import choose_transforms, transforms_of
from transquant.workers import workers

NETWORKS = ("charrnn", "resnet20", "squeezenet", "mobilenet")
STATES = codec.STATE_BITS
BITS = (1.0, 1.5, 2.0, 3.0, 4.0)
EQUAL = 2e-4  # natural logarithm of a ratio of distortions
Row = dict[str, Any]


def run(name: str, known: Callable[[float], bool]) -> Iterator[Row]:
    """The rows of a network that are not known yet."""
    model, choice = network(name), Choice()
    text = name == "charrnn"
    calibration = characters(0.0, last=0.1)[:, :-1] if text else folds(name)[0][0]
    module, state, plan = codec._open(model, None)
    source = Source(*modules.gather(plan, state))
    with workers() as pool:
        output = after_warm_up if text else None
        stats, _ = codec._calibrate(module, calibration, plan, source, "auto", None, output, 0, pool, lambda *_: None)
        identity = Encoder(plan, source, stats, pool, Method("identity", state_bits=STATES))
        for bits in BITS:
            if known(bits):
                continue
            without = of_size(identity, choice, bits * plan.num_parameters / 8)
            size = len(identity.encode(without).data)
            auto = Encoder(plan, source, stats, pool, Method("auto", state_bits=STATES))
            chosen = choose_transforms(auto, without.c, choice, auto)
            auto = auto.transformed(transforms_of(chosen))
            equal = of_distortion(auto, choice, without)
            reported = sum(t.gain * source.values[layer].size for layer, t in chosen.items()) / 8
            kinds = [f"{t.transform.kind}{t.transform.axis}" for t in chosen.values()]
            yield {
                "network": name, "bits": bits, "identity_bytes": size, "auto_bytes": equal, "ratio": equal / size,
                "reported_ratio": 1 - reported / size, "predicted": without.predicted,
                "transforms": {k: kinds.count(k) for k in sorted(set(kinds))},
            }  # fmt: skip


def of_size(encoder: Encoder, choice: Choice, target: float) -> Draft:
    """The draft of a size, within half a per cent."""
    closest: Closest[Draft] = Closest(target)

    def size_of(c: float) -> float:
        draft = encoder.draft(c, choice)
        return closest.offer(draft, len(encoder.encode(draft).data))

    meet_size(size_of, target, 0.005 * target, encoder.first_guess(target), encoder.plan.num_parameters / 10)
    assert closest.item is not None
    return closest.item


def of_distortion(encoder: Encoder, choice: Choice, other: Draft) -> float:
    """Bytes at the predicted distortion of another draft: between the two nearest drafts, bytes are linear in log D."""
    points: list[tuple[float, float]] = []  # log D over the other's, bytes
    x = log2(other.c)
    for _ in range(8):
        draft = encoder.draft(2.0**x, choice)
        off = log(draft.predicted / other.predicted)
        points.append((off, len(encoder.encode(draft).data)))
        if abs(off) < EQUAL and len(points) > 1:
            break
        x -= 0.5 * off / log(2) if abs(off) > EQUAL else 0.01
    (a, size_a), (b, size_b) = sorted(points, key=lambda p: abs(p[0]))[:2]
    return size_a if a == b else size_a - a * (size_b - size_a) / (b - a)


def table(rows: list[Row]) -> str:
    """Markdown: ratios of bytes by network and rate."""
    lines = ["| auto / identity, bytes | " + " | ".join(f"{b:g} bits" for b in BITS) + " |", "|---" + "|---" * len(BITS) + "|"]
    for name in dict.fromkeys(r["network"] for r in rows):
        cells = [f"{r['ratio']:.3f}" for b in BITS for r in rows if (r["network"], r["bits"]) == (name, b)]
        lines.append(f"| {({**TITLES, 'charrnn': 'character LSTM'})[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    path = Path(__file__).with_suffix(".json")
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    for name in sys.argv[1:] or NETWORKS:
        done = {r["bits"] for r in rows if r["network"] == name}
        for row in run(name, done.__contains__):
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            path.write_text(
                json.dumps({"command": "python benchmarks/auto_choice.py", "machine": machine, "rows": rows}, indent=1) + "\n"
            )
    insert_table("docs/transforms.md", "auto_choice.py", table(rows))


if __name__ == "__main__":
    main()
