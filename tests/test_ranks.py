"""Few bands: the best basis of every rank, ranks by one multiplier, files of them, and the work they really take."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import transquant as tq
from layer_models import Pipe
from transquant import inference, rank_choice, running
from transquant.errors import InputError, TargetError
from transquant.inference import Calls
from transquant.quantizers.metric import quadratic_form
from transquant.rank_choice import choose_ranks
from transquant.records import LayerStats, Plan, WeightSpec
from transquant.transforms.fit import low_rank
from transquant.transforms.frame import band_cost
from transquant.transforms.layout import Layout
from transquant.transforms.reduced import ReducedFrame, ranked


def moment(n, seed, spread=0.5):
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((4 * n, n)) * np.exp(spread * generator.standard_normal(n))
    return x.T @ x / len(x)


def run(model, batch):
    return model(batch)


def test_no_basis_of_that_rank_errs_less():
    generator = np.random.default_rng(0)
    x, g, m = generator.standard_normal((6, 11)), moment(6, 1), moment(11, 2)
    basis, values = low_rank(x, g, m)
    for rank in range(1, 6):
        frame = ReducedFrame(Layout("r", 6, 11, 1), basis[:, :rank])
        error = x - frame.synthesize(frame.analyze(x, g))
        best = quadratic_form(error, m, g)
        assert best == pytest.approx((values[rank:] ** 2).sum(), rel=0.02)  # the regularisation of the basis
        for seed in range(20):
            other = ReducedFrame(frame.layout, basis[:, :rank] + 0.05 * np.random.default_rng(seed).standard_normal((6, rank)))
            error = x - other.synthesize(other.analyze(x, g))
            assert quadratic_form(error, m, g) > best * (1 - 1e-3)


def test_coefficients_are_the_best_for_the_basis_as_decoded():
    generator = np.random.default_rng(0)
    weight, g, a = generator.standard_normal((5, 12)), moment(5, 1), moment(12, 2, 0.3)
    layout = Layout("r", 5, 4, 3)
    frame = ReducedFrame(layout, np.rint(4 * ranked(layout, weight, a, g)[0][:, :3]) / 4)
    coeffs = frame.analyze(weight, g)
    best = quadratic_form(weight - frame.synthesize(coeffs), a, g)
    for seed in range(10):
        other = coeffs + 0.01 * np.random.default_rng(seed).standard_normal(coeffs.shape)
        assert quadratic_form(weight - frame.synthesize(other), a, g) > best


@pytest.mark.parametrize("axis", ["r", "c"])
def test_the_metric_of_coefficients_is_that_of_the_weight(axis):
    generator = np.random.default_rng(0)
    layout = Layout(axis, 6, 4, 3)
    frame = ReducedFrame(layout, generator.standard_normal((6 if axis == "r" else 4, 3)))
    a, g = moment(12, 2), moment(6, 1)
    ((own_a, own_g),) = frame.moments([(a, g)])
    error = generator.standard_normal((3, 12) if axis == "r" else (6, 9))
    assert quadratic_form(error, own_a, own_g) == pytest.approx(quadratic_form(frame.synthesize(error), a, g), rel=1e-9)


def problem(seed=0, layers=3):
    generator = np.random.default_rng(seed)
    specs, stats, values, calls = [], {}, {}, {}
    for k in range(layers):
        rows, channels, taps = [(6, 5, 1), (5, 4, 4), (8, 3, 1)][k]
        n = channels * taps
        name = f"m{k}.weight"
        specs.append(WeightSpec(name, f"m{k}", "conv2d", (rows, channels, taps, 1), "float32"))
        stats[name] = LayerStats(moment(n, seed + k)[None], moment(rows, seed + 9 + k)[None], 100, 1.0, 0.1)
        values[name] = generator.standard_normal((rows, n))
        calls[f"m{k}"] = Calls(100 * rows * n, 130, 100)
    calls["other"] = Calls(1000, 0, 0)
    return Plan(tuple(specs), 0, 0), stats, values, calls


@pytest.mark.parametrize("share", [0.95, 0.8, 0.6, 0.4])
def test_ranks_are_near_the_best_of_all_combinations(share):
    plan, stats, values, calls = problem()
    chosen, taken = choose_ranks(plan, stats, values, calls, share)
    assert taken <= share
    total = sum(c.macs for c in calls.values())
    lists = [rank_choice._ranks(s, values[s.name], stats[s.name], calls[s.module]) for s in plan.specs]
    best = min(
        sum(r.distortion for r in picks)
        for picks in itertools.product(*lists)
        if sum(r.macs for r in picks) + 1000 <= share * total
    )
    found = 0.0
    for spec, own in zip(plan.specs, lists, strict=True):
        t = chosen.get(spec.name)
        found += next(
            r.distortion for r in own if (t is None and not r.kept) or (t is not None and (r.axis, r.kept) == (t.axis, t.kept))
        )
    assert best <= found * (1 + 1e-9) <= 1.6 * best  # one multiplier reaches the convex hull


def test_what_is_predicted_of_a_rank_is_what_it_does():
    plan, stats, values, calls = problem()
    for spec in plan.specs:
        a, g = stats[spec.name].input_moment[0], stats[spec.name].output_moment[0]
        for rank in rank_choice._ranks(spec, values[spec.name], stats[spec.name], calls[spec.module])[1:]:
            layout = Layout(rank.axis, spec.shape[0], spec.shape[1], spec.shape[2])
            frame = ReducedFrame(layout, ranked(layout, values[spec.name], a, g)[0][:, : rank.kept])
            error = values[spec.name] - frame.synthesize(frame.analyze(values[spec.name], band_cost(layout, a, g)))
            assert quadratic_form(error, a, g) == pytest.approx(rank.distortion, rel=0.05)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.norm, self.last = nn.BatchNorm2d(24), Pipe(nn.Conv2d(24, 32, 3), 32)

    def forward(self, x):
        return 3 * self.last(torch.relu(self.norm(self.middle(torch.relu(self.first(x))))))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval(), torch.randn(200, 3, 10, 10)


@pytest.mark.parametrize(("share", "effort", "trellis"), [(0.9, 1, True), (0.6, 3, True), (0.6, 1, False), (0.75, 5, True)])
def test_a_file_runs_with_the_share_that_was_asked_for(net, tmp_path, share, effort, trellis):
    model, samples = net
    compressed = tq.compress(model, samples, bits=6.0, objective="macs", macs=share, effort=effort, trellis=trellis)
    compressed.save(tmp_path / "net.tq")
    assert len(compressed.data) <= 6.0 / 8 * sum(p.numel() for p in model.parameters())
    decoded = compressed.install(copy.deepcopy(model))
    installed = tq.load(tmp_path / "net.tq").install(copy.deepcopy(model), mode="transform")
    before, after = (sum(inference.count_macs(m, samples[:1], run).values()) for m in (model, installed))
    settings = compressed.report.settings["macs"]
    assert after <= share * before
    assert after == pytest.approx(settings["share"] * before, rel=1e-6)
    assert settings["bands"]
    kept = running.installed(installed).layers
    assert all(kept[name].startswith(f"two layers, {bands} of") for name, bands in settings["bands"].items())
    with torch.no_grad():
        expected, found = decoded(samples), installed(samples)
    assert float((expected - found).norm() / expected.norm()) < 1e-5
    for name, array in tq.reader.load(tmp_path / "net.tq").items():  # numpy alone gives the same bits
        assert np.array_equal(array, decoded.state_dict()[name].numpy()), name


def test_fewer_multiply_adds_cost_more_distortion(net):
    model, samples = net
    measured = [
        tq.compress(model, samples, bits=7.0, objective="macs", macs=share, effort=1).report.measured_distortion
        for share in (0.95, 0.7, 0.4)
    ]
    assert measured == sorted(measured)


def test_what_cannot_be_asked_for(net):
    model, samples = net
    with pytest.raises(TargetError, match=r"macs=0\.0001 cannot be reached: with one band a layer"):
        tq.compress(model, samples, bits=6.0, objective="macs", macs=0.0001)
    for macs in (0, 1.5, True, "0.5"):
        with pytest.raises(InputError, match="macs is .*, allowed are shares"):
            tq.compress(model, samples, bits=6.0, objective="macs", macs=macs)
    with pytest.raises(InputError, match="give both objective='macs' and macs"):
        tq.compress(model, samples, bits=6.0, objective="macs")
    with pytest.raises(InputError, match="give both objective='macs' and macs"):
        tq.compress(model, samples, bits=6.0, macs=0.5)
    with pytest.raises(InputError, match="needs calibration data"):
        tq.compress(model, bits=6.0, objective="macs", macs=0.5)
    with pytest.raises(InputError, match="a metric of the output"):
        tq.compress(model, samples, bits=6.0, objective="macs", macs=0.5, metric="weights")
    with pytest.raises(InputError, match="transform 'auto'"):
        tq.compress(model, samples, bits=6.0, objective="macs", macs=0.5, transform="klt")


def test_a_model_in_train_mode_is_not_changed():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3)
    ).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tq.compress(model, torch.randn(20, 3, 8, 8), bits=6.0, objective="macs", macs=0.9, effort=1)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
