"""Every mode gives the decoded model's outputs, for every kind of layer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import transquant as tq
from layer_models import Pipe
from layer_table import MORE, NAMES, layer_model, relative
from transquant import inference, running
from transquant.errors import InputError


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_in_every_mode(name, tmp_path):
    model, samples = layer_model(name)
    step = 0.002 if "weight_norm" in name else 0.02  # rows of zeros have no direction
    for transform, axis in (("dct", "kernel"), ("elt", "kernel"), ("klt", "input"), ("elt", "output"), ("klt", "joint")):
        for coding in ("entropy", "fixed"):
            tq.compress(model, step=step, transform=transform, axis=axis, coding=coding).save(tmp_path / "net.tq")
            compressed = tq.load(tmp_path / "net.tq", lazy=True)
            decoded = compressed.install(layer_model(name)[0])  # hooks of old parametrizations cannot be copied
            for mode in ("transform", "lazy", *(["packed"] if coding == "fixed" else [])):
                installed = compressed.install(layer_model(name)[0], mode=mode)
                assert relative(decoded, installed, samples) < (1e-5 if mode == "transform" else 1e-12), (transform, axis, mode)
                assert set(running.installed(installed).layers) == {n for n in compressed.state_dict() if coded(compressed, n)}
                if mode == "transform":
                    check_weights(decoded, installed)


def coded(compressed, name):
    return any(row.name == name and row.kind == "weight" for row in compressed.report.layers)


def check_weights(decoded, installed):
    """Two layers say what they amount to."""
    for path, module in installed.named_modules():
        if isinstance(module, inference.TransformDomain):
            expected = decoded.get_submodule(path)
            assert torch.allclose(module.weight, expected.weight, atol=1e-5)
            assert (module.bias is None) == (getattr(expected, "bias", None) is None)


TWO_LAYERS = {  # by kind of layer: axes of its bands for which there are two layers
    "conv2d": "input output kernel joint", "conv2d_groups": "input kernel joint", "depthwise": "kernel joint", "pointwise": "input output",
    "linear": "input output", "conv1d": "input kernel joint", "conv3d": "input output kernel joint",
    "conv_transpose1d": "input output kernel joint", "conv_transpose2d_groups": "output kernel joint", "conv1d_hf": "input output",
    "bag_mean": "input output",
}  # fmt: skip


@pytest.mark.parametrize("name", TWO_LAYERS)
def test_layers_that_are_two_really_are(name):
    model, _ = layer_model(name)
    found = []
    for axis in ("input", "output", "kernel", "joint"):
        compressed = tq.compress(model, step=0.02, transform="klt", axis=axis)
        installed = compressed.install(copy.deepcopy(model), mode="transform")
        if isinstance(installed.layer, inference.TransformDomain):
            found.append(axis)
            assert "two layers" in running.installed(installed).layers["layer.weight"]
    assert " ".join(found) == TWO_LAYERS[name]


def test_zero_bands_are_left_out_and_cost_nothing():
    torch.manual_seed(0)
    model = Pipe(nn.Conv2d(16, 24, 3, padding=1), 24).eval()
    with torch.no_grad():
        model.layer.weight.copy_(torch.einsum("ok,kn->on", torch.randn(24, 5), torch.randn(5, 144)).view(24, 16, 3, 3) / 30)
    compressed = tq.compress(model, step=0.05, transform="klt", axis="output", trellis=False)
    installed = compressed.install(copy.deepcopy(model), mode="transform")
    assert installed.layer.kept == 5
    samples = torch.randn(4, 16, 6, 6)
    assert relative(compressed.install(copy.deepcopy(model)), installed, samples) < 1e-5
    macs = [inference.count_macs(m, samples, lambda m, x: m(x)) for m in (model, installed)]
    assert macs[0]["layer"] == 4 * 36 * 24 * 144
    assert macs[1]["layer.first"] + macs[1]["layer.second"] == 4 * 36 * (5 * 144 + 24 * 5)


def test_a_model_that_is_the_layer_itself():
    layer = nn.Linear(20, 12)
    compressed = tq.compress(layer, step=0.02, transform="klt", axis="input")
    x = torch.randn(3, 20)
    assert relative(compressed.install(copy.deepcopy(layer)), compressed.install(copy.deepcopy(layer), mode="transform"), x) < 1e-5


def test_transform_domain_trains():
    model, x = layer_model("conv2d")
    installed = tq.compress(model, step=0.02, transform="elt", axis="output").install(copy.deepcopy(model), mode="transform")
    installed(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in installed.layer.parameters())


def test_tied_weights(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(30, 16), nn.Linear(16, 30, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.embedding(ids))

    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(30)
    compressed = tq.compress(model, step=0.05, coding="fixed", transform="klt", axis="input")
    decoded = compressed.install(copy.deepcopy(model))
    for mode in ("transform", "packed", "lazy"):
        assert relative(decoded, compressed.install(copy.deepcopy(model), mode=mode), ids) < 1e-6


def deep(width=192, depth=6):
    return nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)])


def test_packed_weights_take_what_their_codes_take(tmp_path):
    torch.manual_seed(0)
    model = deep()
    compressed = tq.compress(model, bits=4.2, coding="fixed")
    installed = compressed.install(copy.deepcopy(model), mode="packed")
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    biases = 4 * sum(m.bias.numel() for m in model.modules() if isinstance(m, nn.Linear))
    in_memory = running.weight_bytes(installed)
    assert in_memory - biases < 0.14 * 4 * weights
    assert in_memory - biases <= len(compressed.data)
    assert running.weight_bytes(model) == 4 * weights + biases
    assert not any(name.endswith("weight") for name in installed.state_dict())


def test_lazy_weights_stay_below_their_limit(tmp_path, monkeypatch):
    from transquant import bitstream

    monkeypatch.setattr(bitstream, "SECTION_VALUES", 60_000)  # two layers a section
    torch.manual_seed(0)
    model, x = deep(), torch.randn(5, 192)
    compressed = tq.compress(model, bits=3.0)
    decoded = compressed.install(copy.deepcopy(model))
    layer = 4 * 192 * 192
    batches = []
    for memory in (None, 2 * layer, layer, 100 * layer, 1):
        installed = compressed.install(copy.deepcopy(model), mode="lazy", memory=memory)
        for _ in range(3):
            assert relative(decoded, installed, x) < 1e-12
        cache = running.installed(installed).cache
        assert cache.resident <= (3 * layer if memory is None else memory)
        if memory is None:
            assert (
                running.weight_bytes(installed, peak=True) <= len(compressed.data) + 3 * layer + 4 * 6 * 192
            )  # a section takes as much
        batches.append(cache.batches)
    assert batches == [9, 9, 18, 3, 18]  # sections that were decoded in three runs


def test_meta_models_are_filled(tmp_path):
    model, x = layer_model("linear")
    compressed = tq.compress(model, bits=9.0, coding="fixed")
    decoded = compressed.install(copy.deepcopy(model))
    for mode in ("float", "packed", "lazy", "transform"):
        with torch.device("meta"):
            empty = MORE["linear"]()
        assert relative(decoded, compressed.install(empty.eval(), mode=mode), x) < 1e-6


@pytest.mark.parametrize("mode", ["packed", "lazy"])
def test_weights_on_demand_follow_the_model(mode):
    model, x = layer_model("lstm")
    compressed = tq.compress(model, bits=9.0, coding="fixed")
    installed = compressed.install(model, mode=mode).double()
    assert installed.layer.weight_ih_l0.dtype == torch.float64
    assert installed(x).dtype == torch.float64
    copied = copy.deepcopy(installed)
    assert torch.equal(copied(x), installed(x))


def test_what_cannot_be_is_said(tmp_path):
    model, _ = layer_model("linear")
    compressed = tq.compress(model, bits=9.0)
    with pytest.raises(InputError, match="'packed' runs files with fixed-length codes"):
        compressed.install(model, mode="packed")
    with pytest.raises(InputError, match="mode is 'fast', allowed are 'float', 'transform'"):
        compressed.install(model, mode="fast")
    with pytest.raises(InputError, match="memory limits what mode 'lazy'"):
        compressed.install(model, memory=100)
    with pytest.raises(InputError, match="do not fit the model"):
        compressed.install(nn.Linear(3, 4), mode="lazy")
    with pytest.raises(InputError, match="no compressed file has been installed"):
        running.installed(model)


def test_a_file_that_was_checked_lazily_is_the_same(tmp_path):
    model, _ = layer_model("encoder")
    tq.compress(model, bits=5.0).save(tmp_path / "net.tq")
    whole, lazy = tq.load(tmp_path / "net.tq"), tq.load(tmp_path / "net.tq", lazy=True)
    assert whole.report == lazy.report
    data = bytearray((tmp_path / "net.tq").read_bytes())
    for a, b in zip(whole.state_dict().values(), lazy.state_dict().values(), strict=True):
        assert np.array_equal(a.numpy(), b.numpy())
    data[len(data) // 2] ^= 16
    (tmp_path / "bad.tq").write_bytes(data)
    with pytest.raises(tq.errors.FileError):
        tq.load(tmp_path / "bad.tq", lazy=True)


def test_matrices_that_are_buffers_stay_tensors():
    """Of a state dict alone all matrices are coded, whatever they are to the module."""

    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 24)
            self.register_buffer("places", torch.randn(5, 12))

        def forward(self, x):
            return self.layer(x + self.places[0])

    torch.manual_seed(0)
    model, x = Placed(), torch.randn(4, 12)
    compressed = tq.compress(model.state_dict(), step=1e-3)
    decoded = compressed.install(copy.deepcopy(model))
    installed = compressed.install(copy.deepcopy(model), mode="lazy")
    assert relative(decoded, installed, x) < 1e-12
    assert "places" in installed.state_dict()
    assert "layer.weight" not in installed.state_dict()


def test_a_layer_with_hooks_keeps_them():
    model, _ = layer_model("linear")
    compressed = tq.compress(model, step=0.02, transform="klt", axis="output")
    model.layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    installed = compressed.install(model, mode="transform")
    assert running.installed(installed).layers["layer.weight"] == "decoded: it has hooks"
    assert isinstance(installed.layer, nn.Linear)
