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


@pytest.mark.parametrize("page", ["running", "features", "training"])
def test_the_blocks_of_a_page_run_on_the_readme_s_model(page, tmp_path):
    """Python blocks of docs pages, and shell blocks, in a folder where the README's have run."""
    pytest.importorskip("sklearn", reason="the pages' data come with scikit-learn")
    (tmp_path / "model.py").write_text(next(block for _, block in BLOCKS if block.startswith("# model.py")))
    prepare = (
        "python model.py && transquant compress --model model.py:network --weights float.safetensors --ratio 8 --effort 1 -o net.tq"
    )
    run_block("bash", prepare, tmp_path)
    for language, block in blocks_of(ROOT / "docs" / f"{page}.md"):
        if language == "python" and block.startswith("# small.py"):
            (tmp_path / "small.py").write_text(block)
            continue
        run_block(language, block, tmp_path)


def test_the_table_is_that_of_the_benchmark():
    import json

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from main_job import table

    rows = json.loads((ROOT / "benchmarks" / "main_job.json").read_text())["rows"]
    assert table(rows) in (ROOT / "README.md").read_text()
