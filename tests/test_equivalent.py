"""Weights with which a network computes the same: fewer columns behind a small vocabulary, one bias instead of two."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import transquant as tq
from transquant import modules, training
from transquant.errors import InputError
from transquant.training.equivalent import fewer_columns, one_bias

TOKENS, WIDTH = 12, 20


class Reader(nn.Module):
    """An embedding and what reads it."""

    def __init__(self, reader, after=None, **more):
        super().__init__()
        self.embedding, self.reader, self.after = nn.Embedding(TOKENS, WIDTH, **more), reader, after

    def forward(self, ids):
        x = self.embedding(ids)
        found = self.reader(x)
        found = found[0] if isinstance(found, tuple) else found
        return found if self.after is None else self.after(self, x, found)


@pytest.fixture
def ids():
    """Two of the tokens never come."""
    return torch.randint(0, TOKENS - 2, (40, 9), generator=torch.Generator().manual_seed(0))


def changed(model, ids):
    return fewer_columns(model, modules.plan_model(model), [ids], None, None)


@pytest.mark.parametrize(
    ("make", "centred"),
    [
        (lambda: nn.LSTM(WIDTH, 8, 2, batch_first=True), True),
        (lambda: nn.GRU(WIDTH, 8, batch_first=True), True),
        (lambda: nn.RNN(WIDTH, 8, batch_first=True, bias=False), False),
        (lambda: nn.LSTM(WIDTH, 8, batch_first=True, bidirectional=True), False),
        (lambda: nn.Linear(WIDTH, 8), True),
        (lambda: nn.Linear(WIDTH, 8, bias=False), False),
    ],
)
def test_outputs_stay_and_columns_go(make, centred, ids):
    torch.manual_seed(1)
    model = Reader(make()).train()
    everything = torch.arange(TOKENS)[None]
    before, all_before = model(ids), model(everything)
    assert changed(model, ids) == ["embedding"]
    assert model.training
    torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(everything), all_before, rtol=1e-3, atol=1e-4)  # also those that the samples do not have
    left = TOKENS - 1 if centred else TOKENS
    weights = [p for n, p in model.reader.named_parameters() if "weight_ih_l0" in n or n == "weight"]
    for weight in (model.embedding.weight, *weights):
        assert int((weight.abs().sum(0) > 0).sum()) == left
    x = model.embedding(torch.cat([ids.flatten(), torch.arange(TOKENS)])).double()
    moment = x.T @ x / len(x)
    power = moment.diagonal()
    correlated = moment[:left, :left] / (power[:left, None] * power[:left]).sqrt() - torch.eye(left)
    assert correlated.abs().max() < 1e-3
    if centred:
        assert x.mean(0).abs().max() < 1e-4 * x.std()


def test_several_readers_are_turned_together(ids):
    torch.manual_seed(2)
    model = Reader(nn.LSTM(WIDTH, 8, batch_first=True), lambda m, x, found: found + m.other(x))
    model.other = nn.Linear(WIDTH, 8)
    before = model(ids)
    assert changed(model, ids) == ["embedding"]
    torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("after", [lambda m, x, found: found + x[..., :8], lambda m, x, found: torch.relu(x) @ x.transpose(1, 2)])
def test_what_is_read_by_more_than_layers_stays(after, ids):
    model = Reader(nn.LSTM(WIDTH, 8, batch_first=True), after)
    state = copy.deepcopy(model.state_dict())
    assert changed(model, ids) == []
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def tied(model):
    model.tail = nn.Linear(WIDTH, TOKENS)
    model.tail.weight = model.embedding.weight
    return model


@pytest.mark.parametrize(
    "model",
    [
        tied(Reader(nn.LSTM(WIDTH, 8, batch_first=True))),
        Reader(nn.LSTM(WIDTH, 8, batch_first=True), max_norm=1.0),
        Reader(nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, 8))),
        Reader(nn.LSTM(WIDTH, 8, batch_first=True).requires_grad_(False)),
        nn.Sequential(nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, 8)),
    ],
    ids=["tied", "max_norm", "tanh", "frozen", "as many tokens"],
)
def test_what_stays_as_it_is(model, ids):
    state = copy.deepcopy(model.state_dict())
    assert changed(model, ids) == []
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_exact_weights_stay(ids):
    model = Reader(nn.Linear(WIDTH, 8))
    plan = modules.apply_overrides(modules.plan_model(model), {"embedding.*": "exact"})
    assert fewer_columns(model, plan, [ids], None, None) == []


@pytest.mark.parametrize(("kind", "same"), [(nn.LSTM, True), (nn.RNN, True), (nn.GRU, False)])
def test_of_two_biases_that_are_added_one_is_enough(kind, same, ids):
    model = Reader(kind(WIDTH, 8, 2, batch_first=True))
    before = model(ids)
    state = one_bias(model, modules.plan_model(model), model.state_dict())
    assert bool((state["reader.bias_hh_l1"] == 0).all()) == same
    model.load_state_dict(state)
    torch.testing.assert_close(model(ids), before, rtol=1e-5, atol=1e-6)


def test_a_bias_of_two_layers_stays(ids):
    model = Reader(nn.LSTM(WIDTH, 8, batch_first=True))
    model.other = nn.LSTM(WIDTH, 8, batch_first=True)
    model.other.bias_hh_l0 = model.reader.bias_hh_l0
    state = one_bias(model, modules.plan_model(model), model.state_dict())
    torch.testing.assert_close(state["reader.bias_hh_l0"], model.reader.bias_hh_l0, rtol=0, atol=0)


def test_prepare_does_both_and_can_leave_it(ids):
    torch.manual_seed(3)
    for equivalent in (True, False):
        model = Reader(nn.LSTM(WIDTH, 16, batch_first=True))
        x = model(ids).detach()
        training.prepare(model, [ids], bits=6.0, effort=1, equivalent=equivalent)
        assert (model.reader.weight_ih_l0.detach().abs().sum(0) == 0).any() == equivalent
        compressed = training.harden(model)
        assert bool((compressed.state_dict()["reader.bias_hh_l0"] == 0).all())
        assert (model(ids) - x).square().mean() < 0.01 * x.square().mean()
    with pytest.raises(InputError, match="equivalent"):
        training.prepare(Reader(nn.Linear(WIDTH, 8)), [ids], bits=6.0, equivalent="yes")


def test_fit_ends_with_the_same_bits_after_a_kill(ids, tmp_path):
    torch.manual_seed(4)
    model = Reader(nn.LSTM(WIDTH, 16, batch_first=True))
    labels = ids % 2

    class Stop(Exception):
        pass

    def stop(moment):
        if moment.step == 13:
            raise Stop

    given = {
        "bits": 4.0,
        "epochs": 6,
        "gradual": True,
        "batch": 8,
        "effort": 1,
        "loss": lambda out, y: (out.mean(-1) - y).square().mean(),
    }
    whole = tq.training.fit(model, (ids, labels), **given).compressed
    with pytest.raises(Stop):
        tq.training.fit(model, (ids, labels), work=tmp_path / "w", watch=stop, **given)
    again = tq.training.fit(model, (ids, labels), work=tmp_path / "w", **given).compressed
    assert again.data == whole.data
