"""The project's own coder of feature maps: contexts, feedback, sensitivities, calibration."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from transquant import features
from transquant.errors import CorruptFile, InputError, TargetError
from transquant.features.contexts import count, decode, encode, learned
from transquant.features.feedback import factor_channels, predict_pixels, rounded, whitened
from transquant.features.fitting import fit_predictive
from transquant.features.points import replacing
from transquant.features.prediction import fit_predictor
from transquant.features.records import Point, Sensitivity
from transquant.features.sensitivity import collect


def smooth_maps(seed=0, shape=(6, 5, 20, 17), nonnegative=True):
    """Symbols int32 (N, K, H, W) that neighbours and other planes say much about."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(shape[0], 1, shape[2] + 4, shape[3] + 4)) + 0.3 * rng.normal(
        size=(shape[0], shape[1], shape[2] + 4, shape[3] + 4)
    )
    blurred = sum(noise[:, :, dy : dy + shape[2], dx : dx + shape[3]] for dy in range(5) for dx in range(5)) / 3
    symbols = np.rint(2 * blurred).astype(np.int32)
    return np.maximum(symbols, 0) if nonnegative else symbols


def fitted(symbols, nonnegative):
    predictor = fit_predictor(symbols, nonnegative)
    seen = np.sum([count(s, predictor) for s in symbols], 0)
    return predictor, learned(seen), seen


@pytest.mark.parametrize("nonnegative", [True, False])
def test_payloads_are_as_small_as_their_model_says(nonnegative):
    symbols = smooth_maps(nonnegative=nonnegative)
    predictor, tables, seen = fitted(symbols, nonnegative)
    assert seen[:, :-1].sum() == symbols.size
    for own in symbols:
        data = encode(own, predictor, tables)
        assert np.array_equal(decode(data, own.shape, predictor, tables), own)
        ideal = tables.content(count(own, predictor))
        assert ideal <= 8 * len(data) <= 1.002 * ideal + 48
    # neighbours tell more than half of what the symbols' histograms leave open
    counts = np.array([np.bincount(symbols[:, k].ravel() + 99, minlength=200) for k in range(symbols.shape[1])])
    p = counts / counts.sum(1, keepdims=True)
    entropy = -(counts * np.log2(np.where(p > 0, p, 1))).sum()
    coded = 8 * sum(len(encode(own, predictor, tables)) for own in symbols)
    assert coded < 0.55 * entropy


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 9), st.integers(1, 90), st.booleans(), st.integers(0, 2**31), st.sampled_from([1, 3, 40, 3000, 1 << 20])
)  # fmt: skip
def test_any_symbols_come_back(planes, height, width, nonnegative, seed, largest):
    predictor, tables, _ = fitted(smooth_maps(3, (4, planes, 8, 9), nonnegative), nonnegative)
    symbols = np.random.default_rng(seed).integers(
        0 if nonnegative else -largest, largest + 1, (planes, height, width), dtype=np.int32
    )
    data = encode(symbols, predictor, tables)
    assert np.array_equal(decode(data, symbols.shape, predictor, tables), symbols)
    with pytest.raises(CorruptFile):
        decode(data[:-2], symbols.shape, predictor, tables)
    with pytest.raises(CorruptFile):
        decode(data + b"\0\0", symbols.shape, predictor, tables)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_changed_payload_is_found_or_gives_some_map(where, change):
    symbols = smooth_maps(1)[0]
    predictor, tables, _ = fitted(smooth_maps(1), True)
    data = bytearray(encode(symbols, predictor, tables))
    data[where % len(data)] ^= change
    with contextlib.suppress(CorruptFile):
        assert decode(bytes(data), symbols.shape, predictor, tables).shape == symbols.shape


SCRIPT = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from test_predictive import fitted, smooth_maps
from transquant.features.contexts import decode, encode
symbols = smooth_maps(2, (2, 3, 9, 11), False)
symbols[0, 0, 0, 0] = 70000
predictor, tables, _ = fitted(symbols, False)
data = b"".join(encode(s, predictor, tables) for s in symbols)
assert (decode(encode(symbols[0], predictor, tables), symbols[0].shape, predictor, tables) == symbols[0]).all()
print(hashlib.sha256(data).hexdigest())
"""


def test_plain_numpy_gives_the_same_bytes():
    script = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(Path(__file__).parent)]
    out = subprocess.run(script, env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True, check=True)
    symbols = smooth_maps(2, (2, 3, 9, 11), False)
    symbols[0, 0, 0, 0] = 70000
    predictor, tables, _ = fitted(symbols, False)
    data = b"".join(encode(s, predictor, tables) for s in symbols)
    assert out.stdout.strip() == hashlib.sha256(data).hexdigest()


# ------------------------------------------------------------------------------------------ feedback


def correlated(channels=6, seed=0):
    """Second moments of a gradient: few directions matter, and neighbours' gradients are alike."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(channels, 2))
    moment = mixing @ mixing.T + 0.05 * np.eye(channels)
    distances = np.array([[0, 1, 1, 2, 2], [1, 0, 2, 1, 3], [1, 2, 0, 1, 1], [2, 1, 1, 0, 2], [2, 3, 1, 2, 0]])
    return moment, np.diag(moment)[:, None, None] * 0.8**distances


