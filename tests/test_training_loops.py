"""Callbacks for other libraries' loops; a stand-in calls their hooks where the library is missing."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch
from torch import nn

from transquant import training
from transquant.errors import InputError, MissingDependency


def prepared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5))
    return model, training.prepare(model, bits=6.0, effort=1)


def loop(model, network, before, steps=8):
    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(network.parameter_groups())
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :5].argmax(1)).backward()
        before(optimizer)
        optimizer.step()


@pytest.fixture
def lightning(monkeypatch):
    stand_in = types.ModuleType("lightning.pytorch")
    stand_in.Callback = type("Callback", (), {})
    monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", stand_in)
    monkeypatch.delitem(sys.modules, "transquant.integrations.lightning", raising=False)
    yield importlib.import_module("transquant.integrations.lightning")
    sys.modules.pop("transquant.integrations.lightning", None)


def check(callback, model, network):
    assert network.step == 8
    assert network.settled
    assert training.soft_network(model) is None
    decoded = callback.compressed.state_dict()
    assert all(torch.equal(v, decoded[k]) for k, v in model.state_dict().items())


def test_lightning(lightning):
    callback, (model, network) = lightning.TransquantCallback(), prepared()
    module = nn.Module()
    module.net = model
    callback.on_fit_start(types.SimpleNamespace(estimated_stepping_batches=8), module)
    assert network.schedule.steps == 8
    loop(model, network, lambda optimizer: callback.on_before_optimizer_step(None, module, optimizer))
    callback.on_fit_end(None, module)
    check(callback, model, network)
    with pytest.raises(InputError, match="not prepared"):
        callback.on_fit_start(types.SimpleNamespace(estimated_stepping_batches=8), nn.Linear(2, 2))


def test_without_lightning(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "transquant.integrations.lightning", raising=False)
    with pytest.raises(MissingDependency, match="pip install lightning"):
        importlib.import_module("transquant.integrations.lightning")


def trainer_module():
    pytest.importorskip("transformers", reason='needs transformers: pip install "transquant[zoo]"')
    return importlib.import_module("transquant.integrations.trainer")


def test_hooks_of_trainer():
    callback, (model, network) = trainer_module().TransquantCallback(), prepared()
    state = types.SimpleNamespace(max_steps=8)
    callback.on_train_begin(None, state, None, model=model)
    loop(model, network, lambda optimizer: callback.on_pre_optimizer_step(None, state, None, model=model))
    callback.on_train_end(None, state, None, model=model)
    check(callback, model, network)


class Net(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x, labels):
        logits = self.body(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_real_trainer(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install accelerate")
    from transformers import Trainer, TrainingArguments

    callback, (model, network) = trainer_module().TransquantCallback(), prepared()
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
    data = [{"x": row, "labels": row[:5].argmax()} for row in x]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=16, num_train_epochs=2, report_to=[], save_strategy="no", use_cpu=True
    )
    optimizer = torch.optim.Adam(network.parameter_groups())
    Trainer(Net(model), arguments, train_dataset=data, callbacks=[callback], optimizers=(optimizer, None)).train()
    check(callback, model, network)
