"""Every block of docs/onnx.md runs, in order, in one folder, as a reader would run it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from test_readme import commands

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "onnx.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.mark.slow
def test_every_block_runs(tmp_path):
    pytest.importorskip("sklearn", reason="the page's data come with scikit-learn")
    scripts = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": scripts + os.pathsep + os.environ["PATH"], "COLUMNS": "200"}
    for language, block in BLOCKS:
        if language == "python" and block.startswith("# model.py"):
            (tmp_path / "model.py").write_text(block)
            continue
        assert language in ("python", "bash")
        lines = [[sys.executable, "-c", block]] if language == "python" else [["bash", "-c", line] for line in commands(block)]
        for line in lines:
            done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{line[-1]}\n{done.stderr}"
    assert len(BLOCKS) == 6
    sizes = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert sizes["digits_int4.onnx"] < sizes["digits_int8.onnx"] < sizes["digits.onnx"]
    assert sizes["cli.onnx"] == sizes["again.onnx"] <= sizes["digits.onnx"]
    assert (tmp_path / "cli.tq").read_bytes() == (tmp_path / "from_onnx.tq").read_bytes()


def test_the_table_is_that_of_the_benchmark():
    from exports import table

    rows = json.loads((ROOT / "benchmarks" / "exports.json").read_text())["rows"]
    assert table(rows) in PAGE
    assert all(row["exports"]["float"]["output"] <= 1e-4 for row in rows)
    assert len(rows) == 10
