"""Networks and weights named on the command line: --model LIBRARY:NAME, --weights FILE.pt."""

from __future__ import annotations

import sys

import pytest
import torch

import transquant as tq
from blocks import need
from cli_model import NET
from conftest import make_net
from transquant.cli.models import load_model
from transquant.errors import InputError, MissingDependency
from zoo import declare_vision_ops


@pytest.fixture
def libraries():
    need("timm", "torchvision", "transformers")
    declare_vision_ops()
    import huggingface_hub
    import timm
    import transformers

    with pytest.MonkeyPatch.context() as patch:  # no waiting for a network that is not there
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield timm, transformers


def without(module, *keys):
    return {k: v for k, v in module.state_dict().items() if k not in keys}


def test_weights_of_a_pt_file(cli, tmp_path):
    net = make_net()
    torch.save({"state_dict": {f"module.{k}": v for k, v in without(net, "bn.num_batches_tracked").items()}}, "parallel.pth")
    assert cli("compress", *NET, "--step", 0.05, "--effort", 1, "-o", "a.tq")[0] == 0
    assert cli("compress", *NET, "--weights", "parallel.pth", "--step", 0.05, "--effort", 1, "-o", "b.tq")[0] == 0
    assert (tmp_path / "a.tq").read_bytes() == (tmp_path / "b.tq").read_bytes()
    assert cli("compress", "--weights", "parallel.pth", "--step", 0.05, "-o", "c.tq")[0] == 0
    assert all(k.startswith("module.") for k in tq.load("c.tq").state_dict())  # alone it is what it is


def test_a_prefix_that_the_model_has_itself_stays(tmp_path):
    (tmp_path / "parallel.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential()\n"
        "def wrapped():\n    m = nn.Module()\n    m.module = nn.Linear(2, 2)\n    return m\n"
    )
    weights = tmp_path / "w.pt"
    torch.save({"module.weight": torch.ones(2, 2), "module.bias": torch.ones(2)}, weights)
    assert load_model(f"{tmp_path}/parallel.py:wrapped", weights).module.weight.sum() == 4
    with pytest.raises(InputError, match="unexpected weight, bias"):  # an empty network is a network, too
        load_model(f"{tmp_path}/parallel.py:net", weights)


def test_second_names_of_tied_tensors_may_be_missing(tmp_path):
    (tmp_path / "tied.py").write_text(
        "from torch import nn\ndef net():\n    m = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))\n"
        "    m[1].weight = m[0].weight\n    return m\n"
    )
    torch.save({"1.weight": torch.ones(5, 3)}, tmp_path / "w.pt")
    model = load_model(f"{tmp_path}/tied.py:net", tmp_path / "w.pt")
    assert model[0].weight is model[1].weight
    assert bool((model[0].weight == 1).all())


@pytest.mark.parametrize("source", ["timm:mobilenetv3_small_050", "torchvision:squeezenet1_1"])
def test_image_networks_by_name(cli, tmp_path, libraries, source):
    library, _, name = source.partition(":")
    if library == "timm":
        model = libraries[0].create_model(name)
    else:
        from torchvision.models import get_model

        model = get_model(name, weights=None)
    torch.save(model.state_dict(), "own.pth")
    given = ("--model", source, "--weights", "own.pth")
    code, _, err = cli("compress", *given, "--step", 3e-5, "--effort", 1, "-o", "net.tq", "-q")
    assert (code, err) == (0, "")
    assert cli("inspect", "net.tq")[0] == 0
    (tmp_path / "data.py").write_text(
        "import torch\ndef labelled():\n    return [(torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3]))]\n"
    )
    for options, scores in ((given, True), (("--model", source), False)):  # without weights nothing is downloaded
        code, out, err = cli("evaluate", "net.tq", *options, "--data", "data.py:labelled")
        assert code == 0, err
        assert "top1" in out
        assert ("float_top1" in out) is scores


def test_detectors_fetch_no_part_of_themselves(libraries):
    from torchvision.models import get_model

    model = load_model("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", None, pretrained=False)
    assert type(model) is type(get_model("fasterrcnn_mobilenet_v3_large_320_fpn", weights=None, weights_backbone=None))


def test_folders_of_transformers(cli, tmp_path, libraries):
    _, transformers = libraries
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    model.to(torch.bfloat16).save_pretrained("float")
    assert cli("compress", "--model", "hf:float", "--bits", 6, "--effort", 1, "-o", "a.tq", "-q")[0] == 0
    state = tq.load("a.tq").state_dict()
    assert {str(v.dtype) for v in state.values()} == {"torch.bfloat16"}
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
    weights = ("--model", "hf:float", "--weights", "float/model.safetensors")  # which has no lm_head.weight
    assert cli("compress", *weights, "--bits", 6, "--effort", 1, "-o", "b.tq", "-q")[0] == 0
    assert (tmp_path / "a.tq").read_bytes() == (tmp_path / "b.tq").read_bytes()
    tq.integrations.transformers.attach(model, tq.load("a.tq")).save_pretrained("small")
    assert torch.equal(load_model("hf:small", None).lm_head.weight, state["lm_head.weight"])


BAD = [
    ("timm:resnet18", 2, "the weights of --model timm:resnet18 cannot be had (", "give weights that you have with --weights"),
    ("torchvision:resnet18", 2, "the weights of --model torchvision:resnet18 cannot be had (", "--weights"),
    ("hf:someone/something", 2, "the weights of --model hf:someone/something cannot be had (", "--weights"),
    ("timm:resnet1800", 2, "Unknown model (resnet1800)", ""),
    ("torchvision:resnet1800", 2, "Unknown model resnet1800", ""),
    ("hf:empty", 2, "Unrecognized model", ""),
    ("timm:", 2, "expected timm:NAME", ""),
    ("keras:resnet18", 2, "expected FILE.py:FUNCTION or timm:NAME, torchvision:NAME, hf:NAME", ""),
]


@pytest.mark.parametrize(("source", "code", "message", "way_out"), BAD, ids=lambda v: v if isinstance(v, str) and ":" in v else "")
def test_what_cannot_be_had_is_one_line(cli, tmp_path, libraries, monkeypatch, source, code, message, way_out):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail, raising=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    found, out, err = cli("compress", "--model", source, "--bits", 4, "-o", "net.tq")
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert way_out in err


def fail(*arguments, **options):
    raise OSError("no network")


@pytest.mark.parametrize("library", ["timm", "torchvision", "transformers"])
def test_missing_libraries_say_the_pip_line(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, "transquant.integrations.transformers", raising=False)
    source = {"transformers": "hf"}.get(library, library)
    with pytest.raises(MissingDependency, match=r'pip install "transquant\[zoo\]"') as caught:
        load_model(f"{source}:resnet18", None)
    assert library in str(caught.value)
