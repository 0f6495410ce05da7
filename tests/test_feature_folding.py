"""Device halves whose last layer does the coder's transform."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from plain_coder import plain_codec, points_of
from transquant.cli.halves import write_halves
from transquant.features.codec import UNCODED, FeatureCodec, load
from transquant.features.contexts import count, learned
from transquant.features.maps import pixels
from transquant.features.packets import unpack
from transquant.features.pca import PcaOptions, fit_pca
from transquant.features.points import replacing
from transquant.features.prediction import fit_predictor
from transquant.features.predictive import PredictiveCoder, Rounding, Transform
from transquant.transforms.fit import klt

IMAGES = torch.randn(12, 5, 20, 20, generator=torch.Generator().manual_seed(1))
VECTORS = torch.randn(400, 10, generator=torch.Generator().manual_seed(2))
SEQUENCES = torch.randn(12, 30, 10, generator=torch.Generator().manual_seed(3))
C, K = 12, 4


def lived(module):
    """With the statistics of some training."""
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        if module.track_running_stats:
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.2, 3)
        if module.affine:
            nn.init.uniform_(module.weight, -2, 2)
            nn.init.uniform_(module.bias, -1, 1)


def network(*layers):
    """Of what makes its layers, each time the same."""
    torch.manual_seed(0)
    return nn.Sequential(*[make() for make in layers]).apply(lived).eval()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(5, C, 1), nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x):
        x = self.one(x)
        return functional.relu(self.two(x) + x)


class Twice(nn.Module):
    """The last layer of the device half is also one before it, and a name is taken."""

    def __init__(self):
        super().__init__()
        self.folded, self.act = nn.Conv2d(5, C, 1), nn.ReLU()
        self.conv, self.bn = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)

    def forward(self, x):
        return self.act(self.bn(self.conv(torch.tanh(self.conv(self.folded(x)))))) * 2


def conv_bn():
    return network(lambda: nn.Conv2d(5, C, 3, 2, 1, bias=False), lambda: nn.BatchNorm2d(C), nn.ReLU, lambda: nn.Conv2d(C, 3, 1))


FOLDED = {
    "conv, bn": (conv_bn, IMAGES, "2#0"),
    "conv, bn with biases": (
        lambda: network(lambda: nn.Conv2d(5, C, (1, 3), padding_mode="reflect", padding=(0, 1)),
                        lambda: nn.BatchNorm2d(C, affine=False), nn.ReLU6), IMAGES, "2#0"),
    "conv": (lambda: network(lambda: nn.Conv2d(5, C, 3, dilation=2), lambda: nn.ReLU(inplace=True), lambda: nn.Conv2d(C, 3, 1)),
             IMAGES, "1#0"),
    "conv of one dimension": (lambda: network(lambda: nn.Conv1d(30, C, 3), lambda: nn.BatchNorm1d(C), nn.ReLU), SEQUENCES, "2#0"),
    "linear": (lambda: network(lambda: nn.Linear(10, C), nn.ReLU, lambda: nn.Linear(C, 3)), VECTORS, "1#0"),
    "linear, bn": (lambda: network(lambda: nn.Linear(10, C), lambda: nn.BatchNorm1d(C), nn.ReLU), VECTORS, "2#0"),
    "linear on sequences": (lambda: network(lambda: nn.Linear(10, C, bias=False), nn.ReLU6), SEQUENCES, "1#0"),
    "a layer that runs twice": (lambda: network(Twice), IMAGES, "0.act#0"),
}  # fmt: skip
NOT_FOLDED = {
    "grouped": lambda: network(lambda: nn.Conv2d(5, C, 1), lambda: nn.Conv2d(C, C, 3, groups=2), nn.ReLU),
    "depthwise": lambda: network(lambda: nn.Conv2d(5, C, 1), lambda: nn.Conv2d(C, C, 3, groups=C), lambda: nn.BatchNorm2d(C), nn.ReLU),
    "residual": lambda: network(Residual),
    "pooled": lambda: network(lambda: nn.Conv2d(5, C, 1), lambda: nn.MaxPool2d(2), nn.ReLU),
    "norm of a batch": lambda: network(lambda: nn.Conv2d(5, C, 1), lambda: nn.BatchNorm2d(C, track_running_stats=False), nn.ReLU),
    "spectral norm": lambda: network(lambda: nn.utils.spectral_norm(nn.Conv2d(5, C, 1)), nn.ReLU),
    "parametrized": lambda: network(lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(5, C, 1)), nn.ReLU),
    "transposed": lambda: network(lambda: nn.ConvTranspose2d(5, C, 2), nn.ReLU),
}  # fmt: skip


def elt(samples, point):
    """A predictive coder with a transform that keeps K components."""
    columns = np.moveaxis(samples, 1, 0).reshape(C, -1)
    basis, mean = klt(np.cov(columns))[:, :K], columns.mean(1)
    forward, back = (np.ascontiguousarray(m.astype(np.float16), np.float32) for m in (1.3 * basis.T, basis / 1.3))
    transform = Transform(forward, back, mean.astype(np.float32))
    around = np.tile(np.float32([0.2, 0.1, 0, 0.1]), (K, 1))
    rounding = Rounding(np.full(K, 0.1, np.float32), around, np.zeros(0, np.int8), np.ones(K, np.float32), False)
    symbols = np.stack([rounding.quantize(np.tensordot(forward, v - mean[:, None, None], 1)) for v in samples])
    predictor = fit_predictor(symbols, False)
    tables = learned(np.sum([count(s, predictor) for s in symbols], 0))
    return PredictiveCoder(point.name, C, rounding, transform, predictor, tables)


CODERS = {"elt": elt, "pca": lambda samples, point: fit_pca(PcaOptions("pca-t", 0.8))(samples, point, None, 0.02)}


def codec_for(model, x, name, kind="elt"):
    """A codec with a coder of what goes into one activation."""
    point = next(p for p in points_of(model, x) if p.name == name)
    found = []

    def keep(met, tensor, activation):
        if met == point:
            moved = tensor.movedim(met.axis, 1)
            found.append(moved.reshape(*moved.shape[:2], *pixels(moved.shape[2:])).numpy().copy())
        return activation(tensor)

    with torch.no_grad(), replacing(model, keep):
        model(x)
    return FeatureCodec([(point, CODERS[kind](found[0], point))], {UNCODED: []})


def unfolded(device, x):
    """Symbols of the half as it is, (N, K, H, W)."""
    with torch.no_grad():
        return np.stack([device.coded.coder.quantize(m) for m in device.coded.maps(device.network(x))[0]])


def sent(device, x):
    """Symbols in the packets."""
    packets = [unpack(p, device.coded.fingerprint) for p in device.encode(x)]
    return np.stack([device.coded.coder.decode(p.payload, *pixels(p.lengths)) for p in packets])


def check_same(device, x):
    folded, whole = sent(device, x), unfolded(device, x)
    assert np.abs(folded - whole).max() <= 1
    assert (folded != whole).mean() <= 1e-3
    assert len(np.unique(whole)) > 10


@pytest.mark.parametrize("kind", CODERS)
@pytest.mark.parametrize("case", FOLDED)
def test_the_last_layer_makes_components(case, kind):
    make, x, name = FOLDED[case]
    model = make()
    codec = codec_for(model, x, name, kind)
    before = copy.deepcopy(model.state_dict())
    device, server = codec.split(model, name)
    kept = len(device.coded.coder.components.analysis)
    assert kept < C
    assert f"{name}: {kept} components of {C} channels, folded into" in repr(device)
    with torch.no_grad():
        assert device.folded(x).shape[device.coded.point.axis] == kept
    check_same(device, x)
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in device.folded.modules())
    assert {k.removeprefix("network.") for k in device.state_dict()} == set(device.network.state_dict()) <= set(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with codec.attach(model), torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(server.decode(device.encode(x)), expected, atol=0.1 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("case", NOT_FOLDED)
def test_other_endings_stay(case):
    model = NOT_FOLDED[case]()
    name = points_of(model, IMAGES)[0].name
    device, _ = codec_for(model, IMAGES, name).split(model, name)
    assert device.folded is None
    assert f"{K} components of {C} channels, not folded" in repr(device)
    np.testing.assert_array_equal(sent(device, IMAGES), unfolded(device, IMAGES))


@pytest.mark.parametrize("before", [False, True])
def test_coders_without_a_transform(before):
    device, _ = plain_codec(conv_bn(), IMAGES, before=before).split(conv_bn(), "2#0")
    assert device.folded is None
    assert f"2#0: {C} channels" in repr(device)


def test_a_norm_of_another_axis_stays():
    model, x = network(lambda: nn.Linear(10, C), lambda: nn.BatchNorm1d(C), nn.ReLU), SEQUENCES[:, :C]
    device, _ = codec_for(model, x, "2#0").split(model, "2#0")
    assert device.folded is None


def test_a_map_behind_the_activation_stays():
    model = network(lambda: nn.Conv2d(5, C, 1), nn.GELU)
    device, _ = codec_for(model, IMAGES, "1#0", "pca").split(model, "1#0")
    assert device.folded is None


def test_folding_follows_the_weights():
    model = conv_bn()
    device, _ = codec_for(model, IMAGES, "2#0").split(model, "2#0")
    check_same(device, IMAGES)
    made = device.folded
    assert device.folded is made
    with torch.no_grad():
        device.network.get_submodule("0").weight.mul_(0.7)
    check_same(device, IMAGES)
    device.network.get_submodule("1").bias.data = torch.linspace(-1, 1, C)
    check_same(device, IMAGES)
    device.network.load_state_dict({k: v for k, v in model.state_dict().items() if k in device.network.state_dict()})
    check_same(device, IMAGES)
    torch.testing.assert_close(device.folded(IMAGES), made(IMAGES))
    assert device.folded is not made
    again = copy.deepcopy(device)
    with torch.no_grad():
        again.network.get_submodule("0").weight.mul_(0.7)
    check_same(again, IMAGES)
    check_same(device, IMAGES)
    device.double()
    assert next(device.folded.parameters()).dtype == torch.float64
    check_same(device, IMAGES.double())
    assert device.train().folded is None
    assert device.eval().half().folded is None


def test_a_half_that_is_filled_from_a_file(tmp_path):
    model = conv_bn()
    codec = codec_for(model, IMAGES, "2#0")
    whole, server = codec.split(model, "2#0")
    packets = whole.encode(IMAGES)  # folded by now
    write_halves(codec, whole, server, "2#0", tmp_path)
    with torch.device("meta"):
        device, _ = load(tmp_path / "point.codec").split(conv_bn(), "2#0")
    assert "folded into" in repr(device)
    device.network.load_state_dict(load_file(tmp_path / "device.safetensors"), assign=True)
    assert device.encode(IMAGES) == packets
    with torch.inference_mode():
        assert device.encode(IMAGES) == packets
