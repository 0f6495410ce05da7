"""Hints: what layers put out beside what the teacher's layers do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from transquant import training
from transquant.errors import InputError
from transquant.training.hints import Hints


class Twice(nn.Module):
    """One layer that runs twice, and one that puts out a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.lstm = nn.Linear(6, 6), nn.LSTM(6, 4, batch_first=True)

    def forward(self, x):
        return self.lstm(self.linear(torch.tanh(self.linear(x))))[0][:, -1]


def other(model, seed=0):
    torch.manual_seed(seed)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return twin


def test_the_loss_is_the_mean_squared_difference_in_units_of_the_variance():
    teacher, x = Twice(), torch.randn(5, 3, 6)
    model = other(teacher)
    hints = Hints(model, teacher, ["linear", "lstm"])
    with hints.seen():
        model(x), teacher(x)
    expected = []
    for t, s in (
        (teacher.linear(x), model.linear(x)),
        (teacher.linear(torch.tanh(teacher.linear(x))), model.linear(torch.tanh(model.linear(x)))),
        (teacher.lstm(teacher.linear(torch.tanh(teacher.linear(x))))[0], model.lstm(model.linear(torch.tanh(model.linear(x))))[0]),
    ):
        expected.append((s - t).square().mean() / (t - t.mean()).square().mean())
    wanted = (expected[0] + expected[1]) / 4 + expected[2] / 2
    torch.testing.assert_close(hints.loss(), wanted)
    assert not model.linear._forward_hooks
    assert not teacher.lstm._forward_hooks


def test_gradients_reach_the_network_and_not_the_teacher():
    teacher, x = Twice().double(), torch.randn(5, 3, 6, dtype=torch.float64)
    model = other(teacher)
    hints = Hints(model, teacher, ["linear"])

    def loss():
        with hints.seen():
            model(x), teacher(x)
        return hints.loss()

    loss().backward()
    assert all(p.grad is None for p in teacher.parameters())
    weight, step = model.linear.weight, 1e-4
    with torch.no_grad():
        weight[2, 3] += step
        above = loss()
        weight[2, 3] -= 2 * step
        below = loss()
    assert weight.grad[2, 3].item() == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-6)


def test_a_network_with_hints_stays_nearer_to_its_teacher():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5))
    x = torch.randn(512, 12, generator=torch.Generator().manual_seed(2))
    data = x, model(x).argmax(1)
    given = {"method": "qat", "bits": 2, "epochs": 6, "batch": 64, "effort": 1, "teacher": "self", "rate": 0.05}

    def distance(**more):
        small = training.fit(model, data, **given, **more).compressed.install(copy.deepcopy(model))
        with torch.no_grad():
            return (small[:4](x) - model[:4](x)).square().mean().item()

    assert distance(hints=["1", "3"]) < 0.8 * distance()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hints": "1"}, "hints is '1', allowed are lists of names"),
        ({"hints": ["7"]}, "the model has no layer '7', it has '0', '1', '2'$"),
        ({"hints": [""]}, "the model has no layer ''"),
        ({"hints": ["1"], "teacher": None}, "hints come from a teacher"),
        ({"hints": ["1"], "hint": 0}, "hint is 0, allowed are numbers above 0"),
        ({"hints": ["1"], "teacher": nn.Linear(12, 5)}, "the teacher has no layer '1'"),
        (
            {"hints": ["1"], "teacher": nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5))},
            "puts out .32, 24., the teacher's .32, 9.",
        ),
    ],
)
def test_bad_hints(change, message):
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5))
    x = torch.randn(64, 12)
    given = {"method": "qat", "bits": 4, "epochs": 1, "batch": 32, "effort": 1, "teacher": "self", **change}
    with pytest.raises(InputError, match=message):
        training.fit(model, (x, x[:, :5].argmax(1)), **given)


def test_a_layer_that_does_not_run():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    model = Idle()
    hints = Hints(model, copy.deepcopy(model), ["idle"])
    with hints.seen():
        model(torch.zeros(1, 3))
    with pytest.raises(InputError, match="'idle' runs 0 times in the model"):
        hints.loss()
