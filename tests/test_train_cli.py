"""`transquant train`: a TOML file in, a compressed file out."""

from __future__ import annotations

import json

import pytest

import transquant as tq

MODEL = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5))

def samples():
    x = torch.randn(96, 12, generator=torch.Generator().manual_seed(1))
    return x, x[:, :5].argmax(1)

def test():
    return [samples()]

def noise(inputs, labels, generator):
    return inputs + 0.01 * torch.randn(inputs.shape, generator=generator), labels

def broken(output, labels):
    return output.sum() * float("nan")
"""

CONFIG = """
[model]
model = "small.py:net"
[data]
train = "small.py:samples"
test = "small.py:test"
[train]
bits = 6.0
epochs = 3
batch = 32
effort = 1
calibration_samples = 64
augment = "small.py:noise"
"""


@pytest.fixture
def train(cli, tmp_path):
    (tmp_path / "small.py").write_text(MODEL)

    def run(*options, config=CONFIG):
        (tmp_path / "config.toml").write_text(config)
        return cli("train", "config.toml", "-o", "net.tq", *options)

    return run


def test_it_writes_a_file_and_says_where_its_bytes_went(train, tmp_path):
    code, out, err = train()
    assert (code, err) == (0, "")
    assert out.startswith("net.tq: ")
    assert "bytes on disk" in out.splitlines()[0]
    assert "top1" in out
    assert len(tq.load(tmp_path / "net.tq").data) <= 6.0 * 437 / 8
    assert sorted(p.name for p in tmp_path.iterdir() if "net.tq" in p.name) == ["net.tq"]
    code, out, err = train()
    assert (code, out) == (2, "")
    assert "exists already" in err
    first = (tmp_path / "net.tq").read_bytes()
    code, out, _ = train("--force", "--json")
    assert code == 0
    assert [epoch["epoch"] for epoch in json.loads(out)["history"]] == [1, 2, 3]
    assert (tmp_path / "net.tq").read_bytes() == first


def test_a_kept_folder_is_gone_on_from(train, tmp_path):
    kept = CONFIG + 'keep_work = true\nwork = "parts"\n'
    assert train("-q", config=kept) == (0, "", "")
    first = (tmp_path / "net.tq").read_bytes()
    assert len(list((tmp_path / "parts").glob("step-*.safetensors"))) == 2
    assert train("-q", "-f", config=kept)[0] == 0
    assert (tmp_path / "net.tq").read_bytes() == first
    code, _, err = train("-f", config=kept.replace("epochs = 3", "epochs = 4"))
    assert code == 2
    assert "differ in epochs" in err


@pytest.mark.parametrize(
    ("before", "after", "code", "message"),
    [
        ("bits = 6.0", "bit = 6.0", 2, "the key 'bit' in [train], allowed are method, bits, size"),
        ("[data]", "[date]", 2, "has 'date', allowed are the tables [model], [data], [train]"),
        ("epochs = 3", "epochs = 3.5", 2, "epochs in [train] is 3.5, expected an integer"),
        ("bits = 6.0", "bits = true", 2, "bits in [train] is True, expected a number"),
        ("bits = 6.0", "bits =", 2, "is no TOML"),
        ('train = "small.py:samples"', "", 2, "has no train in [data]"),
        ("small.py:noise", "small.py:none", 2, "has no function 'none'"),
        ("bits = 6.0", "size = 20", 3, "cannot be reached"),
        ("bits = 6.0", 'bits = 6.0\nloss = "small.py:broken"', 2, "whose loss is nan"),
    ],
)
def test_bad_configurations(train, tmp_path, before, after, code, message):
    assert before in CONFIG
    found, out, err = train(config=CONFIG.replace(before, after, 1))
    assert (found, out) == (code, "")
    assert message in err
    assert not (tmp_path / "net.tq").exists()


def test_a_teacher_and_its_hints(train, tmp_path):
    code, _, err = train(config=CONFIG + 'teacher = "self"\nhints = ["1"]\nhint = 5.0\n')
    assert code == 0, err
    assert tq.load(tmp_path / "net.tq").report.bits_per_parameter <= 6.0
    code, _, err = train("--force", config=CONFIG + 'teacher = "self"\nhints = ["9"]\n')
    assert code == 2
    assert "the model has no layer '9'" in err
    code, _, err = train("--force", config=CONFIG + "hints = [1]\n")
    assert code == 2
    assert "hints in [train] is [1], expected a list of texts" in err
