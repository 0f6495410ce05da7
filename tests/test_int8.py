"""Quantized inputs of layers, run: the float reference, integer kernels, the page and its tables."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import transquant as tq
from blocks import blocks_of, run_block
from networks import accuracy, cifar10, network, shared_data
from tqfile import split
from transquant.errors import InputError
from transquant.inference import has_exact_kernels, int8_layer
from transquant.inference.activations import codes, through_codes
from transquant.inference.int8 import Int8Layer, int8_values, int8_weight
from transquant.records import Activation
from transquant.running import installed

integers = pytest.mark.skipif(not has_exact_kernels(), reason="this processor or build of PyTorch has no exact integer kernels")


@pytest.fixture(scope="module")
def file(small, samples):
    return tq.compress(small, samples, step=0.02, effort=1, activations=8.0)


def test_the_float_reference_is_the_formula(file, small, samples):
    model = file.install(copy.deepcopy(small), mode="activations")
    plain = file.install(copy.deepcopy(small))
    steps = {e["n"].removesuffix(".weight"): e["a"] for e in split(file.data).value["tensors"] if "a" in e}

    def by_hand(module, args):
        bits, zero, mantissa, exponent = steps[next(n for n, m in plain.named_modules() if m is module)]
        scale = mantissa * 2.0**exponent
        return (((args[0] / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale

    for name in steps:
        plain.get_submodule(name).register_forward_pre_hook(by_hand)
    with torch.no_grad():
        torch.testing.assert_close(model(samples), plain(samples), rtol=1e-3, atol=1e-3)
    assert set(model.state_dict()) == set(small.state_dict())
    x = samples[:2].clone().requires_grad_()
    model(x).sum().backward()  # straight through
    assert x.grad.abs().max() > 0
    file.install(model)  # and back again
    with torch.no_grad():
        assert torch.equal(model(samples), file.install(copy.deepcopy(small))(samples))


def rounded(model: nn.Module) -> nn.Module:
    """The model with the weights that mode int8 has."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data = int8_values(*int8_weight(module.weight))
    return model


@integers
def test_integers_give_what_the_reference_gives(file, small, samples):
    """To float32 rounding, but for values that fall on the other side of a step: those are few."""
    model = file.install(copy.deepcopy(small), mode="int8")
    assert all(how == "int8, input of 8 bits" for how in installed(model).layers.values())
    reference = rounded(file.install(copy.deepcopy(small), mode="activations"))
    with torch.no_grad():
        difference = (model(samples) - reference(samples)).abs()
        plain = (file.install(copy.deepcopy(small))(samples) - reference(samples)).abs()
    assert difference.median() < 1e-5
    assert difference.max() < plain.max()
    assert difference.mean() < 0.05 * plain.mean()
    with torch.no_grad():  # copies, and other sizes of batches and images
        assert torch.equal(copy.deepcopy(model)(samples[:3]), model(samples[:3]))
        assert model(torch.randn(2, 3, 9, 20)).shape == (2, 10)


LAYERS = {
    "padded": (nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 7, 8)), "mirrored": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, 2, 1, 2, groups=2, bias=False), (2, 4, 9, 9)), "one": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "three": (nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)), "single": (nn.Conv2d(4, 6, 3), (4, 7, 8)), "linear": (nn.Linear(12, 5), (2, 3, 12)),
    "row": (nn.Linear(12, 5, bias=False), (12,)),
}  # fmt: skip


@integers
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "how", [Activation(8, 100, 3276, -17), Activation(4, 7, 3276, -13), Activation(2, 0, 2048, -11)], ids=lambda h: f"{h.bits}"
)
def test_each_kind_of_layer_in_integers(name, how):
    layer, shape = LAYERS[name]
    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    reference = rounded(nn.Sequential(copy.deepcopy(layer)))[0]
    if name == "one" or name == "three":
        reference.weight.data = int8_values(*int8_weight(layer.weight))
    made = int8_layer(layer, how)
    with torch.no_grad():
        torch.testing.assert_close(made(x), reference(through_codes(x, how)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(made.weight, layer.weight, rtol=0, atol=float(layer.weight.abs().max()) / 250)
    assert codes(x, how).max() <= 2**how.bits - 1
    assert made.kernel_size == layer.kernel_size if "kernel_size" in vars(layer) else isinstance(made, Int8Layer)


def test_a_file_without_ranges_cannot_run_so(compressed, net):
    for mode in ("activations", "int8"):
        with pytest.raises(InputError, match="this one has none"):
            compressed.install(net, mode=mode)


def test_without_kernels_there_is_one_sentence(file, net, monkeypatch):
    monkeypatch.setattr("transquant.inference.has_exact_kernels", lambda: False)
    with pytest.raises(InputError, match="oneDNN"):
        file.install(net, mode="int8")


def test_command_line(cli):
    arguments = [
        "--model",
        "model.py:net",
        "--calibration",
        "model.py:pictures",
        "--size",
        "4000",
        "--effort",
        "1",
        "--activations",
        "6",
        "-o",
        "net.tq",
    ]
    code, _, err = cli("compress", *arguments)
    assert code == 0, err
    code, out, _ = cli("inspect", "net.tq")
    assert code == 0
    assert "input bits" in out


@integers
@pytest.mark.slow
@pytest.mark.skipif(shared_data() is None, reason="needs ../shared/data")
def test_resnet20_in_integers():
    images, labels = cifar10("train", 800)
    model = network("resnet20")
    file = tq.compress(model, images[:400], bits=8.0, effort=1, transform="identity", trellis=False, activations=8.0)
    before = accuracy(model, images[400:], labels[400:])
    assert accuracy(file.install(network("resnet20"), mode="int8"), images[400:], labels[400:]) > before - 1.1  # of 400 images
    assert installed(file.install(model, mode="int8")).layers["conv1.weight"] == "int8, input of 8 bits"


ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "activations.md").read_text()


def test_the_page_runs(tmp_path):
    """Its blocks in order, in one folder."""
    pytest.importorskip("sklearn", reason="the page's data come with scikit-learn")
    blocks = [text for language, text in blocks_of(ROOT / "docs" / "activations.md") if language == "python"]
    if not has_exact_kernels():
        blocks = [b for b in blocks if "int8" not in b]
    assert blocks
    run_block("python", "\n".join(blocks), tmp_path)


def test_the_tables_are_those_of_the_benchmark():
    from activations import latency_table, table

    content = json.loads((ROOT / "benchmarks" / "activations.json").read_text())
    assert table(content["rows"]) in PAGE
    assert latency_table(content["latency"]) in PAGE
    for row in content["rows"]:
        if row["bits"] == 8:
            assert row["int8"]["drop"] <= 0.3 + 2 * row["int8"]["standard_error"]
