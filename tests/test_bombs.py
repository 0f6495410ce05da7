"""Bombs under limits of memory and time, in processes of their own: refused early, or decoded within the stated bounds."""

from __future__ import annotations

import sys

import pytest

from bombs import ALLOWED, REFUSED, explode

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="address spaces are limited and measured as Linux does it")

# those that the shared part of the readers refuses are read once
DECODED = [*ALLOWED, "an exact tensor that inflates to 128 MiB", "values that overflow", "exponents that overflow"]


@pytest.fixture(scope="module")
def exploded(tmp_path_factory):
    compiled = explode(tmp_path_factory.mktemp("compiled"), "compiled", [*REFUSED, *ALLOWED])
    return {"compiled": compiled, "numpy": explode(tmp_path_factory.mktemp("numpy"), "numpy", DECODED)}


@pytest.mark.parametrize("name", REFUSED)
def test_bombs_are_refused_within_their_memory(exploded, name):
    for found in [results[name] for results in exploded.values() if name in results]:
        assert found["outcome"] in ("LimitExceeded", "CorruptFile", "UnsupportedVersion"), found
        assert found["seconds"] < 60


@pytest.mark.parametrize("reader", ["compiled", "numpy"])
@pytest.mark.parametrize("name", ALLOWED)
def test_the_largest_that_a_small_file_may_ask_for(exploded, name, reader):
    found = exploded[reader][name]
    assert found["outcome"] == "decoded", found
    assert found["seconds"] < 60
