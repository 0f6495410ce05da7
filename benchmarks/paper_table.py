"""The core paper's table on our networks: transform × coding × loop, forced everywhere, bases counted and not.

    python benchmarks/paper_table.py             # everything, about an hour on two cores; resumes where it stopped
    python benchmarks/paper_table.py resnet20    # one network

Identity, KLT and ELT over the input channels (the paper's main setting), fixed-length codes with integer depths or entropy-
coded steps, each coefficient rounded on its own (as published) or with feedback. Each at 1 … 4 bits a parameter of the
*whole file*; a second table compares at equal rate with the bases left out of the count. One damping for all,
nothing tuned. ResNet-20: 2,048 training images, scored on all test images. SqueezeNet and
MobileNetV1: calibrated on one half of the sample, scored on the other. Writes paper_table.json, docs/transforms.md's table and
docs/transforms.png.
"""

from __future__ import annotations

import copy
import json
import platform
import sys
from collections.abc import Iterator
from itertools import pairwise, product
from math import exp, log
from pathlib import Path
from typing import Any

import torch
from torch import nn

from main_job import TITLES, folds, score
from networks import logits, network
from pages import ROOT, insert_table
from transquant import codec, modules
from transquant.allocation.search import Closest, meet_size
from transquant.choices import Choice, Method
from transquant.encoder import Draft, Encoder, Source
from transquant.transform_choice import choose_transforms, transforms_of
from transquant.workers import workers

NETWORKS = ("resnet20", "squeezenet", "mobilenet")
BITS = (1.0, 1.5, 2.0, 3.0, 4.0)
TRANSFORMS, CODINGS, LOOPS = ("identity", "klt", "elt"), ("fixed", "entropy"), (False, True)
AXIS = "input"


def points() -> Iterator[tuple[str, str, bool, float]]:
    """(transform, coding, feedback, bits)."""
    for bits, coding, feedback, transform in product(BITS, CODINGS, LOOPS, TRANSFORMS):
        yield transform, coding, feedback, bits


def best_draft(encoder: Encoder, choice: Choice, target: float) -> tuple[Draft, int, int]:
    """The draft that comes closest to a size from below, its file's bytes and those of its bases."""
    sizes: dict[float, tuple[int, int]] = {}
    closest: Closest[Draft] = Closest(target)

    def size_of(c: float) -> float:
        draft = encoder.draft(c, choice)
        file = encoder.encode(draft)
        sizes[draft.c] = len(file.data), round(sum(b.basis for b in file.bits.values()) / 8)
        return closest.offer(draft, len(file.data))

    meet_size(size_of, target, 0.01 * target, encoder.first_guess(target), encoder.plan.num_parameters / 10, max_steps=14)
    assert closest.item is not None
    return closest.item, *sizes[closest.item.c]


