"""Every transform, loop and coding through the public API, down to the file and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import transquant as tq
from transquant import codec
from transquant.choices import IDENTITY, Choice, LayerTransform, Method
from transquant.container import read_container
from transquant.encoder import Encoder, Source
from transquant.modules import gather, plan_model
from transquant.quantizers.metric import Damping
from transquant.records import CodedEntry
from transquant.stats import collect
from transquant.stats.measure import Reference
from transquant.transform_choice import choose_transforms, exchange_rate, transforms_of
from transquant.weights import lagrangian
from transquant.workers import workers

METHODS = [
    ("identity", None, "entropy", False),
    ("identity", None, "fixed", True),
    ("identity", "output", "fixed", False),
    ("dct", "kernel", "entropy", True),
    ("dct", None, "fixed", False),
    ("klt", "kernel", "entropy", True),
    ("klt", "input", "entropy", False),
    ("klt", "input", "fixed", False),
    ("klt", None, "fixed", True),
    ("elt", "output", "entropy", True),
    ("elt", "output", "fixed", True),
    ("elt", "input", "fixed", False),
    ("elt", None, "entropy", True),
]


class Smooth(nn.Module):
    """Two convolutions with smooth kernels, a grouped one, a linear layer: something for every axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 24, 3, padding=1)
        self.second = nn.Conv2d(24, 24, 5, padding=2)
        self.grouped = nn.Conv2d(24, 24, 3, groups=4)
        self.linear = nn.Linear(24, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.linear(torch.relu(self.grouped(x)).amax((2, 3)))


@pytest.fixture(scope="module")
def smooth() -> Smooth:
    torch.manual_seed(3)
    model = Smooth().eval()
    with torch.no_grad():
        for conv in (model.first, model.second):
            size = conv.kernel_size[0]
            bump = torch.hann_window(size + 2, periodic=False)[1:-1]
            conv.weight.mul_(0.2).add_(torch.randn(*conv.weight.shape[:2], 1, 1) * bump[:, None] * bump / conv.in_channels**0.5)
        model.linear.weight.mul_(8)
    return model


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    noise = torch.randn(160, 3, 14, 14, generator=torch.Generator().manual_seed(5))
    return nn.functional.avg_pool2d(noise, 3, 1, 1) * 3


@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(map(str, m)))
def test_file_and_back(smooth, pictures, tmp_path, method):
    method = dict(zip(("transform", "axis", "coding", "feedback"), method, strict=True))
    compressed = tq.compress(smooth, pictures, bits=3.4, effort=1, **method)
    path = tmp_path / "net.tq"
    compressed.save(path)
    # depths of whole band groups are coarse steps in so small a network
    share = 8 * path.stat().st_size / sum(p.numel() for p in smooth.parameters()) / 3.4
    assert (0.9 if method["coding"] == "fixed" else 0.985) <= share <= 1
    loaded = tq.load(path)
    state, arrays = loaded.state_dict(), tq.reader.load(path)
    for key, tensor in smooth.state_dict().items():
        np.testing.assert_array_equal(state[key].numpy(), arrays[key])
        assert state[key].shape == tensor.shape
    entries = {e.name: e for e in read_container(compressed.data).entries if isinstance(e, CodedEntry)}
    codes = {name: e.coding for name, e in entries.items() if len(e.shape) > 1}
    assert set(codes.values()) == {"f" if method["coding"] == "fixed" else "t" if method["feedback"] else "u"}
    kinds = {name: e.transform for name, e in entries.items() if len(e.shape) > 1}
    assert kinds["second.weight"] == {"identity": "i", "dct": "d", "klt": "k", "elt": "e"}[method["transform"]]
    report = compressed.report
    parts = report.payload_bytes + report.side_parameter_bytes + report.side_info_bytes + report.header_bytes
    assert parts == report.file_bytes == len(compressed.data)
    again = loaded.report
    assert abs(again.payload_bytes - report.payload_bytes) <= 1
    assert [r.transform for r in again.layers] == [r.transform for r in report.layers]
    # the measure is an average over 32 samples
    assert 0.2 < report.measured_distortion / report.predicted_distortion < 5


