"""Every kind of layer in a small model: what is predicted is what happens, and files come back."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import transquant as tq
from layer_models import MODELS, Conv1D, make, old_weight_norm
from transquant.modules import micro_batches, plan_model, run_batch
from transquant.quantizers.metric import quadratic_form
from transquant.records import RawSpec, WeightSpec
from transquant.stats import Reference, collect
from transquant.workers import workers

BY_GRADIENT = {"orthogonal"}  # no module is known to use them as they are


def divergence(model, other, samples):
    with torch.no_grad():
        p, q = (m(samples).flatten(0, -2).double().log_softmax(-1) for m in (model, other))
    return float((p.exp() * (p - q)).sum(1).mean())


@pytest.mark.parametrize("name", [n for n in MODELS if n != "norms"])
def test_predicted_distortion_is_the_measured_one(name):
    """White errors in one weight at a time; right within the standard errors of the scale and of the draws."""
    model, samples = make(name, 640)
    plan = plan_model(model)
    generator = torch.Generator().manual_seed(0)
    with workers() as pool:
        stats = collect(model, list(micro_batches([samples])), plan, run_batch, pool)
        reference = Reference(model, list(micro_batches([samples[:160]])), run_batch, pool, stats.metric)
        for spec in plan.specs:
            if not isinstance(spec, WeightSpec):
                continue
            layer, weight = stats.layers[spec.name], model.state_dict()[spec.name]
            ratios, predictions = [], []
            for _ in range(24):
                error = torch.randn(weight.shape, generator=generator) * 0.01 * weight.std()
                blocks = error.double().reshape(spec.groups, -1, weight[0].numel()).numpy()
                moments = zip(blocks, layer.input_moment, layer.output_moment, strict=True)
                predictions.append(sum(quadratic_form(e, a, g) for e, a, g in moments))
                ratios.append(reference.distortion({spec.name: weight + error}))
            ratio, draws = np.sum(predictions) / np.sum(ratios), np.std(ratios) / np.mean(ratios) / 24**0.5
            assert ratio == pytest.approx(1, abs=0.12 + 3 * layer.gradient_energy_error + 3 * draws), spec.name
            expected = "matrix" if name in BY_GRADIENT and spec.module == "layer" else spec.kind
            assert spec.kind == expected
            assert (layer.input_moment.ndim == 2) == (spec.kind == "matrix"), spec.name  # seen by a recorder, or not


@pytest.mark.parametrize("name", MODELS)
def test_compress_save_load_install(name, tmp_path):
    model, samples = make(name, 320)
    sizes = (29.0, 30.0, 31.0) if name == "orthogonal" else (4.0, 6.0, 5.0)  # its base is a buffer, exact
    files = [tq.compress(model, samples, bits=bits, effort=1) for bits in sizes]
    compressed = files[-1]
    report = compressed.report
    # neither layers nor positions are independent, as the prediction has it: it errs by a factor where a mean follows
    ratios = [f.report.predicted_distortion / f.report.measured_distortion for f in files]
    assert 1 / 3 < np.prod(ratios) ** (1 / 3) < 3
    compressed.save(tmp_path / "net.tq")
    decoded = tq.load(tmp_path / "net.tq").install(make(name, 1, seed=7)[0])
    fresh = make(name, 160, seed=3)[1]
    if report.metric == "kl":
        assert divergence(model, decoded, fresh) == pytest.approx(report.measured_distortion, rel=0.5)
    state = compressed.state_dict()
    assert list(state) == list(model.state_dict())
    assert {r.name for r in report.layers} | {n for n, _ in report.raw} >= set(state)
    assert all(reason for _, reason in report.raw)


def test_what_is_coded_and_what_is_exact():
    kinds = {}
    for name in MODELS:
        for spec in plan_model(make(name, 1)[0]).specs:
            kinds[f"{name}:{spec.name}"] = spec.kind if isinstance(spec, WeightSpec) else type(spec).__name__
            assert not isinstance(spec, RawSpec) or spec.reason == "a buffer", spec
    assert kinds["lstm_projected:layer.weight_hr_l0"] == "recurrent"
    assert kinds["gru:layer.bias_hh_l0_reverse"] == "VectorSpec"
    assert kinds["attention:layer.in_proj_weight"] == kinds["attention_separate:layer.k_proj_weight"] == "attention"
    assert kinds["attention_separate:layer.bias_k"] == "VectorSpec"
    assert kinds["weight_norm:layer.parametrizations.weight.original1"] == "conv1d"
    assert kinds["weight_norm:layer.parametrizations.weight.original0"] == "VectorSpec"
    assert kinds["orthogonal:layer.parametrizations.weight.original"] == "matrix"
    assert kinds["old_weight_norm:layer.weight_v"] == "conv_transpose1d"
    assert kinds["weight_norm_rnn:layer.weight_hh_l0_v"] == "recurrent"
    assert kinds["old_spectral_norm:layer.weight_v"] == "RawSpec"  # a vector of the power iteration
    assert kinds["norms:norms.2.weight"] == "VectorSpec"


def test_names_alone_do_not_make_a_layer():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = Conv1D(5, 4), nn.Linear(3, 3)
            self.conv.nf = 4  # not its width: something else by that name
            self.table = nn.Parameter(torch.zeros(4, 4))

    reasons = {s.name: s.reason for s in plan_model(Other()).specs if isinstance(s, RawSpec)}
    assert reasons == {
        "conv.weight": "no coder for Conv1D.weight", "conv.bias": "no coder for Conv1D.bias", "table": "no coder for Other.table"
    }  # fmt: skip


def test_tied_and_shared_layers_of_new_kinds():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.one, self.two = (
                nn.Embedding(20, 24),
                nn.GRU(24, 24, batch_first=True),
                nn.GRU(24, 24, batch_first=True),
            )
            self.two.weight_ih_l0 = self.one.weight_ih_l0
            self.again = self.one
            self.head = nn.Linear(24, 20)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return 3 * self.head(self.again(self.two(self.one(self.embedding(ids))[0])[0])[0])

    torch.manual_seed(0)
    model, ids = Twice().eval(), torch.randint(0, 20, (320, 8))
    compressed = tq.compress(model, ids, bits=6.0, effort=1)
    state = compressed.state_dict()
    assert state["two.weight_ih_l0"].data_ptr() == state["one.weight_ih_l0"].data_ptr() == state["again.weight_ih_l0"].data_ptr()
    decoded = compressed.install(copy.deepcopy(model))
    assert divergence(model, decoded, ids) == pytest.approx(compressed.report.measured_distortion, rel=0.4)
    assert compressed.report.predicted_distortion == pytest.approx(compressed.report.measured_distortion, rel=1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["encoder", "conv_transpose2d", "gru", "bilinear"])
def test_half_precision(name, dtype):
    """Statistics and measures on a float32 copy; the file keeps the dtype, and so does the network."""
    model, samples = make(name, 160)
    wide = tq.compress(model, samples, bits=4.5, effort=1)  # coarse enough that half precision's own rounding is nothing
    half = copy.deepcopy(model).to(dtype)
    compressed = tq.compress(half, samples, bits=4.5, effort=1)
    assert {t.dtype for t in compressed.state_dict().values() if t.is_floating_point()} == {dtype}
    assert all(p.dtype == dtype for p in half.parameters())
    if dtype == torch.float16:  # the 8 bits of the other are themselves a distortion
        assert compressed.report.measured_distortion == pytest.approx(wide.report.measured_distortion, rel=0.5)
    decoded = compressed.install(copy.deepcopy(half)).float()
    assert divergence(half.float(), decoded, samples) == pytest.approx(compressed.report.measured_distortion, rel=0.5)


def test_packed_sequences_are_judged_by_their_gradients():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.LSTM(16, 24, batch_first=True), nn.Linear(24, 10)

        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.arange(len(x)) % 7 + 1, batch_first=True, enforce_sorted=False)
            return 3 * self.head(self.layer(packed)[1][0][0])

    torch.manual_seed(0)
    report = tq.compress(Packed().eval(), torch.randn(320, 7, 16), bits=6.0, effort=1).report
    assert all(r.distortion_share > 0 for r in report.layers)
    assert report.predicted_distortion == pytest.approx(report.measured_distortion, rel=1.0)


def test_models_that_keep_computed_weights_are_left_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(old_weight_norm(nn.Linear(16, 32)), nn.ReLU(), nn.Linear(32, 10)).eval()
    model(torch.randn(2, 16))
    before = model[0].weight
    tq.compress(model, torch.randn(64, 16), bits=8.0, effort=1)
    assert model[0].weight is before
    assert before.grad_fn is not None


def test_layers_with_a_forward_of_their_own_are_not_replayed():
    class Doubled(nn.LSTM):
        def forward(self, x):
            return tuple(2 * t if isinstance(t, torch.Tensor) else t for t in super().forward(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = Doubled(16, 24, batch_first=True), nn.Linear(24, 10)

        def forward(self, x):
            return 3 * self.head(self.layer(x)[0])

    torch.manual_seed(0)
    model, samples = Model().eval(), torch.randn(320, 6, 16)
    report = tq.compress(model, samples, bits=6.0, effort=1).report
    assert report.predicted_distortion == pytest.approx(report.measured_distortion, rel=1.0)
