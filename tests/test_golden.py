"""Every released version of the format decodes for ever, to the same bytes, in both readers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

import transquant as tq
from transquant.container.file import VERSION

FILES = sorted((Path(__file__).parent / "golden").glob("*.tq"))


def test_this_version_has_a_golden_file():
    assert f"version{VERSION}.tq" in [f.name for f in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_golden_files_decode(path):
    arrays = tq.reader.load(path)
    expected = json.loads(path.with_suffix(".json").read_text())
    assert {k: [str(v.dtype), list(v.shape), hashlib.sha256(v.tobytes()).hexdigest()] for k, v in arrays.items()} == expected
    state = tq.load(path).state_dict()
    assert list(state) == list(arrays)
    for key, value in state.items():
        reference = value.float() if str(value.dtype) == "torch.bfloat16" else value
        assert reference.numpy().tobytes() == arrays[key].tobytes(), key
