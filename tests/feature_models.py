"""The network and the codec that tests of feature maps share."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from plain_coder import plain_codec

X = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(5))


class Block(nn.Module):
    """One activation module that is called twice, with a residual around the first."""

    def __init__(self, width=8):
        super().__init__()
        self.one, self.two, self.act = (
            nn.Conv2d(width, width, 3, padding=1),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        return self.act(self.two(self.act(self.one(x))) + x)


class Residual(nn.Module):
    """Modules and functions, ReLU, ReLU6 and GELU, in place and not, an optional argument, vectors at the end."""

    def __init__(self):
        super().__init__()
        self.stem, self.layer1, self.layer2 = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(Block(), Block()), nn.Sequential(Block())
        self.head, self.last = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x, scale=None):
        x = functional.relu6(self.stem(x))
        x = self.layer2(functional.max_pool2d(self.layer1(x), 2))
        x = functional.gelu(self.head(x.mean((2, 3))))
        return self.last(x) if scale is None else self.last(x) * scale


def residual():
    torch.manual_seed(0)
    return Residual().eval()


NET = residual()
CODEC = plain_codec(NET, X, 0.03, before=True)


def outputs(model, x=X):
    with torch.no_grad():
        return model(x)
