"""Plain quantization-aware training and LSQ: gradients against the paper's formula, saturation, files of the given depth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

import transquant as tq
from transquant import training
from transquant.demo.network import DigitsNet, load_digits_split, pretrained
from transquant.errors import InputError
from transquant.records import CodedEntry, CodedTensor
from transquant.training.uniform import UniformWeight

STEP = (3000, -15)


@pytest.fixture(scope="module")
def digits():
    return load_digits_split()


@pytest.fixture(scope="module")
def start(digits):
    return tq.compress(pretrained(), [digits[0][0][:64]], bits=3.0, trellis=False, effort=1)


def soft(depth, learned, rows=8, columns=24):
    tensor = CodedTensor(CodedEntry("w", (rows, columns), qp=1), np.zeros((rows, columns), np.int32))
    weight = UniformWeight(tensor, STEP, depth, learned)
    values = 0.2 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    return weight, values, weight.right_inverse(values)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 8])
def test_gradients_are_those_of_the_paper(depth):
    weight, values, (u, a) = soft(depth, learned=True)
    low, high = (-1, 1) if depth == 1 else (-(2 ** (depth - 1)), 2 ** (depth - 1) - 1)
    first = 2 * float(values.abs().mean()) / high**0.5
    assert float(a.exp()) * weight.base == pytest.approx(first, rel=1e-5)
    u, a = u.requires_grad_(), a.requires_grad_()
    slope = torch.randn(values.shape, generator=torch.Generator().manual_seed(2))
    (weight(u, a) * slope).sum().backward()
    step = float(weight.scale(a.detach()))
    ratio = values.double() / step
    inside = (ratio > low) & (ratio < high)
    symbol = torch.where(ratio < 0, -1.0, 1.0) if depth == 1 else ratio.round()
    by_step = torch.where(inside, symbol - ratio, ratio.clamp(low, high))  # eq. 3
    expected = float((by_step * slope).sum()) / (values.numel() * high) ** 0.5 * first  # of its logarithm
    assert float(a.grad) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    torch.testing.assert_close(u.grad, torch.where(inside, slope * weight.unit, torch.zeros(())), rtol=1e-5, atol=1e-8)


def test_the_steps_gradient_is_the_slope_of_the_surrogate():
    """What is rounded held as w/s + constant: ŵ = s · (w/s + (k − w/s at the start)) inside, s · k outside."""
    weight, values, (u, a) = soft(3, learned=True)
    a = a.requires_grad_()
    weight(u, a).sum().backward()
    s, w = float(weight.scale(a.detach())), values.double()
    held = (w / s).clamp(-4, 3).round() - (w / s).clamp(-4, 3)

    def surrogate(step):
        return float((step * ((w / step).clamp(-4, 3) + held)).sum())

    slope = (surrogate(s * (1 + 1e-6)) - surrogate(s * (1 - 1e-6))) / (2e-6 * s)
    assert float(a.grad) == pytest.approx(slope * weight.damping * weight.base * float(a.detach().exp()), rel=1e-3)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_what_is_outside_saturates(depth, learned):
    weight, _, (u, a) = soft(depth, learned)
    u = (u * 50).requires_grad_()
    weight(u, a).sum().backward()
    symbols = weight.code(0.0, u, a).symbols
    allowed = (
        {1: {-1, 1}, 2: {-2, -1, 0, 1}, 4: set(range(-8, 8))}[depth]
        if learned
        else set(range(1 - 2 ** (depth - 1), 2 ** (depth - 1)))
    )
    allowed = {-1, 1} if depth == 1 else allowed
    assert set(np.unique(symbols)) <= allowed
    assert {min(allowed), max(allowed)} <= set(np.unique(symbols))
    ratio = (u.detach() * weight.unit / weight.scale(a)).abs()
    far = ratio > weight.high + 1
    assert far.sum() > 50
    assert not u.grad[far].any()
    assert u.grad[ratio < weight.high].all()


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_plain_step_has_nearly_the_least_error(depth):
    weight, values, (_, a) = soft(depth, learned=False)
    tried = torch.logspace(-3, 0, 3000, dtype=torch.float64)[:, None, None]
    wide = values.double()[None]
    errors = ((weight.symbols(wide / tried) * tried - wide) ** 2).sum((1, 2))
    scale = weight.base * float(a.exp())
    found = ((weight.symbols(wide / scale) * scale - wide) ** 2).sum()
    assert float(found) <= 1.01 * float(errors.min())


@pytest.mark.parametrize(("method", "depth"), [("qat", 1), ("qat", 2), ("qat", 4), ("lsq", 1), ("lsq", 2), ("lsq", 4)])
def test_training_ends_in_a_file_of_that_depth(digits, start, method, depth):
    (x, y), (images, labels) = digits
    files = []
    for _ in range(2):
        model = pretrained()
        network = training.prepare(model, bits=depth, start=start, method=method, steps=40)
        model.train()
        optimizer = torch.optim.Adam(network.parameter_groups())
        scales = {name: float(network.originals(name)[1].detach()) for name in network.soft}
        for step in range(40):
            batch = torch.randint(0, len(x), (64,), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (functional.cross_entropy(model(x[batch]), y[batch]) + network.penalty()).backward()
            optimizer.step()
        assert network.settled
        assert all(float(network.originals(name)[1].detach()) != before for name, before in scales.items())
        model.eval()
        own = {name: dict(model.named_modules())[name.removesuffix(".weight")].weight.detach() for name in network.soft}
        coded = network.coded(0.0)
        compressed = training.harden(model)
        files.append(compressed.data)
    assert files[0] == files[1]
    decoded = compressed.state_dict()
    first, *inner, last = coded
    for name, value in own.items():
        torch.testing.assert_close(decoded[name], value, rtol=3e-7, atol=0)
    for name in inner:
        low = -(2 ** (depth - 1)) if method == "lsq" else 1 - 2 ** (depth - 1)
        assert coded[name].symbols.min() >= min(low, -1)
        assert coded[name].symbols.max() <= max(2 ** (depth - 1) - 1, 1)
        assert depth > 1 or 0 not in coded[name].symbols
    assert min(np.abs(coded[name].symbols).max() for name in (first, last)) > 8  # LSQ begins with a large step
    network_of_file = compressed.install(DigitsNet()).eval()
    torch.testing.assert_close(network_of_file(images), model(images), rtol=0, atol=0)
    assert float((model(images).argmax(1) == labels).float().mean()) > 0.8


def test_a_depth_is_a_whole_number(start):
    for bits in (0, 9, 2.5):
        with pytest.raises(InputError, match="needs a depth"):
            training.prepare(pretrained(), bits=bits, start=start, method="lsq")
    with pytest.raises(InputError, match="has no option 'levels'"):
        training.prepare(pretrained(), bits=2, start=start, method="qat", levels=3)
