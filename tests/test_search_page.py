"""The page about search runs, block after block."""

from __future__ import annotations

from pathlib import Path

import pytest

from blocks import blocks_of, run_block

PAGE = Path(__file__).resolve().parents[1] / "docs" / "search.md"


@pytest.mark.slow
def test_the_page_runs(tmp_path):
    pytest.importorskip("sklearn", reason="the page's data come with scikit-learn")
    blocks = [text for language, text in blocks_of(PAGE) if language == "python"]
    assert len(blocks) == 2
    run_block("python", "\n".join(blocks), tmp_path)