def test_factors_are_factors():
    moment, neighbours = correlated()
    energy, across = factor_channels(moment, 0.1)
    upper = np.eye(6) + across.T
    damped = moment + np.diag(0.1 * np.diag(moment) + 1e-3 * np.diag(moment).mean())
    assert np.allclose(upper @ np.diag(energy) @ upper.T, damped)
    assert np.allclose(np.triu(across), 0)
    share, weights = predict_pixels(neighbours, 0.0)
    assert np.allclose(
        share * np.diag(moment), [n[0, 0] - n[0, 1:] @ np.linalg.inv(n[1:, 1:]) @ n[1:, 0] for n in neighbours], rtol=1e-3
    )
    assert (weights.sum(1) < 1.1).all()


def test_feedback_puts_errors_where_they_cost_less():
    moment, neighbours = correlated()
    energy, across = factor_channels(moment, 0.02)
    share, around = predict_pixels(neighbours, 0.02)
    values = np.random.default_rng(1).normal(size=(6, 24, 24)).astype(np.float32) * 4

    def cost(across, around, d):
        steps = (0.5 / np.sqrt(d)).astype(np.float32)
        error = rounded(values, steps, across.astype(np.float32), around.astype(np.float32), False) * steps[:, None, None] - values
        rest = whitened(error.astype(np.float64), predict_pixels(neighbours, 0.02)[1].mean(0)).reshape(6, -1)
        entropy = -np.log2(d).sum() / 2  # of steps: a bit less for each octave
        return np.vdot(moment @ rest, rest) * share.mean() * 2 ** (2 * -entropy / 6)  # at equal rate

    plain = cost(np.zeros((6, 6)), np.zeros((6, 4)), np.diag(moment))
    fed = cost(across, around, energy * share)
    assert fed < 0.6 * plain


