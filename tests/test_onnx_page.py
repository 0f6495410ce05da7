"""Every block of docs/onnx.md runs, in order, in one folder, as a reader would run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blocks import blocks_of, run_block

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "onnx.md").read_text()
BLOCKS = blocks_of(ROOT / "docs" / "onnx.md")


@pytest.mark.slow
def test_every_block_runs(tmp_path):
    pytest.importorskip("sklearn", reason="the page's data come with scikit-learn")
    for language, block in BLOCKS:
        if language == "python" and block.startswith("# model.py"):
            (tmp_path / "model.py").write_text(block)
            continue
        run_block(language, block, tmp_path)
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
