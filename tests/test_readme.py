"""Every block of the README runs, in order, in one folder, as a reader would run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)


def commands(block):
    """The lines of a shell block without their comments."""
    return [line for raw in block.splitlines() if (line := re.sub(r"\s+#.*", "", raw).strip())]


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
    scripts = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": scripts + os.pathsep + os.environ["PATH"], "COLUMNS": "200"}
    count = 0
    for language, block in BLOCKS[2:]:
        if language == "python" and block.startswith("# model.py"):
            (tmp_path / "model.py").write_text(block)
            continue
        lines = [[sys.executable, "-c", block]] if language == "python" else [["bash", "-c", line] for line in commands(block)]
        assert language in ("python", "bash")
        for line in lines:
            done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{line[-1]}\n{done.stderr}"
            count += 1
    assert count >= 6
    assert (tmp_path / "net.tq").stat().st_size <= 4000
    assert (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("page", ["running"])
def test_the_blocks_of_a_page_run_on_the_readme_s_model(page, tmp_path):
    """Python blocks of docs pages, and shell blocks, in a folder where the README's have run."""
    pytest.importorskip("sklearn", reason="the pages' data come with scikit-learn")
    scripts = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": scripts + os.pathsep + os.environ["PATH"], "COLUMNS": "200"}
    (tmp_path / "model.py").write_text(next(block for _, block in BLOCKS if block.startswith("# model.py")))
    prepare = (
        "python model.py && transquant compress --model model.py:network --weights float.safetensors --ratio 8 --effort 1 -o net.tq"
    )
    subprocess.run(["bash", "-c", prepare], cwd=tmp_path, env=environment, check=True, capture_output=True)
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "docs" / f"{page}.md").read_text(), re.M | re.S):
        lines = [[sys.executable, "-c", block]] if language == "python" else [["bash", "-c", line] for line in commands(block)]
        for line in lines:
            done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{line[-1]}\n{done.stderr}"


def test_the_table_is_that_of_the_benchmark():
    import json

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from main_job import table

    rows = json.loads((ROOT / "benchmarks" / "main_job.json").read_text())["rows"]
    assert table(rows) in (ROOT / "README.md").read_text()
