"""Soft weights, from a compressed network and back: prepare, train, harden."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import transquant as tq
from transquant import demo, training
from transquant.demo.network import DigitsNet, load_digits_split, pretrained
from transquant.errors import InputError, TargetError


@pytest.fixture(scope="module")
def digits():
    (x, y), test = load_digits_split()
    return x, y, test


@pytest.fixture(scope="module")
def start(digits):
    return tq.compress(pretrained(), [digits[0][:256]], bits=1.5, trellis=False, effort=1)


def train(model, network, digits, steps, rate=0.01):
    x, y, _ = digits
    optimizer = torch.optim.Adam(network.parameter_groups(rate))
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(0, len(x), (64,), generator=generator)
        optimizer.zero_grad()
        (functional.cross_entropy(model(x[batch]), y[batch]) + network.penalty()).backward()
        optimizer.step()


def test_a_prepared_network_is_the_compressed_one(digits, start):
    model = pretrained()
    network = training.prepare(model, bits=1.5, start=start)
    decoded = start.install(pretrained())
    x = digits[0][:100]
    for name, weight in network.soft.items():
        np.testing.assert_array_equal(network.coded(0.0)[name].symbols, weight.tensor.symbols)
    with torch.no_grad():
        torch.testing.assert_close(model.features[0].weight, decoded.features[0].weight, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(model(x), decoded(x), rtol=1e-3, atol=1e-3)


def test_training_ends_at_the_asked_size_and_hardening_gives_an_ordinary_model(digits, start):
    model = pretrained()
    keys = list(model.state_dict())
    network = training.prepare(model, bits=1.2, start=start, steps=120)
    model.train()
    train(model, network, digits, 120)
    assert network.settled
    model.eval()
    compressed = training.harden(model)
    size = 1.2 * sum(p.numel() for p in model.parameters()) / 8
    assert 0.99 * size - 64 <= len(compressed.data) <= size
    assert list(model.state_dict()) == keys
    assert type(model.features[0]) is nn.Conv2d
    other = compressed.install(DigitsNet()).eval()
    x, y = digits[2]
    torch.testing.assert_close(model(x), other(x), rtol=0, atol=0)
    plain = tq.compress(pretrained(), [digits[0][:256]], bits=1.2, trellis=False, effort=1).install(pretrained())

    def score(m):
        return (m(x).argmax(1) == y).float().mean()

    assert score(other) > score(plain)