def test_auto_packs_layers_where_no_basis_pays():
    torch.manual_seed(0)
    small = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(4, 6)).eval()
    compressed = tq.compress(small, step=0.1, coding="fixed")
    transforms = {layer.name: layer.transform for layer in compressed.report.layers}
    assert transforms["0.weight"] == transforms["1.weight"] == "identity fixed"
    assert tq.reader.loads(compressed.data)["0.weight"].shape == (3, 2, 3, 3)


def test_both_coders_write_the_same_weights(small_files):
    adaptive, static = small_files["adaptive"], small_files["static"]
    assert [s.kind for s in read_container(adaptive.data).sections if s.lanes] == ["m"]
    assert [s.kind for s in read_container(static.data).sections if s.lanes] == ["l"]
    one, two = tq.reader.loads(adaptive.data), tq.reader.loads(static.data)
    assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in two.items()}
    assert {k: v.numpy().tobytes() for k, v in static.state_dict().items()} == {k: v.tobytes() for k, v in two.items()}
    assert 0.99 < len(static.data) / len(adaptive.data) < 1.04


@pytest.fixture(scope="module")
def small_files():
    """By coder: the same weights at the same step, no calibration."""
    torch.manual_seed(0)
    small = nn.Sequential(nn.Conv2d(16, 40, 3), nn.Linear(100, 90)).eval()
    for parameter in small.parameters():
        nn.init.normal_(parameter, std=0.05)  # as of trained weights; static tables fit a uniform law less well
    return {coder: tq.compress(small, step=0.001, coder=coder) for coder in ("adaptive", "static")}


@pytest.mark.parametrize("coding", ["entropy", "fixed"])
def test_same_file_again_and_with_other_threads(smooth, pictures, coding):
    files = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            files.append(tq.compress(smooth, pictures, bits=3.0, effort=1, transform="elt", coding=coding).data)
    finally:
        torch.set_num_threads(before)
    assert files[0] == files[1]


def prepared(model, samples, method, pool):
    plan = plan_model(model)
    source = Source(*gather(plan, model.state_dict()))
    batches = list(samples.split(32))
    stats = collect(model, batches, plan, lambda m, b: m(b), pool)
    return Encoder(plan, source, stats, pool, method), Reference(model, batches, lambda m, b: m(b), pool, stats.metric)


def test_predicted_distortion_is_that_of_the_decoded_weights(smooth, pictures):
    """tr(G E A Eᵀ) of what a reader gives, for every transform in either loop, coarse bases included."""
    from transquant.quantizers.metric import quadratic_form

    with workers() as pool:
        for coding in ("entropy", "fixed"):
            for feedback in (True, False):
                encoder, _ = prepared(smooth, pictures, Method("auto", None, coding, feedback), pool)
                for kind, axis in (("d", "k"), ("k", "k"), ("k", "c"), ("e", "c"), ("k", "j")):
                    name = "second.weight"
                    one = encoder.transformed({name: LayerTransform(kind, axis, 3)})
                    c = one.first_guess(3 * 17000 / 8)
                    draft = one.draft(c, Choice())
                    decoded = draft.state()[name].double().numpy().reshape(24, -1)
                    layer = one.layers[name]
                    error = one.source.values[name] - decoded
                    expected = quadratic_form(error, layer.input_moment[0], layer.output_moment[0])
                    assert draft.distortions[name] == pytest.approx(expected, rel=1e-3), (kind, axis, coding, feedback)


