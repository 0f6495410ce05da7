"""Every verb from the outside: outputs, exit codes, one sentence on stderr for bad input, nothing half written."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import transquant as tq
from conftest import make_net
from transquant.cli import main

MODEL = """
from conftest import make_net
import torch
from torch import nn

def net():
    return make_net()

def pictures():
    return [torch.randn(40, 3, 12, 12, generator=torch.Generator().manual_seed(k)) for k in range(3)]

def nothing():
    return None

def fails():
    raise RuntimeError("no weights here")

def without_weights():
    return nn.ReLU()
"""


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    """Runs a command line in a folder with model.py; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return run


NET = ("--model", "model.py:net", "--calibration", "model.py:pictures")


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
    assert result["transquant"]["top1"] > result["plain rounding"]["top1"] + 10
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


OUT = ("-o", "out.tq")
BAD = [
    (("compress", "--model", "absent.py:net", "--bits", 2, *OUT), 2, "no file absent.py"),
    (("compress", "--model", "model.py", "--bits", 2, *OUT), 2, "expected FILE.py:FUNCTION"),
    (("compress", "--model", "model.py:other", "--bits", 2, *OUT), 2, "no function 'other'"),
    (("compress", "--model", "model.py:nothing", "--bits", 2, *OUT), 2, "returned a NoneType"),
    (("compress", "--model", "model.py:fails", "--bits", 2, *OUT), 2, "no weights here"),
    (("compress", "--model", "broken.py:net", "--bits", 2, *OUT), 2, "SyntaxError"),
    (("compress", "--model", "model.py:without_weights", "--bits", 2, *OUT), 2, "no weight to code"),
    (("compress", "--bits", 2, *OUT), 2, "give a model"),
    (("compress", "--model", "model.py:net", "--weights", "absent.safetensors", "--bits", 2, *OUT), 2, "No such file"),
    (("compress", "--model", "model.py:net", "--weights", "other.safetensors", "--bits", 2, *OUT), 2, "do not fit the model"),
    (("compress", "--model", "model.py:net", "--weights", "broken.py", "--bits", 2, *OUT), 2, ".safetensors"),
    (("compress", "--model", "model.py:net", "--calibration", "absent", "--bits", 2, *OUT), 2, "no file or folder absent"),
    (("compress", "--model", "model.py:net", "--calibration", "empty", "--bits", 2, *OUT), 2, "has no images"),
    (("compress", "--model", "model.py:net", "--calibration", "unreadable", "--bits", 2, *OUT), 2, "none of the 1 images"),
    (("compress", "--model", "model.py:net", "--calibration", "wrong.npz", "--bits", 2, *OUT), 2, "refuses a calibration batch of shape"),
    (("compress", "--model", "model.py:net", "--calibration", "nan.npz", "--bits", 2, *OUT), 2, "NaN or infinite"),
    (("compress", "--model", "model.py:net", "--calibration", "broken.npz", "--bits", 2, *OUT), 2, "broken.npz is no .npz file"),
    (("compress", "--model", "model.py:net", "--calibration", "model.py:nothing", "--bits", 2, *OUT), 2, "returned nothing"),
    (("compress", "--model", "model.py:net", "--calibration", "model.py:fails", "--bits", 2, *OUT), 2, "no weights here"),
    (("compress", "--model", "model.py:net", "--calibration", "keys.npz", "--bits", 2, *OUT), 2, "has images, labels, expected x"),
    (("compress", "--model", "model.py:net", "--calibration", "empty", "--limit", -3, "--bits", 2, *OUT), 2, "--limit"),
    (("compress", "--weights", "other.safetensors", "--calibration", "wrong.npz", "--bits", 2, *OUT), 2, "--model"),
    (("compress", "--model", "model.py:net", *OUT), 2, "exactly one target"),
    (("compress", "--model", "model.py:net", "--bits", 2, "--size", "3KB", *OUT), 2, "--bits and --size"),
    (("compress", "--model", "model.py:net", "--size", "3 parsecs", *OUT), 2, "3 parsecs"),
    (("compress", "--model", "model.py:net", "--max-drop", 1, *OUT), 2, "--data"),
    (("compress", "--model", "model.py:net", "--size", "40", *OUT), 3, "the smallest takes"),
    (("compress", "--model", "model.py:net", "--size", "1GB", *OUT), 3, "tensors take only"),
    (("compress", "--model", "model.py:net", "--bits", 4, "--exact", "nope.*", *OUT), 2, "matches no coded tensor"),
    (("compress", "--model", "model.py:net", "--bits", 4, "-o", "absent/out.tq"), 6, "absent does not exist"),
    (("compress", "--model", "model.py:net", "--bits", 4, "-o", "empty"), 6, "folder"),
    (("compress", "--model", "model.py:net", "--bits", "four", *OUT), 2, "valid number"),
    (("compress", "--model", "model.py:net", "--bits", 4, "--metric", "psnr", *OUT), 2, "psnr"),
    (("inspect", "absent.tq"), 2, "absent.tq"),
    (("inspect", "model.py"), 4, "not a transquant file"),
    (("inspect", "empty"), 2, "empty"),
    (("decompress", "model.py", "-o", "x.safetensors"), 4, "not a transquant file"),
    (("decompress", "good.tq", "-o", "x.pt"), 2, ".safetensors"),
    (("decompress", "cut.tq", "-o", "x.safetensors"), 4, ""),
    (("verify", "cut.tq"), 4, "cut.tq: "),
    (("verify", "model.py"), 4, "model.py: this is not a transquant file"),
    (("verify", "absent.tq"), 2, "absent.tq"),
    (("verify", "empty"), 2, "empty"),
    (("verify", "good.tq", "--max-decoded-bytes", 100), 4, "the limit is 100"),
    (("verify", "good.tq", "--max-expansion", -1), 2, "--max-expansion"),
    (("verify",), 2, "Missing argument"),
    (("evaluate", "good.tq"), 2, "--model"),
    (("evaluate", "good.tq", "--model", "model.py:without_weights", "--data", "wrong.npz"), 2, "do not fit the model"),
    (("sweep", "--model", "model.py:net", "-o", "curve.txt"), 2, ".csv"),
    (("sweep", "--model", "model.py:net", "--bits", "1,two", "-o", "curve.csv"), 2, "expected numbers"),
    (("shrink",), 2, "shrink"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "message"), BAD, ids=lambda v: " ".join(map(str, v)) if isinstance(v, tuple) else None
)
def test_bad_input(cli, tmp_path, arguments, code, message):
    (tmp_path / "broken.py").write_text("def net(:\n")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "unreadable" / "a").mkdir(parents=True)
    (tmp_path / "unreadable" / "a" / "1.png").write_bytes(b"no picture")
    np.savez(tmp_path / "wrong.npz", x=np.zeros((20, 5), np.float32))
    np.savez(tmp_path / "nan.npz", x=np.full((20, 3, 12, 12), np.nan, np.float32))
    np.savez(tmp_path / "keys.npz", images=np.zeros((20, 3, 12, 12), np.float32), labels=np.zeros(20))
    save_file({"weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    good = tq.compress(make_net(), None, step=0.1).data
    (tmp_path / "good.tq").write_bytes(good)
    (tmp_path / "cut.tq").write_bytes(good[:-5])
    before = sorted(p.name for p in tmp_path.rglob("*") if "__pycache__" not in str(p))
    found, out, err = cli(*arguments)
    assert found == code, err
    assert message in err
    assert out == ""
    if "Usage" not in err:  # the parser's own messages have a usage line before them
        assert err.startswith("error: ") or "WARNING" in err
        assert err.rstrip("\n").count("\nerror: ") + err.startswith("error: ") == 1
    assert sorted(p.name for p in tmp_path.rglob("*") if "__pycache__" not in str(p)) == before


def test_read_only_folder(cli, monkeypatch):
    """Found before any work is done. (A super-user may write everywhere, so the system's answer is given here.)"""

    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    monkeypatch.setattr("transquant.codec.compress", lambda *a, **k: pytest.fail("the folder was not checked first"))
    code, _, err = cli("compress", "--model", "model.py:net", "--bits", 4, "-o", "out.tq")
    assert code == 6
    assert "out.tq: Read-only file system" in err


def test_disk_full(cli, tmp_path, monkeypatch):
    (tmp_path / "old.tq").write_bytes(b"precious")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    code, _, err = cli("compress", "--model", "model.py:net", "--bits", 4, "-o", "old.tq", "--force")
    assert code == 6
    assert "No space left on device" in err
    assert (tmp_path / "old.tq").read_bytes() == b"precious"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["model.py", "old.tq"]


def test_interrupt(cli, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("transquant.codec.compress", interrupt)
    code, _, err = cli("compress", *NET, "--bits", 4, "-o", "net.tq")
    assert code == 130
    assert "interrupted" in err
    assert not (tmp_path / "net.tq").exists()


def test_help_is_quick_to_import():
    """--help must not import torch: that alone takes seconds."""
    code = "import sys\nfrom transquant.cli import main\ntry:\n    main(['--help'])\nfinally:\n    assert 'torch' not in sys.modules and 'numba' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in ("compress", "decompress", "inspect", "verify", "evaluate", "sweep", "demo", "Exit codes"):
        assert verb in done.stdout


def test_module_and_script_are_the_same():
    done = subprocess.run([sys.executable, "-m", "transquant", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"transquant {tq.__version__}"
