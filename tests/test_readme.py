"""Every block of the README runs, in order, in one folder, as a reader would run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from blocks import blocks_of, commands, run_block

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = blocks_of(ROOT / "README.md")


def test_the_two_commands_come_first_and_the_pip_lines_are_what_they_do():
    """`make demo` and `make test` themselves are run by .ci/run."""
    (first, setup), (second, plain) = BLOCKS[:2]
    assert first == second == "bash"
    assert commands(setup) == ["make demo", "make test"]
    done = subprocess.run(
        ["make", "-n", "-B", "-C", str(ROOT), "--no-print-directory", "PYTHON=python3", "demo", "test"],
        capture_output=True,
        text=True,
        check=True,
    )
    steps = [line for line in done.stdout.splitlines() if not line.startswith(("touch", "python3 -c"))]
    assert steps == commands(plain)


def test_every_other_block_runs(tmp_path):
    pytest.importorskip("sklearn", reason="the README's data come with scikit-learn")
    count = 0
    for language, block in BLOCKS[2:]:
        if language == "python" and block.startswith("# model.py"):
            (tmp_path / "model.py").write_text(block)
            continue
        count += run_block(language, block, tmp_path)
    assert count >= 6
    assert (tmp_path / "net.tq").stat().st_size <= 4000
    assert (tmp_path / "curve.png").exists()


def test_the_table_is_that_of_the_benchmark():
    import json

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from main_job import table

    rows = json.loads((ROOT / "benchmarks" / "main_job.json").read_text())["rows"]
    assert table(rows) in (ROOT / "README.md").read_text()
