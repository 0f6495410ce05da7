"""Quantized inputs of layers: the formula against measurement, allocation, and what the file says."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import transquant as tq
from tqfile import split
from transquant.activations import plan_activations
from transquant.allocation.activations import DEPTHS, InputTable, best_quantizer, distortion, share_bits
from transquant.errors import CorruptFile, InputError
from transquant.inference import has_exact_kernels, quantize_input
from transquant.inference.activations import through_codes
from transquant.modules import micro_batches, plan_model, run_batch
from transquant.records import Activation, InputStats
from transquant.stats import collect
from transquant.stats.inputs import InputSums
from transquant.stats.metric import distance
from transquant.workers import workers


def gathered(model: nn.Module, samples: Tensor, metric: str = "auto"):
    """Statistics with histograms."""
    with workers() as pool:
        return collect(model, list(micro_batches([samples])), plan_model(model), run_batch, pool, metric, inputs=True)


def histogram(x: Tensor, gradient: Tensor) -> InputStats:
    return InputSums.of(x, gradient).stats(len(x), 1.0)


@pytest.fixture(scope="module")
def stats(small, samples):
    return gathered(small, samples)


@pytest.fixture(scope="module")
def file(small, samples):
    return tq.compress(small, samples, step=0.02, effort=1, activations=8.0)


# ----------------------------------------------------------------------------------------------- statistics


def test_histograms_do_not_depend_on_what_came_first():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(500, generator=generator) * scale for scale in (1e-3, 40.0, 1.0, 0.0)]
    gradients = [torch.randn(500, generator=generator) for _ in parts]
    whole = InputSums.of(torch.cat(parts), torch.cat(gradients))
    for order in itertools.permutations(range(4)):
        added = InputSums.of(parts[order[0]], gradients[order[0]])
        for k in order[1:]:
            added += InputSums.of(parts[k], gradients[k])
        assert (added.exponent, added.low, added.high, added.values) == (whole.exponent, whole.low, whole.high, whole.values)
        torch.testing.assert_close(added.sums, whole.sums, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_errors_of_a_histogram_are_those_of_its_values(bits):
    generator = torch.Generator().manual_seed(1)
    x, gradient = torch.randn(20_000, generator=generator), torch.randn(20_000, generator=generator)
    stats = histogram(x, gradient)
    for how in (best_quantizer(stats, bits)[0], Activation(bits, 1, 3000, -13)):
        true = float(((through_codes(x, how) - x).double() * gradient.double()).square().sum()) / len(x)
        assert distortion(stats, how) == pytest.approx(true, rel=0.01)


def test_clipping_is_by_weighted_error_and_not_by_the_largest_value():
    generator = torch.Generator().manual_seed(2)
    x = torch.cat([torch.randn(50_000, generator=generator).relu(), torch.tensor([60.0])])
    how, error = best_quantizer(histogram(x, torch.ones_like(x)), 4)
    assert how.zero == 0  # never negative: all codes for one side
    assert 2 < how.scale * 15 < 12
    whole = Activation(4, 0, 2048, -9)  # up to 60
    assert error < 0.5 * distortion(histogram(x, torch.ones_like(x)), whole)
    heavy = torch.where(x > 50, 100.0, 1.0)  # ... but if that one value matters it is kept
    assert best_quantizer(histogram(x, heavy), 4)[0].scale * 15 > 40


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (-3.0, -1.0), (0.0, 0.0), (2.0, 2.0), (-1e-30, 1e-30), (0.0, 1e20)])
@pytest.mark.parametrize("bits", DEPTHS)
def test_odd_ranges(low, high, bits):
    x = torch.linspace(low, high, 1000)
    how, error = best_quantizer(histogram(x, torch.ones_like(x)), bits)
    assert 0 <= how.zero < 2**bits
    assert 2048 <= how.mantissa <= 4095
    assert float(np.float32(how.scale)) == how.scale > 0
    assert through_codes(torch.zeros(1), how) == 0  # padding costs nothing
    assert np.isfinite(error)
    reached = float((through_codes(x, how) - x).abs().max())
    assert reached <= (max(high, 0.0) - min(low, 0.0)) / (2**bits - 1)


def test_predicted_distortion_is_what_is_measured(small, samples, stats):
    """Each input alone at 4 to 8 bits, on samples that were not calibrated on, in KL."""
    held = torch.randn(256, 3, 12, 12, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        reference = small(held)
    ratios = []
    for name, inputs in stats.inputs.items():
        for bits in (4, 6, 8):
            how, predicted = best_quantizer(inputs, bits)
            twin = copy.deepcopy(small)
            quantize_input(twin.get_submodule(name.removesuffix(".weight")), how)
            with torch.no_grad():
                total, count = distance(reference, twin(held), "kl")
            ratios.append(total / count / predicted)
    assert len(ratios) == 12
    assert 0.8 < np.median(ratios) < 1.25
    assert all(0.5 < r < 2 for r in ratios), ratios


def test_gradients_of_other_layers_do_not_count():
    """Two layers on one input: each has the gradient that comes through itself."""

    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 4), nn.Linear(8, 4)
            with torch.no_grad():
                self.two.weight.mul_(1e-3)

        def forward(self, x):
            return self.one(x) + self.two(x)

    torch.manual_seed(0)
    found = gathered(Fork().eval(), torch.randn(64, 8), "mse").inputs
    energies = {name: s.sums[0].sum() for name, s in found.items()}
    assert energies["two.weight"] < 1e-4 * energies["one.weight"]
    assert found["one.weight"].values == 8


def test_inputs_of_recurrent_transposed_and_tied_layers():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.lstm = nn.Embedding(11, 8), nn.LSTM(8, 8, 2, batch_first=True)
            self.up, self.head = nn.ConvTranspose1d(8, 8, 2, 2), nn.Linear(8, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            x = self.lstm(self.embedding(ids))[0]
            return self.head(self.up(x.transpose(1, 2)).transpose(1, 2))

    torch.manual_seed(0)
    model, ids = Odd().eval(), torch.randint(0, 11, (32, 6))
    file = tq.compress(model, ids, step=1e-3, effort=1, activations=8.0)
    bits = {r.name: r.activation_bits for r in file.report.layers if r.activation_bits}
    assert set(bits) == {"embedding.weight", "lstm.weight_ih_l0", "up.weight"}  # the embedding's is that of the tied head
    with torch.no_grad():
        plain, near = file.install(Odd())(ids), file.install(Odd(), mode="activations")(ids)
    assert 0 < (plain - near).abs().max() < 0.05
    if has_exact_kernels():
        with torch.no_grad():
            ints = file.install(Odd(), mode="int8")(ids)
        torch.testing.assert_close(ints, near, rtol=0, atol=0.05)


# ----------------------------------------------------------------------------------------------- allocation


@pytest.mark.parametrize("mean", [2.0, 3.3, 4.0, 5.5, 7.9, 8.0])
def test_no_allocation_of_the_same_bits_is_better(mean):
    """All allocations of four layers, against the one with a multiplier and a rest."""
    rng = np.random.default_rng(3)
    names, counts = "abcd", [100.0, 40.0, 300.0, 10.0]
    scales = 10 ** rng.uniform(-4, 0, 4)
    tables = {n: InputTable((), s * 4.0 ** -np.arange(7), c) for n, s, c in zip(names, scales, counts, strict=True)}
    chosen = share_bits(tables, mean)
    total = sum(c * chosen[n] for n, c in zip(names, counts, strict=True))
    assert total <= mean * sum(counts) * (1 + 1e-9)

    def cost(depths):
        return sum(tables[n].errors[b - 2] for n, b in zip(names, depths, strict=True))

    spent = [d for d in itertools.product(DEPTHS, repeat=4) if np.dot(d, counts) <= total]
    assert cost(chosen.values()) <= 1.001 * min(map(cost, spent))
    if mean in (2.0, 8.0):
        assert set(chosen.values()) == {int(mean)}


def test_more_bits_cost_less(stats):
    with workers() as pool:
        plans = [plan_activations(stats, mean, pool) for mean in (2, 4, 6, 8)]
    assert all(p.mean_bits <= mean for p, mean in zip(plans, (2, 4, 6, 8), strict=True))
    assert all(a.predicted > 4 * b.predicted for a, b in itertools.pairwise(plans))
    assert len({q.bits for q in plans[2].quantizers.values()}) > 1  # not the same for all


@pytest.mark.parametrize("bits", [1.9, 8.1, True, "8", float("nan")])
def test_bits_that_are_not_allowed(net, images, bits):
    with pytest.raises(InputError, match="allowed are 2 to 8"):
        tq.compress(net, images, bits=4.0, activations=bits)


def test_activations_need_samples(net, images):
    for calibration, metric in ((None, "auto"), (images, "weights")):
        with pytest.raises(InputError, match="need calibration data"):
            tq.compress(net, calibration, bits=4.0, metric=metric, activations=8.0)


# ----------------------------------------------------------------------------------------------- the file


def test_the_file_says_it_all(file, tmp_path):
    file.save(tmp_path / "a.tq")
    loaded = tq.load(tmp_path / "a.tq")
    rows = {r.name: r.activation_bits for r in loaded.report.layers}
    assert rows == {r.name: r.activation_bits for r in file.report.layers}
    assert {n for n, b in rows.items() if b == 8} == {f"{n}.weight" for n in ("conv", "depthwise", "grouped", "linear")}
    assert loaded.report.activations[0] == 8
    assert loaded.report.activations == pytest.approx(file.report.activations, rel=0.01)
    assert "8 bits a value on average" in str(loaded.report)


def test_nothing_else_of_the_file_changes(small, samples, file):
    """The same symbols; without activations, the same bytes as ever (golden files are of older versions)."""
    without = tq.compress(small, samples, step=0.02, effort=1)
    mine, other = split(file.data), split(without.data)
    assert mine.sections == other.sections
    value = mine.value
    for entry in value["tensors"]:
        entry.pop("a", None)
    value["metadata"].pop("activations")
    assert value == other.value
    assert without.report.activations is None
    assert "input bits" not in str(without.report)
    arrays, others = tq.reader.loads(file.data), tq.reader.loads(without.data)
    assert all(arrays[k].tobytes() == others[k].tobytes() for k in others)


def test_sizes_count_them(small, samples):
    file = tq.compress(small, samples, size=4000, effort=1, activations=5.0)
    assert 3900 < len(file.data) <= 4000


def test_the_same_file_with_any_number_of_threads(net, images):
    before, files = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            files.append(tq.compress(net, images, step=0.02, effort=1, activations=5.5).data)
    finally:
        torch.set_num_threads(before)
    assert files[0] == files[1]


BAD = [
    [], [8, 0, 2048], [8, 0, 2048, 0, 0], [1, 0, 2048, 0], [9, 0, 2048, 0], [8, -1, 2048, 0], [8, 256, 2048, 0], [4, 16, 2048, 0], [8, 0, 2047, 0],
    [8, 0, 4096, 0], [8, 0, 2048, -131], [8, 0, 2048, 61], [8.0, 0, 2048, 0], [True, 0, 2048, 0], [8, 0, 10**400, 0], None, 8, "8", {},
]  # fmt: skip


@pytest.mark.parametrize("value", BAD, ids=str)
def test_bad_activations_are_found(file, value):
    parts = split(file.data)
    header = parts.value
    header["tensors"][0]["a"] = value
    with pytest.raises(CorruptFile, match="activation"):
        tq.reader.loads(parts.with_value(header).join())


def test_activations_are_of_matrices(file):
    parts = split(file.data)
    header = parts.value
    next(e for e in header["tensors"] if e["n"] == "conv.bias")["a"] = [8, 0, 2048, 0]
    with pytest.raises(CorruptFile, match="matrices only"):
        tq.reader.loads(parts.with_value(header).join())


@pytest.mark.parametrize("text", ["", "8", "nan 1", "8 inf", "8 1 1", "x y", "8  1", "1e999 0"])
def test_a_report_survives_what_others_write(file, text, tmp_path):
    parts = split(file.data)
    header = parts.value
    header["metadata"]["activations"] = text
    (tmp_path / "a.tq").write_bytes(parts.with_value(header).join())
    assert tq.load(tmp_path / "a.tq").report.activations is None
