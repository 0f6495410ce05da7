"""Soft weights, from a compressed network and back: prepare, train, harden."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import transquant as tq
from training_loop import train
from transquant import codec, training
from transquant.demo.network import DigitsNet, load_digits_split, pretrained
from transquant.errors import InputError, TargetError


@pytest.fixture(scope="module")
def digits():
    (x, y), test = load_digits_split()
    return x, y, test


@pytest.fixture(scope="module")
def start(digits):
    return tq.compress(pretrained(), [digits[0][:256]], bits=1.5, trellis=False, effort=1)


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
    train(model, network, digits[:2], 120)
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


def test_weights_stay_what_they_were_when_all_steps_change(start):
    model = pretrained()
    network = training.prepare(model, bits=1.5, start=start)
    before = {name: network.originals(name)[0] * weight.unit.reshape(-1)[0] for name, weight in network.soft.items()}
    mantissa, exponent = network.template.container.step
    network.rescale((mantissa // 2 + 1024, exponent))
    for name, weight in network.soft.items():
        torch.testing.assert_close(network.originals(name)[0] * weight.unit.reshape(-1)[0], before[name])
    network.target = None  # as it is, however large
    soft = model.features[0].weight.detach().clone()
    compressed = training.harden(model)
    torch.testing.assert_close(compressed.state_dict()["features.0.weight"], soft, rtol=1e-5, atol=1e-7)


class Tied(nn.Module):
    """A small language model whose decoder is its embedding, with a recurrent layer between."""

    def __init__(self):
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(32, 24), nn.LSTM(24, 24, 1, batch_first=True)
        self.decoder = nn.Linear(24, 32, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, ids):
        return self.decoder(self.rnn(self.embedding(ids))[0])


def test_tied_and_recurrent_weights_learn_and_stay_tied():
    torch.manual_seed(0)
    model, ids = Tied(), torch.randint(0, 32, (16, 12))
    keys = list(model.state_dict())
    network = training.prepare(model, [ids], bits=3.0, effort=1, steps=30)
    optimizer = torch.optim.Adam(network.parameter_groups(0.05))
    before = {n: [p.detach().clone() for p in network.originals(n)] for n in network.soft}
    for _ in range(30):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()) + network.penalty()
        loss.backward()
        optimizer.step()
    for name in network.soft:
        assert not torch.equal(before[name][0], network.originals(name)[0]), name
    assert model.decoder.weight is not model.embedding.weight  # both computed
    torch.testing.assert_close(model.decoder.weight, model.embedding.weight, rtol=0, atol=0)
    compressed = training.harden(model)
    assert model.decoder.weight is model.embedding.weight
    assert list(model.state_dict()) == keys
    fresh = Tied()
    compressed.install(fresh)
    torch.testing.assert_close(model(ids), fresh(ids), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("transform", "axis"), [("elt", "input"), ("klt", "output"), ("elt", "kernel"), ("dct", None), ("klt", "joint")]
)
def test_bases_are_in_the_soft_weights_as_they_are_in_the_file(digits, transform, axis):
    model = pretrained()
    network = training.prepare(model, [digits[0][:128]], bits=3.0, transform=transform, axis=axis, effort=1)
    start = copy.deepcopy(model)
    decoded = training.harden(start)
    seen = 0
    for name, weight in network.soft.items():
        parameters = network.originals(name)
        assert len(parameters) == (2 if weight.tensor.basis is not None else 1)
        seen += weight.tensor.entry.transform != "i"
        own = dict(model.named_modules())[name.removesuffix(".weight")].weight
        torch.testing.assert_close(own, decoded.state_dict()[name], rtol=1e-4, atol=1e-6)
    assert seen >= 2
    train(model, network, digits[:2], 3)
    moved = [p.grad.abs().max() for name in network.soft for p in network.originals(name)]
    assert all(m > 0 for m in moved)


def test_straight_through_gradients_are_those_of_a_float_network_at_the_rounded_weights(digits, start):
    model, twin = pretrained(), pretrained()
    network = training.prepare(model, bits=1.5, start=start)
    with torch.no_grad():
        twin.load_state_dict({**twin.state_dict(), **network.plain_state()})
        for name in network.soft:
            twin.get_parameter(name).copy_(dict(model.named_modules())[name.removesuffix(".weight")].weight)
    x, y = digits[0][:32], digits[1][:32]
    for m in (model, twin):
        functional.cross_entropy(m(x), y).backward()
    plain = {name: w for name, w in network.soft.items() if w.tensor.entry.transform == "i"}
    assert len(plain) >= 2
    for name, weight in plain.items():
        expected = weight.matrix(twin.get_parameter(name).grad) * weight.unit
        torch.testing.assert_close(weight.matrix(network.originals(name)[0].grad), expected, rtol=1e-4, atol=1e-7)


def test_code_lengths_follow_the_file_and_their_gradient_is_their_slope(digits, start):
    model = pretrained()
    network = training.prepare(model, bits=1.5, start=start)
    network.look()
    with torch.no_grad():
        estimated = sum(float(w.bits(network.lengths, *network.originals(n))) for n, w in network.soft.items())
    report = codec.load_bytes(network.file()).report
    payload = sum(r.payload_bits for r in report.layers if r.kind == "weight")
    assert abs(estimated / payload - 1) < 0.15
    name, weight = next(iter(network.soft.items()))
    (u,) = (p.detach().double().requires_grad_() for p in network.originals(name))
    weight.bits(network.lengths, u).backward()
    place = tuple(i // 2 for i in u.shape)
    moved = u.detach().clone()
    moved[place] += 1e-4
    low, high = (float(weight.bits(network.lengths, v)) for v in (u.detach(), moved))
    assert abs((high - low) / 1e-4 - float(u.grad[place])) < 0.05 * (1 + abs(float(u.grad[place])))


def test_what_cannot_be_is_said(digits, start):
    model = pretrained()
    with pytest.raises(InputError, match="not prepared"):
        training.harden(model)
    with pytest.raises(InputError, match="allowed are 'transform'"):
        training.prepare(model, bits=1.5, method="magic")
    with pytest.raises(InputError, match="has no option 'colour'"):
        training.prepare(model, bits=1.5, start=start, colour=3)
    with pytest.raises(InputError, match="exactly one target"):
        training.prepare(model, start=start)
    with pytest.raises(InputError, match="another model"):
        training.prepare(nn.Linear(3, 4), bits=8.0, start=start)
    with pytest.raises(InputError, match="trellis"):
        training.prepare(model, bits=1.5, start=tq.compress(pretrained(), bits=1.5, effort=1))
    training.prepare(model, bits=1.5, start=start)
    with pytest.raises(InputError, match="prepared already"):
        training.prepare(model, bits=1.5, start=start)
    model.classifier.extra = nn.Linear(2, 2)
    with pytest.raises(InputError, match="changed since it was prepared"):
        training.harden(model)
    tiny = pretrained()
    training.prepare(tiny, size=400, start=start)
    with pytest.raises(TargetError, match="the smallest takes"):
        training.harden(tiny)


def test_symbols_that_stay_do_not_change_and_more_stay_with_every_look(digits, start):
    model = pretrained()
    network = training.prepare(model, bits=1.5, start=start, steps=100, gradual=True)
    network.target = None  # whatever its size
    model.train()
    optimizer, shares = None, []
    for step in range(88):
        held = {n: (w.stays.clone(), network.coded(0.0)[n].symbols) for n, w in network.soft.items() if w.stays is not None}
        optimizer = train(model, network, digits[:2], step + 1, step, optimizer)
        shares.append(network.held)
        now = network.coded(0.0)
        for name, (stays, symbols) in held.items():
            weight, stays = network.soft[name], stays.numpy()
            assert bool(weight.stays.numpy()[stays].all())
            np.testing.assert_array_equal(now[name].symbols[stays], symbols[stays])
            gradient = weight.matrix(network.originals(name)[0].grad)
            assert float(gradient[torch.from_numpy(stays)].abs().max()) == 0.0
    assert shares == sorted(shares)
    assert shares[5] == 0 < shares[20]
    assert shares[-1] > 0.9
    for name, weight in network.soft.items():
        assert abs(float(weight.stays.double().mean()) - network.held) < 0.15, name
    train(model, network, digits[:2], 91, 88, optimizer)
    assert network.settled
    assert all(weight.stays is None for weight in network.soft.values())


def test_nothing_stays_while_the_file_is_too_large(digits, start):
    model = pretrained()
    network = training.prepare(model, bits=1.0, start=start, steps=100, gradual=True)
    train(model, network, digits[:2], 21)
    assert network.schedule.held(network.progress) > 0
    assert network.bytes > 1.02 * network.wanted()
    assert network.held == 0


def test_of_two_adaptive_coders_training_takes_the_smaller(start):
    model = pretrained()
    network = training.prepare(model, bits=1.5, start=start)
    state = start.state_dict()
    sizes = {c: len(replace(network.template, coder=c).file(network.template.weights, state, {})) for c in ("m", "s")}
    assert len(network.template.file(network.template.weights, state, {})) == min(sizes.values())
    assert len(set(sizes.values())) == 2
    plain = tq.compress(pretrained(), bits=3.0, trellis=False, effort=1, coder="static")
    twin = pretrained()
    assert training.prepare(twin, bits=3.0, start=plain).template.coder == "l"