def run(name: str, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """The rows of a network that are not done yet."""
    left = [p for p in points() if (name, *p) not in done]
    if not left:
        return
    model = network(name)
    calibration, images, labels = folds(name)[0]
    reference = logits(model, images, 100)
    module, state, plan = codec._open(model, None)
    source = Source(*modules.gather(plan, state))
    choice = Choice()
    with workers() as pool:
        stats, _ = codec._calibrate(module, calibration, plan, source, "auto", None, None, 0, pool, lambda *_: None)
        for transform, coding, feedback, bits in left:
            encoder = Encoder(plan, source, stats, pool, Method(transform, AXIS, coding, feedback))
            chosen = choose_transforms(encoder, encoder.first_guess(bits * plan.num_parameters / 8), choice, encoder)
            encoder = encoder.transformed(transforms_of(chosen))
            draft, size, basis = best_draft(encoder, choice, bits * plan.num_parameters / 8)
            torch.set_num_threads(pool.count)
            drop, kl = score(installed(model, draft), reference, images, labels)
            torch.set_num_threads(1)
            yield {
                "network": name, "transform": transform, "coding": coding, "feedback": feedback, "bits": bits,
                "file_bytes": size, "basis_bytes": basis, "bits_per_parameter": 8 * size / plan.num_parameters,
                "without_basis": 8 * (size - basis) / plan.num_parameters,
                "float": 100 * (reference.argmax(1) == labels).float().mean().item(),
                "drop": 100 * drop.mean().item(), "standard_error": 100 * drop.std().item() / len(drop) ** 0.5, "kl": kl,
            }  # fmt: skip


def installed(model: nn.Module, draft: Draft) -> nn.Module:
    """A copy of the model with a draft's weights."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(draft.state(), strict=False)
    return twin


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: top-1 and KL at equal size of the whole file, then KL at equal rate without the bases."""
    lines = []
    for name in dict.fromkeys(r["network"] for r in rows):
        mine = [r for r in rows if r["network"] == name]
        lines += [
            f"**{TITLES[name]}** (float {mine[0]['float']:.2f} %), whole file: top-1 in %, KL in nats, bases in % of the file",
            "",
        ]
        lines += _head("coding | loop | transform")
        for coding, feedback, transform in product(CODINGS, LOOPS, TRANSFORMS):
            cells = [_cell(r) for b in BITS for r in mine if key(r)[1:] == (transform, coding, feedback, b)]
            lines.append(f"| {coding} | {_loop(feedback)} | {transform} | " + " | ".join(cells) + " |")
        lines += ["", f"**{TITLES[name]}**, bases not counted: KL in nats, interpolated", "", *_head("coding | loop | transform")]
        for coding, feedback, transform in product(CODINGS, LOOPS, TRANSFORMS):
            own = sorted((r["without_basis"], log(r["kl"])) for r in mine if key(r)[1:4] == (transform, coding, feedback))
            values = [_interpolated(own, bits) for bits in BITS]
            cells = ["–" if v is None else f"{exp(v):.4f}" for v in values]
            lines.append(f"| {coding} | {_loop(feedback)} | {transform} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _head(first: str) -> list[str]:
    return [f"| {first} | " + " | ".join(f"{b:g} bits" for b in BITS) + " |", "|" + "---|" * (first.count("|") + 1 + len(BITS))]


def _cell(row: dict[str, Any]) -> str:
    basis = f" · {100 * row['basis_bytes'] / row['file_bytes']:.0f} %" if row["basis_bytes"] else ""
    return f"{row['float'] - row['drop']:.1f} · {row['kl']:.3f}{basis}"


def _loop(feedback: bool) -> str:
    return "closed" if feedback else "open"


def _interpolated(points: list[tuple[float, float]], x: float) -> float | None:
    """The value at x on the line through the points around it; a file a little below its size still counts for it."""
    if points and 0 < x - points[-1][0] < 0.02 * x:
        return points[-1][1]
    for (left, low), (right, high) in pairwise(points):
        if left <= x <= right:
            return low + (high - low) * (x - left) / (right - left)
    return None


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is about."""
    return row["network"], row["transform"], row["coding"], row["feedback"], row["bits"]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Panels (coding × loop) of KL against bits a parameter; solid the whole file, dotted without the bases."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r["network"] for r in rows))
    figure = Figure(figsize=(12.5, 3.4 * len(names)), dpi=110, layout="constrained")
    panels = figure.subplots(len(names), 4, sharex=True, sharey="row", squeeze=False)
    for line, name in zip(panels, names, strict=True):
        for axes, (coding, feedback) in zip(line, product(CODINGS, LOOPS), strict=True):
            for transform, color in zip(TRANSFORMS, ("tab:gray", "tab:orange", "tab:blue"), strict=True):
                own = [r for r in rows if key(r)[:4] == (name, transform, coding, feedback)]
                for rate, style in (("bits_per_parameter", "o-"), ("without_basis", ":")):
                    if own and (rate == "bits_per_parameter" or transform != "identity"):
                        label = transform + ("" if style == "o-" else ", basis not counted")
                        line_points = sorted((r[rate], r["kl"]) for r in own)
                        axes.plot(*zip(*line_points, strict=True), style, color=color, label=label, markersize=3)
            axes.set_yscale("log")
            axes.grid(True, alpha=0.3)
            axes.set_title(f"{TITLES[name]}: {coding}, {_loop(feedback)} loop", fontsize=9)
        line[0].set_ylabel("KL to float, nats")
    for axes in panels[-1]:
        axes.set_xlabel("bits a parameter")
    panels[0, 0].legend(fontsize=7)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    path = Path(__file__).with_suffix(".json")
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    for name in sys.argv[1:] or NETWORKS:
        for row in run(name, {key(r) for r in rows}):
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            value = {"command": "python benchmarks/paper_table.py", "axis": AXIS, "machine": machine, "rows": rows}
            path.write_text(json.dumps(value, indent=1) + "\n")
    insert_table("docs/transforms.md", "paper_table.py", table(rows))
    draw(rows, ROOT / "docs" / "transforms.png")


if __name__ == "__main__":
    main()
