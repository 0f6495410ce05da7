"""Every verb from the outside: outputs, and what is never overwritten."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import transquant as tq
from cli_model import NET
from conftest import make_net
from transquant.cli.console import set_logging


def test_the_whole_way(cli, tmp_path):
    code, out, err = cli("compress", *NET, "--bits", 5, "-o", "net.tq")
    assert (code, err) == (0, "")
    size = (tmp_path / "net.tq").stat().st_size
    assert out.startswith(f"net.tq: {size:,} bytes on disk")
    code, out, err = cli("decompress", "net.tq", "-o", "net.safetensors")
    assert code == 0
    state = load_file(tmp_path / "net.safetensors")
    make_net().load_state_dict(state, strict=True)
    for key, value in tq.load("net.tq").state_dict().items():
        assert torch.equal(state[key], value)


def test_json_is_one_document_on_stdout(cli, tmp_path):
    code, out, err = cli("compress", *NET, "--size", "3KB", "-o", "net.tq", "--json", "--effort", 1)
    assert (code, err) == (0, "")
    report = json.loads(out)
    size = (tmp_path / "net.tq").stat().st_size
    parts = ("payload_bytes", "side_parameter_bytes", "side_info_bytes", "header_bytes")
    assert report["file_bytes"] == size == sum(report[p] for p in parts)
    assert report["metric"] == "kl"
    code, out, err = cli("inspect", "net.tq", "--json")
    again = json.loads(out)
    assert {p: report[p] for p in parts} == {p: again[p] for p in parts}
    for a, b in zip(report["layers"], again["layers"], strict=True):
        assert a["name"] == b["name"]
        assert a["payload_bits"] == pytest.approx(b["payload_bits"])
        assert a["distortion_share"] == pytest.approx(b["distortion_share"], rel=0.1, abs=1e-3)
    code, out, _ = cli("decompress", "net.tq", "-o", "net.safetensors", "--json")
    assert json.loads(out)["tensors"] == len(make_net().state_dict())


def test_quiet_says_nothing_and_files_are_not_overwritten(cli, tmp_path):
    assert cli("compress", *NET, "--step", 0.01, "-o", "net.tq", "-q") == (0, "", "")
    before = (tmp_path / "net.tq").read_bytes()
    code, _, err = cli("compress", *NET, "--step", 0.02, "-o", "net.tq")
    assert code == 2
    assert "--force" in err
    assert (tmp_path / "net.tq").read_bytes() == before
    assert cli("compress", *NET, "--step", 0.02, "-o", "net.tq", "-q", "--force")[0] == 0
    assert (tmp_path / "net.tq").read_bytes() != before


def test_inspect_tells_where_every_byte_went(cli):
    cli("compress", *NET, "--bits", 5, "-o", "net.tq", "-q")
    code, out, _ = cli("inspect", "net.tq")
    assert code == 0
    for word in (
        "weights",
        "side parameters",
        "side information",
        "header",
        "grouped.weight",
        "32x4x3x3",
        "identity",
        "linear.bias",
    ):
        assert word in out


def test_verify(cli, tmp_path):
    data = tq.compress(make_net(), None, step=0.1).data
    (tmp_path / "net.tq").write_bytes(data)
    code, out, err = cli("verify", "net.tq")
    assert (code, err) == (0, "")
    first, note = out.splitlines()
    count = sum(v.numel() for v in make_net().parameters())
    digest = hashlib.sha256(data).hexdigest()
    tensors = len(make_net().state_dict())
    assert (
        first
        == f"net.tq: OK, format version {data[4]}, {tensors} tensors, {count:,} parameters, {len(data):,} bytes, SHA-256 {digest}"
    )
    assert "not malice" in note
    code, out, err = cli("verify", "net.tq", "net.tq", "--json")
    found = json.loads(out)
    assert [f["sha256"] for f in found["files"]] == [digest, digest]
    assert found["files"][0]["parameters"] == count
    assert cli("verify", "net.tq", "-q") == (0, "", "")
    (tmp_path / "bad.tq").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    code, out, err = cli("verify", "net.tq", "bad.tq")
    assert (code, out.splitlines()) == (4, [first])
    assert err.startswith("error: bad.tq: the checksum of section")
    assert cli("verify", "bad.tq", "--json")[:2] == (4, "")


def test_verify_takes_limits_and_no_torch(cli, tmp_path):
    from bombs import constant

    (tmp_path / "wide.tq").write_bytes(constant(0, 1_500_000, 1024 * 4, 1024))  # 17 MiB asked for by 4 KB
    code, _, err = cli("verify", "wide.tq", "--max-expansion", 100)
    assert code == 4
    assert "max_expansion" in err
    code, _, err = cli("verify", "wide.tq")
    assert code == 4
    assert cli("verify", "wide.tq", "--max-expansion", 100_000)[0] == 0
    code = "import sys\nfrom transquant.cli.verifying import verify_file\nverify_file(sys.argv[1], None, 10**6)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "wide.tq")], check=True)


def digits_folder(folder, count=5):
    rng = np.random.default_rng(0)
    for label in range(10):
        (folder / f"{label}").mkdir(parents=True)
        for k in range(count):
            pixels = rng.integers(0, 256, (14, 17, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{label}" / f"{k}.png")


IMAGES = ("--resize", 14, "--crop", 12, "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25")


def test_image_folders(cli, tmp_path):
    digits_folder(tmp_path / "images")
    (tmp_path / "images" / "3" / "broken.png").write_bytes(b"no picture")
    code, _, err = cli("compress", "--model", "model.py:net", "--calibration", "images", *IMAGES, "--bits", 6, "-o", "net.tq")
    assert code == 0
    assert "1 of 51 images could not be read" in err
    save_file(make_net().state_dict(), tmp_path / "net.safetensors")
    options = ("--model", "model.py:net", "--weights", "net.safetensors", "--data", "images", *IMAGES)
    code, out, _ = cli("evaluate", "net.tq", *options, "--json")
    result = json.loads(out)
    assert code == 0
    assert result["samples"] == 50
    assert set(result) == {"file", "file_bytes", "samples", "top1", "kl", "float_top1", "agreement"}
    code, out, _ = cli(
        "compress", *options[:4], "--calibration", "images", *options[4:], "--max-drop", 10, "-o", "drop.tq", "--json"
    )
    assert code == 0
    small = json.loads(cli("evaluate", "drop.tq", *options, "--json")[1])
    assert small["float_top1"] - small["top1"] <= 10


def test_sweep_writes_the_curve(cli, tmp_path):
    x = torch.randn(100, 3, 12, 12)
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=make_net()(x).argmax(1).numpy())
    code, out, _ = cli(
        "sweep",
        "--model",
        "model.py:net",
        "--calibration",
        "data.npz",
        "--data",
        "data.npz",
        "--bits",
        "4,6",
        "-o",
        "curve.csv",
        "--effort",
        1,
    )
    assert code == 0
    lines = (tmp_path / "curve.csv").read_text().splitlines()
    assert out.splitlines() == lines
    assert lines[0].split(",") == [
        "bits",
        "file_bytes",
        "bits_per_parameter",
        "predicted_distortion",
        "measured_distortion",
        "top1",
    ]
    rows = [[float(v) for v in line.split(",")] for line in lines[1:]]
    assert len(rows) == 2
    assert rows[0][1] < rows[1][1]
    assert rows[0][4] > rows[1][4]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    again = (
        "sweep",
        "--model",
        "model.py:net",
        "--calibration",
        "data.npz",
        "--data",
        "data.npz",
        "--bits",
        "4,5",
        "-o",
        "curve.csv",
        "--effort",
        1,
    )
    assert cli(*again)[0] == 2
    (tmp_path / "curve.csv").write_text("\n".join([lines[0], lines[1].replace(lines[1].split(",")[5], "12.5"), lines[2]]) + "\n")
    code, out, _ = cli(*again, "--resume")
    assert code == 0
    assert [line.split(",")[0] for line in out.splitlines()[1:]] == ["4.0", "5.0", "6.0"]
    assert out.splitlines()[1].endswith("12.5")  # kept, not computed again
    (tmp_path / "curve.csv").write_text("something,else\n1,2\n")
    assert "not the CSV" in cli(*again, "--resume")[2]


def test_demo(cli, tmp_path):
    pytest.importorskip("sklearn", reason="the demo's data come with scikit-learn")
    code, out, err = cli("demo", "-o", "there", "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["transquant"]["file_bytes"] == (tmp_path / "there" / "digits.tq").stat().st_size <= 1.5 * 21226 / 8
    assert result["float"]["top1"] > 98
    assert result["transquant"]["top1"] > 98
    assert result["transquant"]["top1"] > result["plain rounding"]["top1"] + 4
    assert (tmp_path / "there" / "curve.png").exists()


def test_data_beside_a_target_is_scored(cli, tmp_path):
    x = torch.randn(60, 3, 12, 12)
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=make_net()(x).argmax(1).numpy())
    code, out, _ = cli("compress", *NET, "--bits", 8, "--data", "data.npz", "-o", "net.tq", "--json", "--effort", 1)
    assert code == 0
    score = json.loads(out)["score"]
    assert score["samples"] == 60
    assert score["float_top1"] == 100
    assert score["top1"] > 80
    np.savez(tmp_path / "unlabelled.npz", x=x.numpy())
    code, out, err = cli("evaluate", "net.tq", "--model", "model.py:net", "--data", "unlabelled.npz", "--json")
    assert (code, json.loads(out)["samples"]) == (0, 60)
    assert "no labels" in err
    for y in (np.zeros(59, np.int64), np.eye(10)[np.zeros(60, int)], np.full(60, 14), np.array(["a"] * 60)):
        np.savez(tmp_path / "wrong.npz", x=x.numpy(), y=y)
        code, _, err = cli("evaluate", "net.tq", "--model", "model.py:net", "--data", "wrong.npz")
        assert code == 2
        assert "error: " in err


def test_inputs_and_devices_are_never_written_over(cli, tmp_path):
    save_file(make_net().state_dict(), tmp_path / "net.safetensors")
    before = (tmp_path / "net.safetensors").read_bytes()
    code, _, err = cli("compress", "--weights", "net.safetensors", "--size", "4KB", "-o", "net.safetensors", "--force")
    assert code == 2
    assert "both an input and the output" in err
    assert (tmp_path / "net.safetensors").read_bytes() == before
    os.mkfifo(tmp_path / "pipe.tq")
    code, _, err = cli("compress", "--weights", "net.safetensors", "--size", "4KB", "-o", "pipe.tq", "--force")
    assert code == 6
    assert "no ordinary file" in err


def test_an_interrupt_inside_compiled_code_is_an_interrupt(cli, monkeypatch):
    def interrupt(*args, **kwargs):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise SystemError("returned a result with an exception set") from error

    monkeypatch.setattr("transquant.codec.compress", interrupt)
    code, _, err = cli("compress", *NET, "--bits", 4, "-o", "net.tq")
    assert code == 130
    assert "interrupted" in err


def test_a_reader_that_has_seen_enough(tmp_path):
    path = tmp_path / "net.tq"
    tq.compress(make_net(), None, step=0.1).save(path)
    code = f"{sys.executable} -m transquant inspect {path} | true; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", code], capture_output=True).returncode == 0
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m transquant inspect {path} > /dev/full"], capture_output=True, text=True
    )
    assert done.returncode == 6
    assert "No space left" in done.stderr


def test_the_log_goes_to_what_is_stderr_then(monkeypatch):
    first, second = io.StringIO(), io.StringIO()
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers = []  # none of them is closed by `force`
    try:
        monkeypatch.setattr(sys, "stderr", first)
        set_logging(quiet=False, verbose=False)
        logging.getLogger("transquant").warning("early")
        first_text = first.getvalue()
        first.close()
        logging.getLogger("transquant").warning("nowhere to say it")
        monkeypatch.setattr(sys, "stderr", second)
        logging.getLogger("transquant").warning("late")
    finally:
        root.handlers = before
        root.setLevel(level)
    assert first_text == "WARNING: early\n"
    assert second.getvalue() == "WARNING: late\n"
