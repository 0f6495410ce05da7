"""Training at its borders: frozen and shared weights, other modules than the prepared one, divergence, starts that do not fit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import transquant as tq
from transquant import codec, training
from transquant.errors import InputError

METHODS = ("transform", "progressive", "diffq", "crq", "lsq", "qat")


def net(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 100, bias=bias), nn.ReLU(), nn.Linear(100, 10, bias=bias))


@pytest.fixture(scope="module")
def start():
    return tq.compress(net(), bits=4, trellis=False, effort=1)


def step(model, network):
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()).dtype)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    (model(x).float().square().mean() + network.penalty()).backward()
    optimizer.step()


def prepare(model, start, method="transform", **more):
    options = {"keep": ()} if method == "crq" else {}
    if method == "progressive":
        options["calibration"] = [torch.randn(32, 64, generator=torch.Generator().manual_seed(1))]
    return training.prepare(model, method=method, bits=1 if method == "crq" else 4, start=start, **options, **more)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_weights_stay_frozen(start, method):
    model = net()
    model[0].requires_grad_(False)
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    network = prepare(model, start, method)
    step(model, network)
    network.settle()
    training.harden(model)
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before


@pytest.mark.parametrize("method", METHODS)
def test_a_module_with_two_names_has_one_soft_weight(method):
    model = net()
    model.again, model.other = model[0], nn.Linear(64, 100)
    model.other.weight = model[0].weight
    keys = list(model.state_dict())
    model.forward = lambda x: model[2](model[1](model.again(x) + model[0](x) + model.other(x)))
    network = training.prepare(model, method=method, bits=4, effort=1, **({"keep": ()} if method == "crq" else {}))
    assert [len(uses) for uses in network.places.values()] == [2, 1]
    step(model, network)
    training.harden(model)
    assert list(model.state_dict()) == keys
    assert model.again is model[0]
    assert model.other.weight is model[0].weight


@pytest.mark.parametrize("method", [method for method in METHODS if method != "progressive"])
def test_a_file_of_diffq_is_a_start_for_all(start, method):
    model = net()
    prepare(model, start, "diffq")
    trained = training.harden(model)
    other = net()
    network = prepare(other, trained, method)
    step(other, network)
    assert len(training.harden(other).data) < len(trained.data) + 4096


def test_only_the_prepared_module_is_hardened(start):
    around = nn.Module()
    around.net = net()
    prepare(around.net, start)
    inside = copy.deepcopy(around)
    with pytest.raises(InputError, match="one around or inside of it"):
        training.harden(around)
    assert training.soft_network(around) is not None  # as it was
    training.harden(around.net)
    training.harden(inside.net)


def test_after_hardening_there_is_no_penalty(start):
    model = net()
    network = prepare(model, start)
    training.harden(model)
    for call in (network.penalty, network.file, network.parameter_groups):
        with pytest.raises(InputError, match="no longer soft"):
            call()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e12])
@pytest.mark.parametrize("method", METHODS)
def test_divergence_is_said_before_anything_is_encoded(start, method, value):
    for of_vector in (False, True):
        if of_vector and value == 1e12:
            continue  # the step of a vector follows its size
        model = net()
        network = prepare(model, start, method)
        with torch.no_grad():
            (model[0].bias if of_vector else network.originals("0.weight")[0]).fill_(value)
        if value == 1e12 and method not in ("transform", "progressive"):
            assert network.penalty() is not None  # the others saturate
            continue
        with pytest.raises(InputError, match="has diverged"):
            network.penalty()


@pytest.mark.parametrize("dtype", [torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_other_dtypes_stay(dtype, method):
    model = net().to(dtype)
    calibration = [torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).to(dtype)]
    options = {"keep": ()} if method == "crq" else {}
    transform = "elt" if method == "transform" else "auto"
    network = training.prepare(
        model, calibration, method=method, bits=1 if method == "crq" else 4, effort=1, transform=transform, **options
    )
    step(model, network)
    state = training.harden(model).state_dict()
    assert all(p.dtype == dtype and torch.equal(p, state[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_before_anything_is_done(dtype):
    with pytest.raises(InputError, match="small steps are lost"):
        training.prepare(net().to(dtype), bits=4, effort=1)


@pytest.mark.parametrize("gradual", [False, True])
def test_a_training_that_begins_above_its_size_ends_at_it(gradual):
    model = net()
    network = training.prepare(model, bits=3, effort=1, steps=40, begin=1.5, gradual=gradual)
    size = 3 * sum(p.numel() for p in model.parameters()) / 8
    network.look()
    assert network.bytes > 1.2 * size
    assert 1.4 * size < network.wanted() <= 1.5 * size
    network.step = 20
    assert network.wanted() <= (1.015 if gradual else 1) * size  # what has settled shrinks a little more
    network.step = 36
    assert network.wanted() <= size
    assert len(training.harden(model).data) <= size
    for begin, method, message in ((0.5, "transform", "allowed are numbers from 1"), (2.0, "lsq", "no size to begin above")):
        with pytest.raises(InputError, match=message):
            training.prepare(net(), bits=3, effort=1, method=method, begin=begin)


def test_a_file_much_smaller_than_asked_is_a_warning(start, caplog):
    model = net()
    training.prepare(model, method="crq", bits=4, start=start, keep=())
    training.harden(model)
    assert "the weights have no use for more" in caplog.text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"method": ["lsq"]}, "method is"),
        ({"method": "lsq", "bits": float("nan")}, "needs a depth"),
        ({"method": "lsq", "bits": float("inf")}, "needs a depth"),
        ({"method": "lsq", "bits": [2]}, "needs a depth"),
        ({"method": "lsq", "keep": [["first"]]}, "keep is"),
        ({"method": "diffq", "group": 8.0}, "group is 8.0"),
        ({"method": "transform", "gradual": 1}, "gradual is 1"),
        ({"start": b"file"}, "start is a bytes"),
        ({"overrides": {"0.weight": "exact"}}, "of other overrides: it has no such '0.weight'"),
    ],
)
def test_bad_arguments(start, more, message):
    model = net()
    with pytest.raises(InputError, match=message):
        training.prepare(model, **{"bits": 4, "start": start, **more})
    assert training.soft_network(model) is None


def test_starts_of_other_models(start):
    with pytest.raises(InputError, match="allowed is an nn.Module"):
        training.prepare(None, bits=4)
    with pytest.raises(InputError, match="it also has '0.bias'"):
        training.prepare(net(bias=False), bits=4, start=start)
    with pytest.raises(InputError, match=r"it has no such '0.bias' of shape \(100,\)"):
        training.prepare(net(), bits=4, start=tq.compress(net(bias=False), bits=4, trellis=False, effort=1))
    with pytest.raises(InputError, match=r"no such '0.bias'"):
        training.prepare(net(), bits=4, start=tq.compress(net().state_dict(), bits=4, trellis=False, effort=1))


@pytest.mark.parametrize("method", ["qat", "lsq"])
def test_a_depth_is_no_size_even_where_the_header_is_most_of_the_file(method):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    batches = iter([torch.randn(32, 6) for _ in range(2)])
    training.prepare(model, batches, method=method, bits=2, effort=1)
    assert training.harden(model).report.bits_per_parameter > 2


def test_what_a_start_says_of_activations_is_in_the_file_of_the_training():
    model = net()
    start = tq.compress(model, [torch.randn(64, 64)], bits=4, activations=4, trellis=False, effort=1)
    training.prepare(model, bits=4, start=start)
    assert training.harden(model).report.activations == codec.load_bytes(start.data).report.activations