# ------------------------------------------------------------------------------------------ networks


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 24, 1), nn.Conv2d(24, 8, 3, stride=2)
        self.act, self.head = nn.ReLU(), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = self.act(self.second(x))
        return self.head(nn.functional.gelu(self.third(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Net().train()
    with torch.no_grad():
        model.head.weight.mul_(6)
    return model


@pytest.fixture(scope="module")
def images():
    noise = torch.randn(120, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    return nn.functional.avg_pool2d(noise, 5, 1) * 4


def run(model, batch):
    return model(batch)


@pytest.mark.parametrize("metric", ["mse", "kl"])
def test_what_small_errors_cost_is_predicted(model, images, metric):
    found = collect(model.eval(), list(images.split(20)), run, metric, 0, lambda *_: None)
    assert [p.name for p in found] == ["#0", "act#0", "#1"]
    with torch.no_grad():
        float_output = model(images)
        for point, sensitivity in found.items():
            if not point.clips:
                continue
            shape = []

            def noisy(own, tensor, activation, point=point, shape=shape):
                result = activation(tensor)
                if own != point:
                    return result
                shape[:] = result.shape[2:]
                return result + 1e-2 * torch.randn(result.shape, generator=torch.Generator().manual_seed(5))

            with replacing(model, noisy):
                output = model(images)
            if metric == "mse":
                measured = float((output - float_output).square().mean())
            else:
                p, q = float_output.log_softmax(1), output.log_softmax(1)
                measured = float((p.exp() * (p - q)).sum(1).mean())
            predicted = 1e-4 * np.trace(sensitivity.channels) * shape[0] * shape[1]
            assert predicted == pytest.approx(measured, rel=0.25), point


def test_bits_are_met_and_more_of_them_are_better(model, images, tmp_path):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    stages = set()
    distances = []
    for bits in (1.5, 3.0):
        model.train()
        codec = features.calibrate(model, [images[:80]], bits_per_value=bits, progress=lambda stage, *_: stages.add(stage))
        assert all(m.training for m in model.modules())
        codec.save(tmp_path / "maps.safetensors")
        codec = features.load(tmp_path / "maps.safetensors")
        with torch.no_grad():
            model.eval()
            wanted = model(images[80:])
            with codec.attach(model) as ledger:
                output = model(images[80:])
        assert ledger.bits_per_value == pytest.approx(bits, rel=0.08)
        distances.append(float((output - wanted).square().mean()))
    assert distances[1] < 0.4 * distances[0]
    assert stages == {"sensitivities", "fitting"}
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert any(mode.startswith("ELT") for mode in (c.mode for c in codec.coders))  # of 24 channels that were 8


def test_an_activation_in_place_changes_nothing(images):
    nets = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace), nn.Conv2d(8, 4, 3), nn.ReLU(inplace), nn.Flatten(1), nn.LazyLinear(5))
            for inplace in (False, True)]  # fmt: skip
    for net in nets:
        net(images[:1])
    nets[1].load_state_dict(nets[0].state_dict())
    found = [collect(net.eval(), [images[:20]], run, "mse", 0, lambda *_: None) for net in nets]
    for one, other in zip(*(f.values() for f in found), strict=True):
        assert np.allclose(one.mean, other.mean)
        assert np.allclose(one.covariance, other.covariance)
        assert np.allclose(one.channels, other.channels)
        assert (one.mean < 0).any()  # of what goes into the activation


def test_the_same_codec_again(model, images):
    first, second = (features.calibrate(model, [images[:40]], bits_per_value=2.0) for _ in range(2))
    assert first.data == second.data


def test_the_coarsest_codec_that_keeps_a_score(model, images):
    labels = model.eval()(images).argmax(1)

    def accuracy(network):
        return 100 * float((network(images).argmax(1) == labels).float().mean())

    codec = features.calibrate(model, [images], max_drop=(accuracy, 5.0))
    with torch.no_grad(), codec.attach(model) as ledger:
        assert 95 <= accuracy(model) <= 100
    assert ledger.bits_per_value < 4
    with pytest.raises(TargetError, match="keeps the score above 100"):
        features.calibrate(
            model, [images], max_drop=(lambda m: 100.0 + (m(images) - model.head.bias).sum().item() * 0 - _once(), 0.0)
        )


_calls = []


def _once():
    """0 at the first call, 1 after it: a score that any coding spoils."""
    _calls.append(1)
    return float(len(_calls) > 1)


@pytest.mark.parametrize("method", ["pca", "none", "dct-cm"])
def test_published_methods(model, images, method):
    codec = features.calibrate(model, [images[:40]], bits_per_value=3.0, method=method)
    with torch.no_grad(), codec.attach(model) as ledger:
        model(images[40:])
    assert ledger.bits_per_value == pytest.approx(3.0, rel=0.12)


def test_bad_arguments(model, images):
    cases = [
        ({}, "exactly one target"),
        ({"bits_per_value": 2.0, "max_drop": (len, 1.0)}, "exactly one target"),
        ({"bits_per_value": 0}, "allowed are 0.01 to 16"),
        ({"bits_per_value": True}, "allowed are"),
        ({"max_drop": 3}, "max_drop must be"),
        ({"bits_per_value": 2.0, "method": "magic"}, "method is 'magic', allowed are 'auto'"),
        ({"bits_per_value": 2.0, "seed": -1}, "seed"),
        ({"bits_per_value": 2.0, "metric": "soup"}, "metric"),
    ]
    for options, message in cases:
        with pytest.raises(InputError, match=message):
            features.calibrate(model, [images[:8]], **options)
    with pytest.raises(InputError, match="no samples"):
        features.calibrate(model, [images[:0]], bits_per_value=2.0)
    with pytest.raises(InputError, match="NaN"):
        features.calibrate(model, [images[:8] * float("nan")], bits_per_value=2.0)
    with pytest.raises(InputError, match="no feature maps"):
        features.calibrate(nn.Linear(4, 2), [torch.ones(8, 4)], bits_per_value=2.0)


def test_values_that_are_not_finite_are_refused():
    point = Point("#0", "relu", 1, 3, 0.0)
    sensitivity = Sensitivity(np.eye(3), np.tile(np.eye(5), (3, 1, 1)), np.zeros(3), np.eye(3))
    samples = np.random.default_rng(0).normal(size=(8, 3, 6, 6)).astype(np.float32)
    coder = fit_predictive(samples, point, sensitivity, 0.5).coder
    for bad in (np.nan, np.inf):
        values = samples[0].copy()
        values[1, 2, 3] = bad
        with pytest.raises(InputError, match="'#0'"):
            coder.quantize(values)
