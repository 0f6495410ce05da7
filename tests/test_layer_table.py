"""The page says of every layer in every mode what happens."""

from __future__ import annotations

import pytest

from layer_table import NAMES, on_page, onnx_cell, row


@pytest.mark.parametrize("name", NAMES)
def test_the_page_says_what_runs(name):
    assert on_page()[name][:4] == row(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_page_says_what_leaves_as_onnx(name):
    pytest.importorskip("onnxruntime", reason='pip install -c constraints.txt -e ".[test]"')
    assert on_page()[name][4] == onnx_cell(name)
