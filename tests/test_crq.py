"""Cluster regularization: the term against its definition, α against brute force, files of the asked size that are ternary."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import transquant as tq
from training_loop import train
from transquant import training
from transquant.demo.network import DigitsNet, load_digits_split, pretrained
from transquant.errors import InputError, TargetError
from transquant.records import CodedEntry, CodedTensor
from transquant.training.crq import RAMP, ClusteredWeight
from transquant.training.scaled import least_squares, writable

STEP = (3000, -15)


@pytest.fixture(scope="module")
def digits():
    return load_digits_split()


@pytest.fixture(scope="module")
def start(digits):
    return tq.compress(pretrained(), [digits[0][0][:256]], bits=1.75, trellis=False, effort=1)


def soft(rows=12, columns=36, levels=3, **options):
    """A soft weight on its own, with its parameters, of a price without a margin."""
    entry = CodedEntry("w", (rows, columns // 9, 3, 3), qp=2, groups="r")
    exponents = np.arange(rows, dtype=np.int32) % 3
    weight = ClusteredWeight(CodedTensor(entry, np.zeros((rows, columns), np.int32), exponents), STEP, levels, **options)
    values = 0.1 * torch.randn(rows, columns // 9, 3, 3, generator=torch.Generator().manual_seed(3))
    price = SimpleNamespace(memory=-50.0)  # no margin
    weight.__dict__["owner"] = SimpleNamespace(target=100.0, price=price, step=1, schedule=training.network.Schedule(100))
    return weight, values, weight.right_inverse(values)


def distance(values, alpha, levels):
    """By its definition, in float64."""
    centres = alpha * np.arange(-(levels // 2), levels // 2 + 1)
    return np.mean(np.min((values.double().numpy().reshape(-1, 1) - centres) ** 2, axis=1)) / alpha**2


@pytest.mark.parametrize("levels", [3, 5, 9])
def test_the_term_is_the_mean_squared_distance_from_the_nearest_centre(levels):
    weight, values, (u, a) = soft(levels=levels)
    alpha = float(weight.scale(a))
    found = weight.loss(0.0, u, a)
    expected = distance(values, alpha, levels)
    assert float(found) == pytest.approx(weight.strength / RAMP * expected, rel=1e-4)
    assert float(weight.loss(0.85, u, a)) == pytest.approx(weight.strength * expected, rel=1e-4)
    u = u.requires_grad_()
    weight.distance(u, a).backward()
    for place in [(0, 0, 0, 0), (5, 1, 2, 1), (11, 3, 2, 2)]:
        ends = []
        for sign in (1, -1):
            moved = u.detach().double()
            moved[place] += sign * 1e-4
            ends.append(distance(weight.matrix(moved) * weight.unit.double(), alpha, levels))
        assert float(u.grad[place]) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-2, abs=1e-7)


def test_scales_are_those_of_ternary_weight_networks_and_then_least_squares():
    weight, values, (u, a) = soft()
    size = values.abs()
    assert float(weight.scale(a)) == pytest.approx(float(size[size > 0.7 * size.mean()].mean()), rel=6e-3)
    matrix = weight.matrix(values)
    symbols = weight.decided(matrix, weight.scale(a))
    tried = torch.linspace(0.01, 0.4, 4000)
    errors = ((matrix[None] - tried[:, None, None] * symbols[None]) ** 2).sum((1, 2))
    assert float(least_squares(matrix, symbols, torch.tensor(1.0))) == pytest.approx(float(tried[errors.argmin()]), abs=2e-4)
    weight.owner.step = 25
    parameter = nn.Parameter(a.clone())
    weight.loss(0.1, u, parameter)
    assert weight.scale(parameter).item() == pytest.approx(float(tried[errors.argmin()]), rel=6e-3)


@pytest.mark.parametrize(("largest", "within"), [(1, 0.007), (2, 0.012), (3, 0.095)])
def test_the_file_has_nearly_every_scale(largest, within):
    values, codes = writable(STEP, 5, largest)
    assert (np.diff(values) >= 0).all()
    wanted = np.exp(np.random.default_rng(0).uniform(np.log(values[len(values) // 4]), np.log(values[3 * len(values) // 4]), 500))
    error = np.abs(np.log(wanted[:, None] / values)).min(1).max()
    assert error < within
    assert np.abs(codes[:, 1:]).max() <= 31


@pytest.mark.parametrize("levels", [3, 5, 7])
def test_what_is_written_decodes_to_what_the_network_had(digits, start, levels):
    model = pretrained()
    network = training.prepare(model, bits=3.0, start=start, method="crq", levels=levels)
    model.eval()
    before = {name: dict(model.named_modules())[name.removesuffix(".weight")].weight.detach() for name in network.soft}
    decoded = tq.codec.load_bytes(network._file(network.coded(0.0))).state_dict()
    for name, value in before.items():
        torch.testing.assert_close(decoded[name], value, rtol=3e-7, atol=0)
        symbols = network.coded(0.0)[name].symbols
        most = np.abs(symbols).max()
        assert (most == levels // 2) if isinstance(network.soft[name], ClusteredWeight) else (64 <= most <= 127)
    model.train()  # while it learns the layer sees the float weight
    torch.testing.assert_close(model.features[3].weight, pretrained().features[3].weight, rtol=1e-5, atol=1e-7)


def test_a_file_is_ternary_and_of_the_asked_size(digits, start):
    model = pretrained()
    network = training.prepare(model, bits=1.75, start=start, method="crq", steps=200)
    model.train()
    train(model, network, digits[0], 200)
    assert network.settled
    model.eval()
    symbols = {name: tensor.symbols for name, tensor in network.coded(0.0).items()}
    compressed = training.harden(model)
    target = 1.75 * sum(p.numel() for p in model.parameters()) / 8
    assert 0.99 * target <= len(compressed.data) <= target
    first, *inner, last = symbols
    for name in inner:
        assert set(np.unique(symbols[name])) == {-1, 0, 1}, name
    assert max(np.abs(symbols[first]).max(), np.abs(symbols[last]).max()) <= 127
    x, y = digits[1]
    torch.testing.assert_close(compressed.install(DigitsNet()).eval()(x), model(x), rtol=0, atol=0)
    assert float((model(x).argmax(1) == y).float().mean()) > 0.8


@pytest.mark.parametrize("hard", [0.5, 1.0])
def test_a_layer_has_float_weights_and_later_centres(digits, start, hard):
    model = pretrained()
    network = training.prepare(model, bits=1.75, start=start, method="crq", steps=40, hard=hard)
    model.train()
    seen = []
    for steps in (18, 22, 36):
        train(model, network, digits[0], steps, network.step)
        seen.append(len(torch.unique((1e4 * model.features[3].weight).round())))
    assert seen[0] > 100
    assert seen[1] == 3 if hard == 0.5 else seen[1] > 100
    assert seen[2] == 3
    assert network.originals("features.3.weight")[0].grad is None  # settled


def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_been(digits, start):
    files = []
    for stop in (None, 20, 56):  # before and after symbols settle
        model = pretrained()
        network = training.prepare(model, bits=1.75, start=start, method="crq", steps=60)
        model.train()
        if stop:
            optimizer = train(model, network, digits[0], stop)
            kept = copy.deepcopy((network.state(), model.state_dict(), optimizer.state_dict()))
            model = pretrained()
            network = training.prepare(model, bits=1.75, start=start, method="crq", steps=60)
            model.train()
            network.load(kept[0])
            model.load_state_dict(kept[1])
            optimizer = torch.optim.Adam(network.parameter_groups())
            optimizer.load_state_dict(kept[2])
            train(model, network, digits[0], 60, stop, optimizer)
        else:
            train(model, network, digits[0], 60)
        files.append(training.harden(model).data)
    assert files[0] == files[1] == files[2]


def test_nothing_collapses_under_a_huge_term(digits, start):
    model = pretrained()
    network = training.prepare(model, bits=1.75, start=start, method="crq", steps=100, strength=1e6)
    model.train()
    train(model, network, digits[0], 100)
    for tensor in network.coded(0.0).values():
        assert (tensor.symbols != 0).mean() > 0.02
    nothing = torch.zeros(2, 3)
    weight = torch.tensor([[0.1, -0.3, 0.2], [0.0, 0.1, 0.0]])
    assert float(least_squares(weight, nothing, torch.tensor(5.0))) == pytest.approx(0.3)


def test_a_scale_goes_on_learning_when_symbols_have_settled():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
    x = torch.randn(64, 16)
    y = model(x).argmax(1)
    network = training.prepare(model, [x], bits=6.0, effort=1, method="crq", steps=40)
    train(model, network, (x, y), 35)
    assert network.settled
    (name,) = (n for n, w in network.soft.items() if isinstance(w, ClusteredWeight))
    u, a = network.originals(name)
    before, scale, symbols = u.detach().clone(), float(a.detach()), network.soft[name].fixed.clone()
    train(model, network, (x, y), 40, 35)
    assert float(a.detach()) != scale
    assert torch.equal(u, before)
    assert torch.equal(network.soft[name].fixed, symbols)
    own = model[2].weight.detach().clone()
    decoded = training.harden(model).state_dict()[name]
    torch.testing.assert_close(decoded, own, rtol=3e-7, atol=0)


def test_sizes_fall_with_the_shift_also_of_settled_symbols(start):
    for settled in (False, True):
        network = training.prepare(pretrained(), bits=1.75, start=start, method="crq")
        if settled:
            for name, weight in network.soft.items():
                weight.settle(0.0, *network.originals(name))
        shares = [np.mean([np.mean(t.symbols == 0) for t in network.coded(s).values()]) for s in (0.0, 0.05, 0.3, 1.0, 4.0)]
        assert (np.diff(shares) > 0).all()
    network = training.prepare(pretrained(), bits=1.75, start=start, method="crq")
    zeros = [{n: np.mean(t.symbols == 0) for n, t in network.coded(s).items()} for s in (0.0, -0.1, -0.3, -0.45)]
    for name, weight in network.soft.items():
        if isinstance(weight, ClusteredWeight):  # never fewer than a third: files would become smaller again
            assert zeros[0][name] > zeros[1][name] > zeros[2][name] > zeros[3][name] == pytest.approx(1 / 3, abs=2e-3)


def test_a_file_too_small_is_filled_up_though_all_weights_have_gathered(start):
    network = training.prepare(pretrained(), bits=1.75, start=start, method="crq")
    with torch.no_grad():
        for name, weight in network.soft.items():
            if isinstance(weight, ClusteredWeight):
                u, a = network.originals(name)
                symbols = torch.from_numpy(network.coded(0.0)[name].symbols).reshape(u.shape)
                u.mul_(0.1).add_((symbols * weight.scale(a) / weight.unit.mean()).reshape(u.shape))
    size = len(network._file(network.coded(0.0)))
    zeros = {n: np.mean(t.symbols == 0) for n, t in network.coded(0.0).items()}
    target = 1.005 * size
    shift = network.shift_for(target, 0.0025)
    coded = network.coded(shift)
    assert shift < 0
    assert size < len(network._file(coded)) <= target
    for name, tensor in coded.items():
        assert np.mean(tensor.symbols == 0) == pytest.approx(zeros[name], abs=0.05)


def test_kept_weights_are_those_that_are_named(start):
    network = training.prepare(pretrained(), bits=1.75, start=start, method="crq", keep=["features.3.weight"])
    kinds = {name: isinstance(weight, ClusteredWeight) for name, weight in network.soft.items()}
    assert [name for name, clustered in kinds.items() if not clustered] == ["features.3.weight"]
    for given, message in (
        ({"levels": 4}, "levels is 4, allowed are odd numbers from 3 to 31"),
        ({"strength": -1.0}, "strength is -1.0, allowed"),
        ({"hard": 2}, "hard is 2, allowed"),
        ({"keep": "first"}, "keep is 'first', allowed is a list"),
        ({"keep": ("second",)}, "names of weights"),
    ):
        with pytest.raises(InputError, match=message):
            training.prepare(pretrained(), bits=1.75, start=start, method="crq", **given)
    tiny = pretrained()
    training.prepare(tiny, size=800, start=start, method="crq")
    with pytest.raises(TargetError, match="the smallest takes"):
        training.harden(tiny)


def test_transforms_of_the_template_give_only_a_unit(digits):
    model = pretrained()
    network = training.prepare(model, [digits[0][0][:128]], bits=3.0, method="crq", transform="elt", axis="input", effort=1)
    transformed = [n for n, t in network.template.weights.items() if t.entry.transform == "e"]
    assert transformed
    plain = copy.deepcopy(pretrained()).state_dict()
    for name in transformed:
        weight = network.soft[name]
        assert weight.unit.numel() == 1
        assert weight.tensor.entry == replace(weight.tensor.entry, transform="i", axis="", groups="")
        u = network.originals(name)[0]
        torch.testing.assert_close(u.detach() * weight.unit[0, 0], plain[name], rtol=1e-5, atol=1e-7)
    sizes = [network.originals(n)[0].abs().mean().item() for n in transformed]
    assert 0.05 < min(sizes) < max(sizes) < 20
