from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import transquant as tq
from transquant.choices import Choice, Method
from transquant.encoder import Encoder, Source
from transquant.modules import gather, micro_batches, plan_model, run_batch
from transquant.refinement import refine, samples_in_order
from transquant.stats import PairedNetworks, Reference, collect
from transquant.stats.absorbers import absorbers
from transquant.workers import workers


class Backwards(nn.Module):
    """Runs its layers in another order than it names them; one of them twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 4, bias=False)
        self.twice = nn.Linear(6, 6)
        self.first = nn.Conv1d(4, 6, 3, groups=2, padding=1)
        self.never = nn.Linear(3, 3)

    def forward(self, x):
        x = torch.relu(self.first(x)).transpose(1, 2)
        return self.last(torch.tanh(self.twice(torch.tanh(self.twice(x))))).mean(1)


class Block(nn.Module):
    """Convolutions before a BatchNorm: alone, one whose output is used again, and one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.alone, self.again, self.biased = (nn.Conv2d(4, 4, 3, padding=1, bias=k == 2) for k in range(3))
        self.norms = nn.ModuleList([nn.BatchNorm2d(4) for _ in range(3)])
        for norm in self.norms:
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, x):
        x = torch.relu(self.norms[0](self.alone(x)))
        y = self.again(x)
        x = y + torch.relu(self.norms[1](y))
        return self.norms[2](self.biased(x)).mean((2, 3))


def run(model, batch):
    return run_batch(model, batch)


def paired(model, samples, pool):
    return PairedNetworks(model, list(micro_batches([samples])), plan_model(model), run, pool)


