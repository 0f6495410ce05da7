"""Large models: read, quantized and written in pieces, with the same bytes as in one piece, and searched on a sample."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import transquant as tq
from transquant import encoder as encoder_module
from transquant import modules
from transquant.encoder import Encoder, Source
from transquant.inputs import load_weights
from transquant.stats import weight_statistics
from transquant.workers import workers


@pytest.fixture
def state():
    torch.manual_seed(3)
    shapes = {"a": (96, 120), "b": (80, 12, 3, 3), "c": (160, 64), "tiny": (3, 5)}
    tensors = {name: torch.randn(shape) * (1 + k) for k, (name, shape) in enumerate(shapes.items())}
    return tensors | {"a.bias": torch.randn(96), "count": torch.tensor(7), "half": torch.randn(40, 50).to(torch.bfloat16)}


@pytest.fixture
def small_is_large(monkeypatch):
    """Every model is large, and pieces are small."""
    monkeypatch.setattr(encoder_module, "LARGE", 1)
    monkeypatch.setattr(encoder_module, "SAMPLE", 9000)
    monkeypatch.setattr(encoder_module, "WINDOW", 10_000)


@pytest.fixture
def passes(monkeypatch):
    """The scalars c at which drafts were written in pieces."""
    seen = []
    written = Encoder._written
    monkeypatch.setattr(Encoder, "_written", lambda self, c, choice: seen.append(c) or written(self, c, choice))
    return seen


def test_a_file_gives_the_bytes_of_its_tensors(state, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    in_memory = tq.compress({name: state[name] for name in load_weights(path)}, bits=5.0)
    assert tq.compress(path, bits=5.0).data == in_memory.data


def test_tensors_of_a_file_are_no_aliases_of_each_other(tmp_path):
    """Memory of a tensor that is gone may be the next one's."""
    path = tmp_path / "model.safetensors"
    equal = torch.randn(64, 64)
    save_file({f"{k}.weight": equal.clone() for k in range(20)}, path)
    found = tq.compress(path, bits=4.0)
    assert found.report.num_parameters == 20 * 64 * 64
    assert len(found.report.layers) == 20


@pytest.mark.parametrize(
    "options", [{}, {"trellis": False}, {"coding": "fixed"}, {"effort": 1, "transform": "klt", "axis": "joint"}]
)
def test_pieces_give_the_same_bytes_as_the_whole(state, options, small_is_large, monkeypatch, passes, tmp_path):
    in_pieces = tq.compress(state, step=0.002, **options)
    assert len(passes) == 1
    save_file(state, tmp_path / "model.safetensors")
    ordered = {name: state[name] for name in load_weights(tmp_path / "model.safetensors")}
    assert (
        tq.compress(tmp_path / "model.safetensors", step=0.002, **options).data == tq.compress(ordered, step=0.002, **options).data
    )
    monkeypatch.setattr(encoder_module, "LARGE", 1 << 24)
    del passes[:]
    whole = tq.compress(state, step=0.002, **options)
    assert not passes
    assert in_pieces.data == whole.data
    one, two = in_pieces.report.as_dict(), whole.report.as_dict()
    for layer in (*one["layers"], *two["layers"]):
        del layer["transform_gain"]  # λ is that of the sample in one, of the whole in the other
    assert one == two


def test_a_vector_and_batchnorms_in_pieces(small_is_large, monkeypatch, passes):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 48, 3), nn.Flatten(), nn.Linear(48, 30)).eval()
    in_pieces = tq.compress(net, step=0.003).data
    assert passes
    monkeypatch.setattr(encoder_module, "LARGE", 1 << 24)
    assert in_pieces == tq.compress(net, step=0.003).data


@pytest.mark.parametrize("bits", [3.0, 6.0])
def test_the_size_is_met_in_few_passes(bits, small_is_large, passes):
    torch.manual_seed(0)
    state = {f"{k}.weight": torch.randn(128, 96 + 8 * k) * (1 + k % 3) for k in range(12)}
    found = tq.compress(state, bits=bits, effort=1)
    assert 0.99 * bits <= found.report.bits_per_parameter <= bits
    assert 1 <= len(passes) <= 3


def test_a_sample_stands_for_the_model(state, small_is_large):
    plan = modules.plan_state_dict(state)
    source = Source(*modules.gather(plan, state))
    with workers() as pool:
        whole = Encoder(plan, source, weight_statistics(plan, source.values), pool)
        sample = whole.sampled()
        assert not sample.streamed
        assert 2.0 < sample.scale < 4.0  # 9,000 of 37,000, rounded up layer by layer
        assert sample.scale == plan.num_weights / sample.plan.num_weights
        for spec in sample.plan.specs:
            if spec.name in sample.layers:
                rows = {row.tobytes() for row in np.asarray(whole.source.values[spec.name])}
                own = sample.source.values[spec.name]
                assert own.shape == (spec.shape[0], np.prod(spec.shape[1:]))
                assert all(row.tobytes() in rows for row in own)
                assert len({row.tobytes() for row in own}) == len(own)


def test_a_large_draft_decodes_from_its_file(state, small_is_large):
    plan = modules.plan_state_dict(state)
    source = Source(*modules.gather(plan, state))
    with workers() as pool:
        encoder = Encoder(plan, source, weight_statistics(plan, source.values), pool)
        draft = encoder.draft(0.002, encoder_module.Choice())
        assert not draft.coded
        found = draft.state()
        whole = encoder._assembled(plan.specs, encoder.weights(list(encoder.layers), draft.c, encoder_module.Choice()), draft.c)
    expected = whole.state()
    assert set(found) == set(expected) == set(encoder.layers)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name])


def test_a_killed_run_goes_on_in_pieces(state, small_is_large, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    first = tq.compress(state, bits=4.0, work=folder)
    again = tq.compress(state, bits=4.0, work=folder)
    assert first.data == again.data
    assert first.report.settings["work"]["layers_computed"] > 0
    assert again.report.settings["work"]["layers_computed"] == 0


SCRIPT = """
import resource, sys, torch
import transquant as tq
from transquant import encoder
torch.set_num_threads(1)
encoder.WINDOW = 1 << 20  # which no byte depends on
how = {"trellis": False, "transform": "identity", "effort": 1}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
tq.compress({"a": torch.randn(512, 512)}, step=0.01, **how)
before = peak()
compressed = tq.compress(sys.argv[1], step=0.0008, **how)
assert compressed.report.num_parameters > encoder.LARGE
print(peak() - before, len(compressed.data))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resident set to read")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """68 MB of weights; as float64, with symbols, they would take 200."""
    path = tmp_path / "model.safetensors"
    rng = np.random.default_rng(0)
    save_file({f"{k}": torch.from_numpy(rng.standard_normal((512, 512), np.float32)) for k in range(65)}, path)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], check=True, capture_output=True, text=True)
    grown, _ = map(int, done.stdout.split())
    assert grown < 0.6 * path.stat().st_size
