from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import transquant as tq
from transquant.choices import Choice, Method
from transquant.encoder import Encoder, Source
from transquant.modules import gather, micro_batches, plan_model
from transquant.refinement import live_in_order, refine, samples_in_order
from transquant.stats import PairedNetworks, Reference, collect
from transquant.stats.absorbers import absorbers
from transquant.stats.paired import MOST_LIVE
from transquant.workers import workers
from walks import noisy, paired, run, walked


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
        found = walked(paired(model, x, pool), state)
        a, b = (torch.relu(m.first(x)).transpose(1, 2) for m in (model, other))
        inner = [torch.tanh(m.twice(y)) for m, y in ((model, a), (other, b))]
        final = [torch.tanh(m.twice(y)).double().flatten(0, 1) for m, y in zip((model, other), inner, strict=True)]
    assert list(found) == ["first.weight", "twice.weight", "last.weight"]
    assert found["first.weight"] is None  # the same inputs in both
    assert found["twice.weight"] is None  # what it sees in its second call depends on itself
    torch.testing.assert_close(found["last.weight"].cross[0], final[0].T @ final[1], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found["last.weight"].moment[0], final[1].T @ final[1], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found["last.weight"].other[0], final[1].sum(0), rtol=1e-5, atol=1e-4)
    assert found["last.weight"].count.tolist() == [40 * 8]


class Sequence(nn.Module):
    """Modules with several weights, and with weights in a module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mix = nn.Embedding(9, 6), nn.Conv1d(6, 6, 3, groups=2, padding=1)
        self.memory, self.attention = nn.LSTM(6, 4, batch_first=True), nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.mix(self.tokens(x).transpose(1, 2))).transpose(1, 2)
        x, _ = self.memory(x)
        return self.last(x + self.attention(x, x, x)[0]).mean(1)


def straightforward(model, x):
    """What meets each weight of a `Sequence`, (groups, inputs, positions), and the network's output; PyTorch's own arithmetic."""
    tokens = model.tokens(x).transpose(1, 2)
    patches = nn.functional.unfold(tokens[:, :, None], (1, 3), padding=(0, 1))  # (N, 6 * 3, T)
    mixed = torch.relu(model.mix(tokens)).transpose(1, 2)
    states, _ = model.memory(mixed)
    before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
    a = model.attention
    turned = states.transpose(0, 1)
    heads = nn.functional.multi_head_attention_forward(
        turned, turned, turned, 4, 2, a.in_proj_weight, a.in_proj_bias, None, None, False, 0.0, torch.eye(4), None
    )[0]
    added = states + a(states, states, states)[0]
    rows = {"memory.weight_ih_l0": mixed, "memory.weight_hh_l0": before, "attention.in_proj_weight": states}
    rows |= {"attention.out_proj.weight": heads, "last.weight": added}
    found = {name: value.flatten(0, 1).T[None] for name, value in rows.items()}
    found["attention.in_proj_weight"] = found["attention.in_proj_weight"].expand(3, -1, -1)
    return found | {"mix.weight": patches.reshape(len(x), 2, 9, -1).permute(1, 2, 0, 3).flatten(2)}, model.last(added).mean(1)


def test_pairs_of_a_walk_are_those_of_forwards_from_the_start():
    torch.manual_seed(0)
    model, so_far = Sequence().eval(), Sequence().eval()
    so_far.load_state_dict(model.state_dict())
    state, x = noisy(model, 0.5), torch.randint(0, 9, (70, 8))
    found = []

    @torch.no_grad()
    def visit(name, pairs):
        found.append(name)
        if name != "tokens.weight":
            (one, wanted), (two, output) = straightforward(model, x), straightforward(so_far, x)
            torch.testing.assert_close((model(x), so_far(x)), (wanted, output))
            a, b = one[name].double(), two[name].double()
            same = {"rtol": 1e-5, "atol": 1e-4}
            torch.testing.assert_close(pairs.cross, a @ b.transpose(1, 2), **same)
            torch.testing.assert_close(pairs.moment, b @ b.transpose(1, 2), **same)
            torch.testing.assert_close(pairs.total, a.sum(2), **same)
            torch.testing.assert_close(pairs.other, b.sum(2), **same)
            assert float((pairs.cross - pairs.moment).abs().max()) > 0.01
            assert pairs.count.tolist() == [a.shape[2]] * len(a)
        else:
            assert pairs is None
        so_far.load_state_dict({name: state[name]}, strict=False)
        return {name: state[name]}

    with workers() as pool:
        networks = paired(model, x, pool)
        networks.walk(visit)
        assert tuple(found) == networks.order
        assert set(found) == {s.name for s in plan_model(model).specs if s.name in state and state[s.name].ndim > 1}
        so_far.load_state_dict(model.state_dict())
        found.clear()
        networks.walk(visit)  # again, from the float weights


@pytest.mark.parametrize("centre", [False, True])
def test_refit_is_the_least_squares_solution(centre):
    model, other, state, x = networks(200)
    with workers() as pool, torch.no_grad():
        pair = walked(paired(model, x, pool), state)["last.weight"]
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
        pair = walked(paired(model, x, pool), state)["2.weight"]
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
    assert live_in_order(5) is None
    assert live_in_order(7) > MOST_LIVE
    assert samples_in_order(wide, 5) == 0 < samples_in_order(wide, 9)
    asked = 3.0
    files = [tq.compress(net, [images], bits=asked, effort=effort) for effort in (4, 5)]
    limit = asked * sum(p.numel() for p in net.parameters()) / 8
    assert all(limit - 65 <= len(f.data) <= limit for f in files)  # as for any target of a few hundred bytes
    assert files[1].report.measured_distortion <= files[0].report.measured_distortion
    said = files[1].report.settings["in_order"]
    assert said == (files[1].data != files[0].data) == ("in execution order" in str(files[1].report))
    assert not files[0].report.settings["in_order"]


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
        assert [name for name, pair in walked(pairs, state).items() if pair is not None] == ["free.weight"]
        state["normed.bias"] = torch.full((5,), float("nan"))
        assert walked(pairs, state)["free.weight"] is None
        assert "free.weight" in walked(pairs, {})


def test_values_are_revised_many_times(net, images):
    """Once or twice a layer, in networks of hundreds of layers."""
    with workers() as pool:
        encoder, _, _ = setting(net, images[:40], pool)
    before = encoder.source.values["linear.weight"]
    for k in range(3000):
        encoder = encoder.revised({"conv.bias": np.full(16, float(k))}, {}, {})
    assert encoder.source.values["conv.bias"][0] == 2999
    np.testing.assert_array_equal(encoder.source.values["linear.weight"], before)
