from __future__ import annotations

import gc
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import transquant as tq
from cli_model import MODEL
from transquant.cli import main

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))


@pytest.fixture(scope="module", autouse=True)
def nothing_prepared_is_left():
    """Prepared models that tests give up are taken down, and said to be lost, before another module listens to the log."""
    yield
    if "transquant.training" in sys.modules:
        gc.collect()


class SmallNet(nn.Module):
    """Convolution with bias, grouped, depthwise, BatchNorm, linear: every coded layer but the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16, bias=False)
        self.grouped = nn.Conv2d(16, 32, 3, dilation=2, groups=4)
        self.norm = nn.LayerNorm(32)
        self.linear = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        x = torch.relu(self.grouped(self.depthwise(x)))
        return self.linear(self.norm(x.mean((2, 3))))


def make_net() -> SmallNet:
    """The same small network in every test, in eval mode."""
    torch.manual_seed(0)
    model = SmallNet()
    with torch.no_grad():
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2)
        model.bn.weight.uniform_(0.5, 2)
        model.bn.bias.normal_()
        model.linear.weight.mul_(4)
    return model.eval()


@pytest.fixture
def net() -> SmallNet:
    return make_net()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(160, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def small() -> SmallNet:
    """Shared by tests that do not change it."""
    return make_net()


@pytest.fixture(scope="session")
def samples() -> torch.Tensor:
    return torch.randn(160, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def compressed(small: SmallNet, samples: torch.Tensor) -> tq.CompressedModel:
    return tq.compress(small, samples, bits=4.0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    """Runs a command line in a folder with model.py; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return run
