"""Blocks of the pages that go on with the README's model run, in order, in one folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from blocks import blocks_of, run_block

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = blocks_of(ROOT / "README.md")


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
