"""Every block of the pages about other libraries runs, as a reader would run it."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from pathlib import Path

import pytest

from blocks import blocks_of, need, offline, run_block

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = {"ways_in.md": ("timm", "torchvision"), "transformers.md": ("transformers",)}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_a_page_run(page, tmp_path):
    need(*PAGES[page])
    environment, count = offline(tmp_path), 0
    for language, blocks in groupby(blocks_of(DOCS / page), itemgetter(0)):  # names of a block are known in the next
        count += run_block(language, "".join(text for _, text in blocks), tmp_path, **environment)
    assert count >= 2
    if page == "transformers.md":
        large, small = ((tmp_path / f / "model.safetensors").stat().st_size for f in ("gpt2-float", "gpt2-loaded"))
        assert small < large / 7
        assert (tmp_path / "gpt2.tq").stat().st_size < small <= (tmp_path / "gpt2.tq").stat().st_size + 400
