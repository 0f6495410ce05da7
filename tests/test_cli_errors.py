"""The command line and trouble: exit codes, one sentence on stderr for bad input, nothing half written."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import transquant as tq
from cli_model import NET
from conftest import make_net

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
    (("decompress", "good.tq", "-o", "x.onnx"), 2, "holds no ONNX graph"),
    (("compress", "--weights", "broken.onnx", "--bits", 2, *OUT), 2, "not a valid .onnx file"),
    (("export", "good.tq", "-o", "x.onnx", "--input-shape", "1,3,8,8"), 2, "export needs --model"),
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
    (tmp_path / "broken.onnx").write_text("no network\n")
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
