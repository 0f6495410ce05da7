"""Networks of other libraries; benchmarks/zoo.py calibrates and measures all of them, here some, and all without calibration."""

from __future__ import annotations

import pytest
import torch

import exports
import transquant as tq
from blocks import need
from zoo import IMAGES, NETWORKS, declare_vision_ops, run

# timm finds torchvision, and transformers is imported in its company
NEEDS = {"sound_autoencoder": (), "gpt2": ("transformers",), "mobilenetv3_small_050": ("timm", "torchvision")}

STEPS = {"resnet18": 1.3e-5, "densenet121": 1.7e-5, "vit_tiny_patch16_224": 2.4e-5, "convnext_atto": 2.5e-5}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_networks_of_other_libraries(name):
    need(*NEEDS[name])
    row = run(name)
    assert 1 / row["tolerance"] < row["ratio"] < row["tolerance"]
    assert row["spread"] > 1  # outputs that depend on the inputs
    assert row["file_bytes"] * 8 <= 4 * row["parameters"]
    assert not row["exact"]
    assert name in NETWORKS


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_networks_of_timm_without_calibration(name, tmp_path):
    """Decoded and installed in another instance, they compute what their decoded weights say, and nearly what they did."""
    need("timm", "torchvision")
    declare_vision_ops()
    import timm

    torch.manual_seed(0)
    model, other = timm.create_model(name).eval(), timm.create_model(name).eval()
    # six bits a parameter, or the step that gives nearly that, since searches take half of the time
    target = {"step": STEPS[name]} if name in STEPS else {"bits": 6.0}
    compressed = tq.compress(model, effort=1, **target)
    assert 5.5 < compressed.report.bits_per_parameter <= 6.0
    compressed.save(tmp_path / "net.tq")
    tq.load(tmp_path / "net.tq").install(other)
    state = compressed.state_dict()
    assert all(torch.equal(state[k], v) for k, v in other.state_dict().items())
    image = torch.randn(2, 3, IMAGES[name], IMAGES[name])
    with torch.no_grad():
        before, after = model(image), other(image)
        assert torch.equal(after, torch.func.functional_call(model, state, (image,)))
    assert 0 < (before - after).pow(2).mean() < 0.01 * before.pow(2).mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "gpt2"])
def test_exports_of_networks_of_other_libraries(name):
    need(*NEEDS[name])
    row = exports.run(name, ("float",))
    assert row["exports"]["float"]["output"] <= exports.BOUND
    assert row["exports"]["float"]["weights"] >= 9
    assert row["again"]["coded"] >= 9
    assert row["again"]["output"] < 0.2
