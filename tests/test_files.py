"""Weights from files that torch.save wrote: the tensors, and one clear sentence for everything else."""

from __future__ import annotations

import builtins
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import transquant as tq
from conftest import make_net
from transquant.errors import InputError
from transquant.inputs import load_weights
from transquant.modules.files import TensorFile

MAPS = Path("/proc/self/maps")


@pytest.fixture
def state():
    return make_net().state_dict()


class Touch:
    """What a hostile file may hold: reading it as pickle would run code."""

    def __reduce__(self):
        return (builtins.print, ("code has run",))


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin"])
@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "model_state_dict"])
def test_state_dicts_and_checkpoints(state, tmp_path, name, wrap):
    torch.save(state if wrap is None else {"epoch": 3, "optimizer": {"state": {}}, wrap: state}, tmp_path / name)
    found = load_weights(tmp_path / name)
    assert list(found) == list(state)
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in state.items())


def test_a_file_gives_the_bytes_of_its_state_dict(state, tmp_path):
    torch.save(state, tmp_path / "w.pt")
    assert tq.compress(tmp_path / "w.pt", step=0.01).data == tq.compress(state, step=0.01).data


def test_files_of_old_versions_of_torch(state, tmp_path):
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(load_weights(tmp_path / "w.pth")["conv.weight"], state["conv.weight"])


@pytest.mark.skipif(not MAPS.exists(), reason="the system does not say what is mapped")
def test_tensors_are_mapped(state, tmp_path):
    """A file costs no memory before it is used: the tensors' pages are the file's."""
    torch.save(state, tmp_path / "w.pt")
    found = load_weights(tmp_path / "w.pt")
    assert str(tmp_path / "w.pt") in MAPS.read_text()
    assert found


def test_tied_tensors_stay_tied(tmp_path):
    weight = torch.randn(64, 32)
    torch.save({"a.weight": weight, "b.weight": weight}, tmp_path / "w.pt")
    compressed = tq.compress(tmp_path / "w.pt", step=0.01)
    assert compressed.report.num_parameters == 64 * 32


def test_safetensors_are_read_when_asked_for(state, tmp_path):
    save_file(state, tmp_path / "w.safetensors")
    assert isinstance(load_weights(tmp_path / "w.safetensors"), TensorFile)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (nn.Linear(3, 3), "only state dicts are read, since pickled modules and other objects can run code; torch.save"),
        ({"state_dict": Touch()}, "only state dicts are"),
        (torch.zeros(3), "holds a Tensor; expected tensors by name"),
        ([torch.zeros(3)], "holds a list"),
        ({}, "holds a dictionary"),
        ({"weight": torch.zeros(3), "epoch": 3}, "a dictionary with 'epoch', a int"),
        ({"net": {"weight": torch.zeros(3)}}, "a dictionary with 'net', a dict"),
        ({"model": {"weight": torch.zeros(3)}, "state_dict": {"weight": torch.ones(3)}}, "'state_dict' and 'model': save the one"),
    ],
    ids=["module", "code", "tensor", "list", "empty", "mixed", "unknown key", "two"],
)
def test_anything_else_is_one_sentence(tmp_path, capsys, value, message):
    path = tmp_path / "w.pt"
    torch.save(value, path)
    with pytest.raises(InputError, match=r"^\S*w\.pt ") as caught:
        tq.compress(path, bits=4)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("data", [b"", b"no pickle", b"PK\x03\x04 nothing"], ids=["empty", "text", "zip"])
def test_damaged_files(tmp_path, data):
    (tmp_path / "w.bin").write_bytes(data)
    with pytest.raises(InputError, match="only state dicts are"):
        load_weights(tmp_path / "w.bin")


def test_cut_off_files(state, tmp_path):
    torch.save(state, tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is damaged or no state dict"):
        load_weights(tmp_path / "cut.pt")


def test_absent_files_and_other_names(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        load_weights(tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"w\.npz: allowed are \.safetensors, \.pt, \.pth, \.bin"):
        load_weights(tmp_path / "w.npz")
