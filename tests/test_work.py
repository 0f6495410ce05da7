"""A run that was killed goes on from its work folder, and gives the same file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import transquant as tq
from cli_model import MODEL, NET
from transquant import work as work_module
from transquant.errors import InputError, OutputError
from transquant.fingerprint import fingerprint
from transquant.work import MARK, WorkFolder

COMMAND = [sys.executable, "-m", "transquant", "compress", *NET, "--bits", "4", "--json"]


def counted(compressed):
    """Layers taken and computed."""
    work = compressed.report.settings["work"]
    return work["layers_taken"], work["layers_computed"]


def test_killed_and_run_again(tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    how = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": path}, "stdout": subprocess.PIPE}
    whole = subprocess.run([*COMMAND, "-o", "whole.tq", "--work", "other"], check=True, **how)
    layers = json.loads(whole.stdout)["settings"]["work"]
    assert not (tmp_path / "other").exists()
    run = subprocess.Popen([*COMMAND, "-o", "net.tq", "--work", "work"], **how)
    folder, wanted = tmp_path / "work", layers["layers_computed"] // 3
    while run.poll() is None and sum(p.name.startswith("layer-") for p in folder.glob("*")) < wanted:
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, "it was too fast to be killed"
    run.stdout.close()
    assert not (tmp_path / "net.tq").exists()
    again = subprocess.run([*COMMAND, "-o", "net.tq", "--work", "work"], check=True, **how)
    assert (tmp_path / "net.tq").read_bytes() == (tmp_path / "whole.tq").read_bytes()
    resumed = json.loads(again.stdout)["settings"]["work"]
    assert resumed["layers_computed"] <= layers["layers_computed"] - wanted
    assert sum(resumed.values()) == sum(layers.values())
    assert not folder.exists()  # the run that was killed had made it


def test_damaged_and_foreign_parts_are_computed_again(small, samples, tmp_path):
    expected = tq.compress(small, samples, step=0.05).data
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("not yours")
    first = tq.compress(small, samples, step=0.05, work=folder)
    taken, computed = counted(first)
    assert first.data == expected
    assert computed > 0
    assert counted(tq.compress(small, samples, step=0.05, work=folder)) == (taken + computed, 0)
    parts = sorted(folder.glob("layer-*"))
    assert len(parts) == computed
    kinds = {p.name.partition("-")[0] for p in folder.glob("*.part")}
    assert {"layer", "section", "statistics"} <= kinds
    for kind in kinds:  # one byte of each is another, near the end, in the middle or in the header
        for number, part in enumerate(sorted(folder.glob(f"{kind}-*"))):
            data = bytearray(part.read_bytes())
            data[(-1, len(data) // 2, 60, 3, -40)[number % 5]] ^= 4
            part.write_bytes(data)
    again = tq.compress(small, samples, step=0.05, work=folder)
    assert again.data == expected
    assert counted(again)[1] == computed
    whole = [p.read_bytes() for p in parts]
    parts[0].write_bytes(whole[1])  # a whole part under a name that is not its own
    parts[1].write_bytes(whole[1][:-7])
    parts[2].write_bytes(b"")
    parts[3].unlink()
    parts[3].mkdir()
    last = tq.compress(small, samples, step=0.05, work=folder)
    assert last.data == expected
    assert counted(last)[1] == 4
    assert (folder / "notes.txt").read_text() == "not yours"


def test_what_depends_on_something_else_is_not_taken(small, samples, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()

    def computed(**options):
        images = options.pop("images", samples)
        model = options.pop("model", small)
        return counted(tq.compress(model, images, **{"step": 0.05, "effort": 1, "work": folder, **options}))[1]

    everything = computed()
    assert everything > 0
    assert computed() == 0
    assert computed(seed=1) == everything  # other statistics
    assert computed(images=samples[1:]) == everything
    assert computed(step=0.06) == everything
    assert computed(trellis=False) == everything
    assert computed(forward=lambda m, b: m(b) * 2) == everything  # code cannot be seen, what it does can
    twin = type(small)()
    twin.load_state_dict(small.state_dict())
    twin.eval()
    assert computed(model=twin) == 0
    with torch.no_grad():
        twin.linear.weight[0, 0] += 1e-6
    assert computed(model=twin) > 0


def test_another_version_takes_nothing(small, tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    everything = counted(tq.compress(small, step=0.05, work=folder))[1]
    assert counted(tq.compress(small, step=0.05, work=folder))[1] == 0
    monkeypatch.setattr(work_module, "__version__", "0.0.1")
    work_module._software.cache_clear()
    try:
        assert counted(tq.compress(small, step=0.05, work=folder))[1] == everything
    finally:
        work_module._software.cache_clear()


def test_folders(small, tmp_path):
    made = tmp_path / "a" / "b"
    report = tq.compress(small, step=0.05, work=made).report
    assert not made.exists()
    assert "were taken from the work folder" in str(report)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is no folder; allowed is a folder"):
        tq.compress(small, step=0.05, work=tmp_path / "file")
    with pytest.raises(OutputError, match="cannot make the work folder"):
        tq.compress(small, step=0.05, work=tmp_path / "file" / "inside")


def test_a_folder_of_ours_with_a_file_of_somebody_else_stays(tmp_path):
    folder = WorkFolder(tmp_path / "made", ())
    folder.keep("kind", 1, lambda: (1.5, [b"bytes"]))
    (folder.path / "theirs").write_text("")
    folder.finish()
    assert [p.name for p in folder.path.iterdir()] == ["theirs"]


def test_a_full_folder_keeps_what_it_has(small, tmp_path, monkeypatch, caplog):
    expected = tq.compress(small, step=0.05).data
    monkeypatch.setattr(work_module, "MOST_BYTES", 3000)
    folder = tmp_path / "mine"
    folder.mkdir()
    assert tq.compress(small, step=0.05, work=folder).data == expected
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 3000
    assert any(folder.iterdir())
    assert sum("is full" in r.message for r in caplog.records) == 1


@dataclass(frozen=True)
class Record:
    values: np.ndarray
    name: str | None


class Stranger:
    pass


@pytest.mark.parametrize(
    "array",
    [
        np.arange(-128, 128, dtype=np.int32), np.array([128], np.int32), np.array([-129, 5]), np.array([2**31 - 1, -(2**31)]),
        np.array([2**63 - 1]), np.zeros((3, 0), np.int32), np.array(7, np.int32), np.linspace(-1, 1, 7), np.array([np.nan, -0.0]),
        np.arange(6, dtype=np.uint8), np.array([True, False]), np.arange(12.0).reshape(3, 4).T,
    ],
    ids=str,
)  # fmt: skip
def test_parts_come_back_bit_for_bit(tmp_path, array):
    folder = WorkFolder(tmp_path / "work", [Record])
    value = (Record(array, None), {"a": [1, 2.5, True, "x", None], "b": b"\0\xff"}, np.float32(0.1), float("inf"), 1e-310)
    folder.put("kind", folder.key("kind", 1), value)
    found = folder.find("kind", folder.key("kind", 1))
    assert type(found) is tuple
    assert found[0].values.dtype == array.dtype
    assert found[0].values.shape == array.shape
    assert found[0].values.tobytes() == np.ascontiguousarray(array).tobytes()
    assert found[1:] == value[1:]
    assert type(found[2]) is np.float32
    assert found[0].values.flags.writeable


def test_records_that_were_not_named_are_not_made(tmp_path):
    one = WorkFolder(tmp_path / "work", [Record])
    one.put("kind", one.key("kind", 1), Record(np.zeros(3), "x"))
    assert one.find("kind", one.key("kind", 1)) is not None
    assert WorkFolder(tmp_path / "work", []).find("kind", one.key("kind", 1)) is None
    assert (tmp_path / "work" / MARK).exists()


def test_fingerprints_differ_where_values_do():
    values = [
        None, 0, 0.0, False, "", b"", (), [], {}, (0,), (0, 0), ((0,), 0), (0, (0,)), "0", 1, 1.0, True, -0.0,
        np.zeros(2), np.zeros(2, np.float32), np.zeros((1, 2)), np.zeros((2, 1)), torch.zeros(2), torch.zeros(2).half(),
        torch.zeros(2, dtype=torch.bfloat16), torch.tensor([0.0, -0.0]), np.array([True]), {"a": 1}, {"a": 2}, Record(np.zeros(1), ""),
    ]  # fmt: skip
    assert len({fingerprint(v) for v in values}) == len(values)
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert fingerprint(torch.arange(6).reshape(2, 3).T) == fingerprint(torch.arange(6).reshape(2, 3).T.contiguous())
    one, two = Stranger(), Stranger()
    one.x, two.x = torch.zeros(1), torch.ones(1)
    assert fingerprint(one) != fingerprint(two)
    one.itself = one
    fingerprint(one)