def noisy(model, amount, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {k: v + amount * v.std() * torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()}


def networks(samples):
    """A network, another with noisy weights, those weights, and samples."""
    torch.manual_seed(0)
    model, other = Backwards().eval(), Backwards().eval()
    state = noisy(model, 0.3)
    other.load_state_dict(state)
    return model, other, state, torch.randn(samples, 4, 8)


def test_order_is_that_of_execution():
    with workers() as pool:
        found = paired(Backwards().eval(), torch.randn(40, 4, 8), pool)
    assert found.order == ("first.weight", "twice.weight", "last.weight")


def test_sums_equal_brute_force():
    model, other, state, x = networks(40)
    with workers() as pool, torch.no_grad():
        found = paired(model, x, pool).measure(["first.weight", "last.weight", "twice.weight", "never.weight"], state)
        a, b = (torch.relu(m.first(x)).transpose(1, 2) for m in (model, other))
        inner = [torch.tanh(m.twice(y)) for m, y in ((model, a), (other, b))]
        final = [torch.tanh(m.twice(y)).double().flatten(0, 1) for m, y in zip((model, other), inner, strict=True)]
    assert set(found) == {"first.weight", "last.weight", "twice.weight"}
    assert found["twice.weight"].count.tolist() == [2 * 40 * 8]
    torch.testing.assert_close(found["last.weight"].cross[0], final[0].T @ final[1], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found["last.weight"].moment[0], final[1].T @ final[1], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found["last.weight"].other[0], final[1].sum(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found["first.weight"].cross, found["first.weight"].moment)  # the same inputs in both
    assert found["first.weight"].cross.shape == (2, 6, 6)


@pytest.mark.parametrize("centre", [False, True])
def test_refit_is_the_least_squares_solution(centre):
    model, other, state, x = networks(200)
    with workers() as pool, torch.no_grad():
        pair = paired(model, x, pool).measure(["last.weight"], state)["last.weight"]
        one, two = (torch.tanh(m.twice(torch.tanh(m.twice(torch.relu(m.first(x)).transpose(1, 2))))) for m in (model, other))
    weight = model.last.weight.detach().double()
    one, two = one.double().flatten(0, 1), two.double().flatten(0, 1)
    if centre:
        one, two = one - one.mean(0), two - two.mean(0)
    best = torch.linalg.lstsq(two, one @ weight.T).solution.T
    fitted = torch.from_numpy(pair.refit(weight.numpy(), 0.0, centre))
    torch.testing.assert_close(fitted, best, rtol=1e-3, atol=1e-4)
    assert float((fitted - weight).norm()) > 0.05 * float(weight.norm())
    held = torch.from_numpy(pair.refit(weight.numpy(), 1e9, centre))
    torch.testing.assert_close(held, weight, rtol=1e-5, atol=1e-6)


def test_refit_of_weights_whose_rows_meet_the_inputs():
    """z = Wᵀ x of a transposed convolution with kernel 1 is a matrix product."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 5, 1), nn.Tanh(), nn.ConvTranspose1d(5, 4, 1, bias=False)).eval()
    x = torch.randn(300, 3, 4)
    state = noisy(model, 0.3)
    state["2.weight"] = model[2].weight.detach()
    other = nn.Sequential(nn.Conv1d(3, 5, 1), nn.Tanh(), nn.ConvTranspose1d(5, 4, 1, bias=False)).eval()
    other.load_state_dict(state)
    with workers() as pool, torch.no_grad():
        pair = paired(model, x, pool).measure(["2.weight"], state)["2.weight"]
        weight = model[2].weight.detach().double().reshape(5, 4)
        other[2].weight.copy_(torch.from_numpy(pair.refit(weight.numpy(), 0.0, False)).reshape(5, 4, 1))
        wanted, refitted = model(x), other(x)
        other[2].weight.copy_(model[2].weight)
        before = other(x)
    assert pair.by_row
    assert float((refitted - wanted).square().mean()) < 0.8 * float((before - wanted).square().mean())


def test_batchnorms_absorb_only_what_goes_to_them_alone():
    torch.manual_seed(0)
    model = Block().eval()
    assert absorbers(model, torch.randn(8, 4, 6, 6), plan_model(model), run) == {"alone.weight": "norms.0"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Astray(nn.Module):
    """A linear layer over time before a BatchNorm over steps; an output that goes to a BatchNorm and to a logarithm."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.norm = nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)
        self.both, self.other = nn.Conv1d(4, 4, 1, bias=False), nn.BatchNorm1d(4)
        nn.init.constant_(self.both.weight, 1.0)

    def forward(self, x):
        y = self.both(torch.sigmoid(self.norm(self.steps(x))))
        return (self.other(y) + torch.log(y)).mean(2)


def test_batchnorms_over_another_dimension_and_constants_that_end_in_nan():
    torch.manual_seed(0)
    model = Astray().eval()
    nn.init.constant_(model.other.running_var, 1e6)  # constants far below zero
    assert absorbers(model, torch.randn(8, 4, 4), plan_model(model), run) == {}
    assert tq.compress(model, [torch.randn(64, 4, 4)], ratio=1.15).report.measured_distortion >= 0


def setting(model, samples, pool):
    plan = plan_model(model)
    source = Source(*gather(plan, model.state_dict()))
    batches = list(micro_batches([samples]))
    stats = collect(model, batches, plan, run, pool)
    return Encoder(plan, source, stats, pool, Method(state_bits=3)), PairedNetworks(model, batches, plan, run, pool), stats


def test_less_distortion_on_other_samples(net, images):
    """At the same scalar c, and no larger a file."""
    generator = torch.Generator().manual_seed(9)
    others = list(micro_batches([images[torch.randperm(len(images), generator=generator)].flip(-1)]))
    with workers() as pool:
        encoder, pairs, stats = setting(net, images, pool)
        reference = Reference(net, others, run, pool, stats.metric)
        start = encoder.first_guess(0.2 * sum(v.size for v in encoder.source.values.values()))
        plain, ordered, sizes = [], [], []
        for c in start * 2.0 ** np.linspace(-0.2, 0.2, 5):
            drafts = encoder.draft(c, Choice()), refine(encoder, pairs, c, Choice())
            plain.append(reference.distortion(drafts[0].state()))
            ordered.append(reference.distortion(drafts[1].state()))
            sizes.append(len(encoder.encode(drafts[1]).data) / len(encoder.encode(drafts[0]).data))
    assert np.mean(ordered) < 0.9 * np.mean(plain)
    assert np.mean(sizes) < 1.03
    assert not encoder.done  # refine works on a copy


def test_effort_says_who_goes_in_order(net, images):
    with workers() as pool:
        encoder, _, _ = setting(net, images[:16], pool)
    assert samples_in_order(encoder.plan, 4) == 0
    assert 0 < samples_in_order(encoder.plan, 5) < samples_in_order(encoder.plan, 7)
    assert encoder.plan.work == sum(w.size * sum(w.shape) for w in encoder.source.values.values() if w.ndim == 2)
    wide = plan_model(nn.Linear(4096, 4096))
    assert samples_in_order(wide, 5) == 0 < samples_in_order(wide, 9)
    asked = 3.0
    files = [tq.compress(net, [images], bits=asked, effort=effort) for effort in (4, 5)]
    assert all(abs(f.report.bits_per_parameter - asked) < 0.1 for f in files)
    assert files[1].report.measured_distortion <= files[0].report.measured_distortion


class Shared(nn.Module):
    """One weight in two layers, one with a weight norm, and one for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.free = (nn.Linear(5, 5, bias=False) for _ in range(3))
        self.two.weight = self.one.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))

    def forward(self, x):
        return self.free(torch.tanh(self.normed(torch.tanh(self.two(torch.tanh(self.one(x)))))))


def test_weights_that_cannot_be_fitted_for_one_layer_are_left_alone():
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(64, 5)
    state = {"one.weight": model.one.weight.detach() + 0.1, "two.weight": model.one.weight.detach() + 0.1}
    with workers() as pool:
        pairs = paired(model, x, pool)
        names = [s.name for s in plan_model(model).specs]
        assert set(pairs.measure(names, state)) == {"free.weight"}
        state["normed.bias"] = torch.full((5,), float("inf"))
        state["one.weight"] = state["two.weight"] = torch.full((5, 5), float("nan"))
        assert pairs.measure(names, state) == {}
