"""Writes the golden files of the format and the digests of what they decode to: tests/golden/*.tq, *.json.

    python tools/make_golden.py

`version1` is what 0.1 wrote, `version1_transforms`, `version1_fixed` and `version1_trellis` what 0.2 added, with binary decisions
alone; `version1_tokens`, `version1_static` and `version1_laws` have weights as tokens, `version1_spans` a step a span,
`version1_kept` a list of kept channels.
Once released they stay as they are for ever: files that exist are left alone.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

import transquant as tq
from transquant import bitstream, codec, modules, pruning
from transquant.bitstream import Part
from transquant.choices import Choice, LayerTransform, Method
from transquant.encoder import Encoder, Source
from transquant.entropy import lanes
from transquant.records import CodedEntry, CodedTensor, Coder, RawEntry
from transquant.stats import collect
from transquant.trellis_code import TRELLIS_CODES
from transquant.workers import workers

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "golden"


class Everything(nn.Module):
    """Every kind of entry: matrices of two and four dimensions, vectors, BatchNorm, exact tensors, aliases, four dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, (3, 1), groups=24, bias=False)
        self.embedding = nn.Embedding(24, 40)
        self.head = nn.Linear(40, 24)
        self.head.weight = self.embedding.weight
        self.reduced = nn.Linear(24, 9).to(torch.bfloat16)
        self.exact = nn.Parameter(torch.randn(5, 7))
        self.register_buffer("table", torch.arange(11, dtype=torch.int16))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("empty", torch.zeros(0, 3, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.depthwise(x).mean((2, 3))
        x = self.head(x @ self.embedding.weight)
        return self.reduced(x.to(torch.bfloat16)).float()


class Transformed(nn.Module):
    """A weight for every transform and axis."""

    def __init__(self) -> None:
        super().__init__()
        self.dct = nn.Conv2d(3, 16, 5)
        self.kernel = nn.Conv2d(16, 16, 3, groups=2)
        self.channels = nn.Conv1d(16, 12, 3)
        self.rows = nn.ConvTranspose1d(12, 10, 2)
        self.joint = nn.Conv1d(10, 30, 2)
        self.plain = nn.Linear(30, 7)
        self.register_buffer("table", torch.arange(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.kernel(torch.relu(self.dct(x)))).flatten(2)
        x = torch.relu(self.joint(torch.relu(self.rows(torch.relu(self.channels(x))))))
        return self.plain(x.mean(2))


TRANSFORMS = {
    "dct.weight": LayerTransform("d", "k"), "kernel.weight": LayerTransform("k", "k", 3),
    "channels.weight": LayerTransform("e", "c", 6), "rows.weight": LayerTransform("k", "r"),
    "joint.weight": LayerTransform("k", "j"),
}  # fmt: skip


def everything() -> bytes:
    """Every kind of entry that 0.1 knew."""
    torch.manual_seed(0)
    model = Everything().eval()
    return tq.compress(model, torch.randn(128, 3, 8, 8), bits=5.0).data


def transformed(coding: str) -> bytes:
    """Every transform over every axis, entropy-coded or in fixed-length codes."""
    torch.manual_seed(0)
    model, images = Transformed().eval(), torch.randn(64, 3, 12, 12)
    _, state, plan = codec._open(model, None)
    with workers() as pool:
        stats = collect(model, list(images.split(32)), plan, lambda m, batch: m(batch), pool)
        encoder = Encoder(plan, Source(*modules.gather(plan, state)), stats, pool, Method(coding=coding), TRANSFORMS)
        return encoder.encode(encoder.draft(2.0**-13, Choice())).data


def trellis(coder: Coder) -> bytes:
    """A trellis of each number of states, and none, with every transform."""
    torch.manual_seed(0)
    model, images = Transformed().eval(), torch.randn(64, 3, 12, 12)
    _, state, plan = codec._open(model, None)
    with workers() as pool:
        stats = collect(model, list(images.split(32)), plan, lambda m, batch: m(batch), pool)
        source, drafts = Source(*modules.gather(plan, state)), []
        for bits in TRELLIS_CODES:
            drafts.append(Encoder(plan, source, stats, pool, Method(state_bits=bits), TRANSFORMS).draft(2.0**-13, Choice()))
        weights = [name for name in drafts[0].coded if name.endswith("weight")]
        coded = dict(drafts[0].coded) | {name: d.coded[name] for name, d in zip(weights, drafts, strict=True)}
        entries = tuple(coded[e.name].entry if e.name in coded else e for e in drafts[0].entries)
        mixed = replace(drafts[0], entries=entries, coded=coded)
        return Encoder(plan, source, stats, pool, Method(coder=coder)).encode(mixed).data


def laws() -> bytes:
    """The same from tables with corrections of every size: a reader takes any."""
    corrections = (np.arange(21 * 16, dtype=np.int32) * 29 % 127 - 63).reshape(21, 16)
    with patch.object(lanes, "corrections_for", lambda trellis, seen: np.roll(corrections, trellis)):
        return trellis("l")


def spans(coder: Coder) -> bytes:
    """A step for each span of each row, of every width that is odd in its own way: one column, a divisor, a rest, all of a row."""
    draw = np.random.default_rng(0)
    shapes = {
        "one": (7, 5),
        "divides": (16, 4, 3, 3),
        "rest": (20, 35),
        "all": (9, 30),
        "folded": (6, 48),
        "empty": (0, 5),
        "none": (3, 0),
    }
    widths = {"one": 1, "divides": 12, "rest": 8, "all": 1024, "folded": 16, "empty": 2, "none": 8}
    parts: list[Part] = []
    for name, shape in shapes.items():
        dtype, fold = ("bfloat16" if name == "rest" else "float32"), (4 if name == "folded" else 1)
        entry = CodedEntry(name, shape, dtype, -3, (5, -2) if name == "one" else (0, 0), "s", fold, span=widths[name])
        exponents = np.clip(np.rint(draw.normal(0, 3, (entry.rows, entry.spans))), -64, 64).astype(np.int32)
        symbols = np.rint(draw.normal(0, 2, (entry.rows, entry.columns))).astype(np.int32)
        parts.append((entry, CodedTensor(entry, symbols, span_exponents=exponents)))
    parts.append((RawEntry("exact", (3,), "int16"), None))
    vector = CodedEntry("vector", (11,))
    parts.append((vector, CodedTensor(vector, np.rint(draw.normal(0, 9, (1, 11))).astype(np.int32))))
    return bitstream.encode(
        (3000, -18), parts, {"exact": b"\1\2\3\4\5\6"}, lambda jobs: (lanes.encode_planes(*job) for job in jobs), coder
    ).data


class Pruned(nn.Module):
    """Channels at every kind of place: behind a start, with a span, in BatchNorms and depthwise kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(1, 5, 1)
        self.norm = nn.BatchNorm2d(11)
        self.deep = nn.Conv2d(11, 22, 3, groups=11, bias=False)
        self.head = nn.Linear(22 * 4, 3)
        self.register_buffer("table", torch.arange(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1))
        return self.head(torch.relu(self.deep(x)).flatten(1))


def kept() -> bytes:
    """A network from which channels were removed, twice."""
    torch.manual_seed(0)
    model, images = Pruned().eval(), torch.randn(32, 1, 4, 4)
    for names in ({"left": [0, 2, 3, 5], "right": [1, 2, 4]}, {"right": [0, 2]}):
        model = pruning.removed(model, pruning.channel_groups(model, images), names)
    return tq.compress(model, images, step=0.002, effort=1).data


FILES = {
    "version1": everything,
    "version1_transforms": lambda: transformed("entropy"),
    "version1_fixed": lambda: transformed("fixed"),
    "version1_trellis": lambda: trellis("s"),
    "version1_tokens": lambda: trellis("m"),
    "version1_static": lambda: trellis("t"),
    "version1_laws": laws,
    "version1_spans": lambda: spans("m"),
    "version1_kept": kept,
}


def main() -> None:
    for name, make in FILES.items():
        path = FOLDER / f"{name}.tq"
        if path.exists():
            print(f"{path.name} exists, and golden files never change", file=sys.stderr)
            continue
        path.write_bytes(make())
        arrays = tq.reader.load(path)
        digests = {k: [str(v.dtype), list(v.shape), hashlib.sha256(v.tobytes()).hexdigest()] for k, v in arrays.items()}
        path.with_suffix(".json").write_text(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    main()
