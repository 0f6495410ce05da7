"""Small networks that searches are tried on, and their inputs."""

from __future__ import annotations

import torch
from torch import nn


class Net(nn.Module):
    """Plain convolutions, a residual addition, and a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.inner = nn.Conv2d(12, 16, 3, padding=1)
        self.outer = nn.Conv2d(16, 12, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, stride=2, padding=1, groups=12)
        self.last = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.stem(x)))
        x = torch.relu(x + self.bn2(self.outer(torch.relu(self.inner(x)))))
        return self.last(torch.relu(self.depthwise(x)).mean((2, 3)))


class Winding(Net):
    """The same, but what it does depends on its input: its graph cannot be followed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if float(x.sum()) < 1e9 else x / 2)


def made(kind: type[Net] = Net) -> Net:
    torch.manual_seed(3)
    net = kind()
    with torch.no_grad():
        net.last.weight.mul_(8)
        net.inner.weight[::4] *= 0.02  # channels that do little
    return net.eval()


def images() -> torch.Tensor:
    return torch.randn(120, 3, 10, 10, generator=torch.Generator().manual_seed(1))