def test_auto_is_no_worse_than_identity(smooth, pictures):
    """At equal predicted distortion at most half a per cent more bytes; here, with smooth kernels, many fewer."""
    with workers() as pool:
        encoder, _ = prepared(smooth, pictures, Method(), pool)
        for bits in (1.0, 2.0, 4.0):
            c = encoder.first_guess(bits * 17000 / 8)
            plain = encoder.draft(c, Choice())
            chosen = choose_transforms(encoder, c, Choice(), encoder)
            assert chosen["second.weight"].transform != IDENTITY
            assert chosen["second.weight"].gain > 0
            better = encoder.transformed(transforms_of(chosen))
            draft = better.draft(c, Choice())
            size = len(encoder.encode(plain).data)
            # bits that the difference in distortion is worth, at six decibels a bit
            extra = sum(w.size for w in encoder.source.values.values()) / 8 * 0.5 * np.log2(draft.predicted / plain.predicted)
            assert len(better.encode(draft).data) + extra <= 1.005 * size
            assert len(better.encode(draft).data) + extra <= 0.97 * size


def test_the_gains_of_the_report_are_bytes_at_equal_distortion(smooth, pictures):
    """Under a strongly damped metric a bit is worth less of the plain one's distortion than theory says: λ is measured."""
    with workers() as pool:
        encoder, _ = prepared(smooth, pictures, Method(), pool)
        choice = Choice(Damping(0.5, 2.0))
        c = encoder.first_guess(4.0 * 17000 / 8)
        plain = encoder.draft(c, choice)
        assert exchange_rate(encoder, c, choice) < 0.3 * lagrangian(c)
        chosen = choose_transforms(encoder, c, choice, encoder)
        better = encoder.transformed(transforms_of(chosen))
        drafts = [better.draft(x * c, choice) for x in np.geomspace(0.7, 1.3, 9)]
        sizes = [len(better.encode(d).data) for d in drafts]
        equal = np.interp(plain.predicted, [d.predicted for d in drafts], sizes)
        gained = sum(t.gain * encoder.source.values[name].size for name, t in chosen.items()) / 8
        assert gained == pytest.approx(len(encoder.encode(plain).data) - equal, rel=0.1)


def test_nothing_smooth_nothing_chosen(pictures):
    """White weights have no coding gain: identity everywhere, no basis sent."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 144, 10)).eval()
    compressed = tq.compress(model, pictures, bits=2.0, effort=1)
    assert {r.transform for r in compressed.report.layers if r.num_values > 1000} == {"identity"}


def test_report_says_what_a_transform_gained(smooth, pictures):
    report = tq.compress(smooth, pictures, bits=2.0, effort=1).report
    row = next(r for r in report.layers if r.name == "second.weight")
    assert row.transform.split()[1] == "kernel"
    assert row.transform_gain > 0.02
    assert f"{row.transform_gain:.3f}" in str(report)


def test_verify_measures_the_closed_form(smooth, pictures):
    report = tq.compress(smooth, pictures, bits=5.0, effort=1, verify=True).report
    points = report.verification
    assert {p.layer for p in points} == {"first.weight", "second.weight", "grouped.weight", "linear.weight"}
    for layer in ("first.weight", "second.weight", "linear.weight"):
        own = [p for p in points if p.layer == layer]
        assert len({p.bits_per_value for p in own}) == 3  # three points of a curve
        ratio = sum(p.measured for p in own) / sum(p.predicted for p in own)
        assert 0.25 < ratio < 4, layer  # groups of a few channels, 32 samples
    assert "closed form checked on" in str(report)


def test_calibration_is_not_needed_for_transforms(smooth):
    compressed = tq.compress(smooth, None, bits=3.0, transform="klt", axis="kernel")
    assert {r.transform for r in compressed.report.layers if r.name == "second.weight"} == {"klt kernel"}
    again = codec.CompressedModel(compressed.data, compressed.report).state_dict()
    error = again["second.weight"] - smooth.second.weight
    assert float(error.square().mean() / smooth.second.weight.square().mean()) < 0.1
