"""Progressive training: rows are fixed group after group, all others are float, and the file comes out at its size."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import transquant as tq
from training_loop import train
from transquant import training
from transquant.allocation.steps import Grouping, matrix_steps
from transquant.demo.network import DigitsNet, load_digits_split, pretrained
from transquant.errors import InputError
from transquant.training.checkpoint import Checkpoints
from transquant.training.rate_plan import SLOPE, RatePlan, share_of_rows
from transquant.weights import dequantized

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.fixture(scope="module")
def digits():
    return load_digits_split()


@pytest.fixture(scope="module")
def start(digits):
    return tq.compress(pretrained(), [digits[0][0][:256]], bits=1.3, transform="identity", effort=1)


def prepared(digits, start, **more):
    model = pretrained()
    more = {"bits": 1.2, "start": start, "steps": 120, **more}
    return model, training.prepare(model, [digits[0][0][:256]], method="progressive", **more)


@pytest.mark.parametrize("groups", [1, 2, 14, 80])
@pytest.mark.parametrize("off", [-0.15, 0.0, 0.2])
def test_groups_of_other_rates_than_expected_come_out_at_the_aim(groups, off):
    plan = RatePlan.of(groups, 1.5)
    assert plan.expected() == pytest.approx(1.5)
    shares = np.diff([share_of_rows(k / groups) for k in range(groups + 1)])
    assert shares.sum() == pytest.approx(1)
    assert groups == 1 or shares[0] > shares[-1] > 0
    true, spent, prices = plan.offset + off, 0.0, []
    for share in shares:
        prices.append(plan.log_price)
        spent += share * (true + 1.2 * SLOPE * plan.log_price)
        plan.measure(spent)
    assert plan.group == groups
    assert plan.spent == plan.expected() == spent
    if groups >= 14:
        assert spent == pytest.approx(1.5, rel=0.01)
        assert off or prices[0] > prices[-1]  # the last rows are the finest


def test_until_rows_are_fixed_the_network_is_the_float_one(digits, start):
    model, network = prepared(digits, start)
    x, y = digits[0][0][:64], digits[0][1][:64]
    plain = pretrained()
    model.eval(), plain.eval()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    nn.functional.cross_entropy(plain(x), y).backward()
    nn.functional.cross_entropy(model(x), y).backward()
    for name, weight in network.soft.items():
        (own,) = network.originals(name)
        expected = plain.get_parameter(name).grad * weight.unit.expand(weight.tensor.symbols.shape).reshape(own.shape)
        torch.testing.assert_close(own.grad, expected, rtol=1e-2, atol=1e-5)


def test_fixed_rows_are_those_of_the_file_and_learn_no_more(digits, start):
    model, network = prepared(digits, start)
    network.look()
    network.keep()
    fixed = {name: weight.done.clone() for name, weight in network.soft.items()}
    before = {name: weight.symbols.clone() for name, weight in network.soft.items()}
    assert all(0 < int(done.sum()) < len(done) for name, done in fixed.items() if len(done) > 10)
    (model(digits[0][0][:32]).square().mean() + network.penalty()).backward()
    for name, weight in network.soft.items():
        (own,) = network.originals(name)
        gradient = weight.matrix(own.grad)
        assert not gradient[fixed[name] & weight.done].any()
        assert gradient[~weight.done].any()
        assert (weight.done | ~fixed[name]).all()  # what is fixed stays
        assert torch.equal(weight.symbols[fixed[name]], before[name][fixed[name]])
        decoded = dequantized(weight.code(0.0, own), network.template.container.step)
        np.testing.assert_array_equal(weight.values[weight.done].double().numpy(), decoded[weight.done.numpy()])


def test_a_larger_shift_makes_the_file_smaller_whatever_is_fixed(digits, start):
    model, network = prepared(digits, start)
    train(model, network, digits[0], 60)
    for _ in range(2):
        sizes = [len(network._file(network.coded(shift))) for shift in (-0.4, 0.0, 0.5, 2.0)]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] > 1.05 * sizes[1] > 1.3 * sizes[3]
        network.settle()
    assert all(weight.done.all() for weight in network.soft.values())


@pytest.mark.parametrize("bits", [0.8, 1.2])
def test_it_ends_at_the_asked_size(digits, start, bits):
    model, network = prepared(digits, start if bits == 1.2 else None, bits=bits, effort=1)
    train(model, network, digits[0], 120)
    assert network.settled
    compressed = training.harden(model.eval())
    size = bits * sum(p.numel() for p in model.parameters()) / 8
    assert 0.99 * size - 64 <= len(compressed.data) <= size
    x, y = digits[1]
    other = compressed.install(DigitsNet()).eval()
    torch.testing.assert_close(model(x), other(x), rtol=0, atol=0)
    accuracy = float((other(x).argmax(1) == y).float().mean())
    plain = tq.compress(pretrained(), [digits[0][0][:256]], bits=bits, effort=1).install(pretrained()).eval()
    assert accuracy > float((plain(x).argmax(1) == y).float().mean()) - 0.01
    assert accuracy > 0.9


def test_calibration_may_be_gone_through_once(digits):
    batches = [digits[0][0][k : k + 64] for k in (0, 64)]
    networks = [
        training.prepare(pretrained(), data, method="progressive", bits=1.2, effort=1, steps=50)
        for data in (batches, iter(batches), (b for b in batches))
    ]
    found = [{name: tensor.symbols for name, tensor in network.coded(0.5).items()} for network in networks]
    for name, symbols in found[0].items():
        assert all(np.array_equal(symbols, other[name]) for other in found[1:])


def test_without_a_number_of_steps_rows_are_fixed_at_the_end(digits, start):
    model, network = prepared(digits, start, steps=0)
    train(model, network, digits[0], 30)
    assert not any(weight.done.any() for weight in network.soft.values())
    size = 1.2 * sum(p.numel() for p in model.parameters()) / 8
    assert 0.99 * size - 64 <= len(training.harden(model.eval()).data) <= size


class Killed(Exception):
    pass


@pytest.mark.parametrize("step", [1, 9, 16, 23])
def test_resumed_it_ends_with_the_same_bits(digits, tmp_path, monkeypatch, step):
    monkeypatch.setattr("transquant.training.loop.EVERY", 0.0)
    x, y = digits[0]
    options = {"method": "progressive", "bits": 1.3, "epochs": 3, "batch": 100, "effort": 1, "calibration_samples": 128}

    def killed(moment):
        if moment.step == step:
            raise Killed

    def fit(**more):
        return training.fit(pretrained(), (x[:800], y[:800]), teacher="self", **options, **more).compressed.data

    with pytest.raises(Killed):
        fit(work=tmp_path, watch=killed)
    assert Checkpoints(tmp_path).steps()[-1] in (step, step - 1)
    assert fit(work=tmp_path) == fit()


TWO = """
import os, sys, torch
from transquant import training
from transquant.demo.network import load_digits_split, pretrained
torch.set_num_threads(1)
if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
(x, y), _ = load_digits_split()
result = training.fit(
    pretrained(), (x[:800], y[:800]), method="progressive", bits=1.3, epochs=3, batch=100, teacher="self", effort=1, micro_batches=2,
    calibration_samples=128,
)
result.compressed.save(sys.argv[1] + os.environ.get("RANK", "") + ".tq")
"""


def test_two_processes_train_as_one_does(tmp_path):
    (tmp_path / "script.py").write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "script.py", "two"]
    subprocess.run([sys.executable, "script.py", "one"], cwd=tmp_path, check=True, capture_output=True)
    subprocess.run(launch, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "two0.tq").read_bytes() == (tmp_path / "two1.tq").read_bytes()
    one, two = (tq.load(tmp_path / name).state_dict() for name in ("one.tq", "two0.tq"))
    weight = "features.0.weight"
    assert float((one[weight] - two[weight]).square().mean() / one[weight].square().mean()) < 0.05


def test_what_cannot_be_is_said(digits, start):
    with pytest.raises(InputError, match="allowed are 'auto' and 'identity' with method 'progressive'"):
        training.prepare(pretrained(), method="progressive", bits=1.2, transform="klt")
    with pytest.raises(InputError, match="begins with the float network"):
        training.prepare(pretrained(), method="progressive", bits=1.2, begin=1.5)
    with pytest.raises(InputError, match="states is 5, allowed are 4, 8, 16, 32, 64"):
        training.prepare(pretrained(), method="progressive", bits=1.2, start=start, states=5)
    with pytest.raises(InputError, match="method 'progressive' has no option 'gradual'"):
        training.prepare(pretrained(), method="progressive", bits=1.2, gradual=True)
    other = tq.compress(pretrained(), [digits[0][0][:64]], bits=3, transform="klt", axis="input", effort=1, trellis=False)
    with pytest.raises(InputError, match="compress anew"):
        training.prepare(pretrained(), [digits[0][0][:64]], method="progressive", bits=1.2, start=other)
    network = training.prepare(pretrained(), method="progressive", bits=1.2, start=start, steps=50)
    with pytest.raises(InputError, match="needs calibration samples"):
        network.penalty()


def test_columns_that_are_not_used_change_no_steps_and_take_next_to_nothing():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    x = torch.randn(256, 64) @ torch.randn(64, 64)
    wide = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    wide.load_state_dict(model.state_dict() | {"0.weight": torch.cat([model[0].weight.data, torch.zeros(128, 64)], 1)})
    small = tq.compress(model, [x], distortion=0.01, effort=1)
    large = tq.compress(wide, [torch.cat([x, torch.zeros(256, 64)], 1)], distortion=0.01, effort=1)
    assert len(large.data) < 1.06 * len(small.data)
    found = large.state_dict()["0.weight"][:, 64:]
    assert float(found.abs().max()) < 1e-6
    d_out, d_in = np.ones((1, 8)), np.array([[1.0, 2.0, 4.0, 1e-9]])
    dead = np.array([False, False, False, True])
    assert matrix_steps(d_out, d_in, 1, Grouping("r", 1.0), dead).qp == matrix_steps(d_out, d_in[:, :3], 1, Grouping("r", 1.0)).qp
