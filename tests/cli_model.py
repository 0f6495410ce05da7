"""The model file that the command line's tests run in their folder, and the options that name it."""

MODEL = """
from conftest import make_net
import torch
from torch import nn

def net():
    return make_net()

def pictures():
    return [torch.randn(40, 3, 12, 12, generator=torch.Generator().manual_seed(k)) for k in range(3)]

def nothing():
    return None

def fails():
    raise RuntimeError("no weights here")

def without_weights():
    return nn.ReLU()
"""

NET = ("--model", "model.py:net", "--calibration", "model.py:pictures")
