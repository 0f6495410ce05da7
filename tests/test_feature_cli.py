"""`transquant features`, as a user would type it."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from safetensors.torch import load_file

import transquant as tq
from conftest import make_net

MODEL = """
from conftest import make_net
import torch

def net():
    return make_net()

def pictures():
    return torch.randn(48, 3, 12, 12, generator=torch.Generator().manual_seed(3))

def labelled():
    x = torch.randn(30, 3, 12, 12, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return [(x, make_net()(x).argmax(1))]
"""
NET = ("--model", "maps.py:net")
LABELLED = ("--data", "maps.py:labelled")


@pytest.fixture(scope="module")
def codec_bytes():
    x = torch.randn(48, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    return tq.features.calibrate(make_net(), [x], bits_per_value=3.0).data


@pytest.fixture
def features(cli, tmp_path, codec_bytes):
    (tmp_path / "maps.py").write_text(MODEL)
    (tmp_path / "net.codec").write_bytes(codec_bytes)
    return lambda *arguments: cli("features", *arguments)


def test_calibrate(features, codec_bytes, tmp_path):
    command = ("calibrate", *NET, "--calibration", "maps.py:pictures", "--bits-per-value", "3.0")
    code, out, err = features(*command, "-o", "new.codec", "--json")
    assert code == 0, err
    assert (tmp_path / "new.codec").read_bytes() == codec_bytes
    result = json.loads(out)
    assert result["bytes"] == len(codec_bytes)
    assert [p["name"] for p in result["points"]] == ["#0", "#1"]
    code, out, err = features(*command, "-o", "new.codec")
    assert (code, out) == (2, "")
    assert "give --force" in err
    assert features(*command, "-f", "-q", "-o", "new.codec")[:2] == (0, "")


def test_calibrate_for_a_drop(features):
    code, out, err = features(
        "calibrate", *NET, "--calibration", "maps.py:pictures", "--max-drop", "20", *LABELLED, "-o", "d.codec"
    )
    assert code == 0, err
    assert out.startswith("d.codec: FeatureCodec(2 points")
    result = json.loads(features("evaluate", "d.codec", *NET, *LABELLED, "--json")[1])
    assert result["float_top1"] == 100
    assert 80 <= result["top1"] <= 100
    assert result["total"]["bits_per_value"] < 3


def test_evaluate(features, tmp_path):
    code, out, err = features("evaluate", "net.codec", *NET, *LABELLED, "--csv", "l.csv", "--picture", "l.svg")
    assert code == 0, err
    assert "float_top1       100.0000" in out
    assert "memory traffic" in out
    rows = list(csv.DictReader((tmp_path / "l.csv").open()))
    assert f"{int(rows[-1]['bytes']):,}" in out
    assert b"<svg" in (tmp_path / "l.svg").read_bytes()[:500]
    result = json.loads(features("evaluate", "net.codec", *NET, *LABELLED, "--json")[1])
    assert result["total"]["bytes"] == int(rows[-1]["bytes"])
    assert result["samples"] == 30


def test_split(features, tmp_path):
    code, out, err = features("split", "net.codec", *NET, "--at", "#1", "-o", "halves")
    assert code == 0, err
    assert out.endswith("what is sent: 32 channels of #1\n")
    folder = tmp_path / "halves"
    about = json.loads((folder / "split.json").read_text())
    assert about["files"] == {n: (folder / n).stat().st_size for n in ("device.safetensors", "server.safetensors", "point.codec")}
    model, x = make_net(), torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(6))
    with torch.device("meta"):
        device, server = tq.features.load(folder / "point.codec").split(type(model)(), "#1")
    device.network.load_state_dict(load_file(folder / "device.safetensors"), assign=True)
    server.network.load_state_dict(load_file(folder / "server.safetensors"), assign=True)
    with torch.no_grad(), tq.features.load(tmp_path / "net.codec").attach(model, only=["#1"]):
        expected = model(x)
    assert torch.equal(server(device(x)), expected)
    assert features("split", "net.codec", *NET, "--at", "#1", "-o", "halves")[0] == 2
    assert features("split", "net.codec", *NET, "--at", "#1", "-o", "halves", "-f", "-q")[:2] == (0, "")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("calibrate", "--calibration", "maps.py:pictures", "-o", "x.codec", "--bits-per-value", "2"), 2, "need --model"),
        (("calibrate", *NET, "-o", "x.codec", "--bits-per-value", "2"), 2, "needs --calibration"),
        (("calibrate", *NET, "--calibration", "maps.py:pictures", "-o", "x.codec"), 2, "exactly one target"),
        (("calibrate", *NET, "--calibration", "maps.py:pictures", "-o", "no/x.codec", "--bits-per-value", "2"), 6, "does not exist"),
        (("calibrate", *NET, "--calibration", "maps.py:pictures", "-o", "x", "--bits-per-value", "2", "--method", "soup"), 2, "'soup'"),
        (("calibrate", *NET, "--calibration", "maps.py:pictures", "-o", "x", "--max-drop", "2"), 2, "needs --data"),
        (("evaluate", "net.codec", *NET), 2, "needs --data"),
        (("evaluate", "maps.py", *NET, *LABELLED), 4, "no codec file"),
        (("evaluate", "none.codec", *NET, *LABELLED), 2, "cannot read"),
        (("evaluate", "net.codec", *NET, *LABELLED, "--csv", "net.codec"), 2, "both an input and the output"),
        (("split", "net.codec", *NET, "--at", "linear", "-o", "halves"), 2, "it can be cut at #0, #1"),
        (("split", "net.codec", *NET, "--at", "#1", "-o", "net.codec"), 6, "cannot make the folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_done(features, tmp_path, arguments, code, message):
    result = features(*arguments)
    assert result[0] == code
    assert message in result[2]
    assert result[1] == ""
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["maps.py", "model.py", "net.codec"]


def test_help(features):
    code, out, _ = features("--help")
    assert code == 0
    assert all(verb in out for verb in ("calibrate", "evaluate", "split"))
