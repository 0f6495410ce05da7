"""Writes the golden file of the current format version: tests/golden/version<N>.tq and the digests of what it decodes to.

    python tools/make_golden.py

Once a version is released its files stay as they are for ever; this refuses to touch an existing one.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import nn

import transquant as tq
from transquant.container.file import VERSION

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


def main() -> None:
    path = FOLDER / f"version{VERSION}.tq"
    if path.exists():
        sys.exit(f"{path.name} exists, and golden files never change")
    torch.manual_seed(0)
    model = Everything().eval()
    images = torch.randn(128, 3, 8, 8)
    compressed = tq.compress(model, images, bits=5.0)
    compressed.save(path)
    digests = {k: [str(v.dtype), list(v.shape), hashlib.sha256(v.tobytes()).hexdigest()] for k, v in tq.reader.load(path).items()}
    path.with_suffix(".json").write_text(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    main()
