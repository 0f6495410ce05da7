"""Networks of other libraries; all of them, and larger ones, are in benchmarks/zoo.py."""

from __future__ import annotations

import importlib.util

import pytest

import exports
from zoo import NETWORKS, run

# timm finds torchvision, and transformers is imported in its company
NEEDS = {"sound_autoencoder": (), "gpt2": ("transformers",), "mobilenetv3_small_050": ("timm", "torchvision")}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_networks_of_other_libraries(name):
    missing = [library for library in NEEDS[name] if importlib.util.find_spec(library) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}: the extra 'zoo'")
    row = run(name)
    assert 1 / row["tolerance"] < row["ratio"] < row["tolerance"]
    assert row["spread"] > 1  # outputs that depend on the inputs
    assert row["file_bytes"] * 8 <= 4 * row["parameters"]
    assert not row["exact"]
    assert name in NETWORKS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "gpt2"])
def test_exports_of_networks_of_other_libraries(name):
    missing = [library for library in NEEDS[name] if importlib.util.find_spec(library) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}: the extra 'zoo'")
    row = exports.run(name, ("float",))
    assert row["exports"]["float"]["output"] <= exports.BOUND
    assert row["exports"]["float"]["weights"] >= 9
    assert row["again"]["coded"] >= 9
    assert row["again"]["output"] < 0.2
