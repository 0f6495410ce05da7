"""One network in two halves."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from feature_models import CODEC, NET, Residual, X, outputs
from plain_coder import plain_codec
from transquant.errors import InputError

DEVICE, SERVER = CODEC.split(NET, "layer1.0")
DEVICE_OF_LAYER1 = CODEC.split(NET, "layer1")[0]
PACKETS = DEVICE(X)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    ("at", "point"),
    [("#0", "#0"), ("layer1.0", "layer1.0.act#1"), ("layer1", "layer1.1.act#1"), ("layer2.0", "layer2.0.act#1"), ("#1", "#1")],
)
def test_halves_are_the_whole(at, point, before):
    codec = plain_codec(NET, X, 0.05, before=before)
    device, server = codec.split(NET, at)
    packets = device(X)
    assert len(packets) == 6
    assert all(isinstance(p, bytes) for p in packets)
    assert device.coded.point.name == server.coded.point.name == point
    with codec.attach(NET, only=[point]) as ledger:
        expected = outputs(NET)
    assert torch.equal(server(packets), expected)
    assert sum(map(len, packets)) == ledger.bytes
    kept = packets[:2] + packets[3:]  # one that is lost costs one sample
    torch.testing.assert_close(server.decode(kept), expected[[0, 1, 3, 4, 5]], atol=1e-5, rtol=1e-5)
    assert server.decode(packets[4]).shape == (1, 4)


def test_each_half_has_its_own_parameters():
    whole = set(NET.state_dict())
    device, server = CODEC.split(NET, "layer1")
    first, second = set(device.network.state_dict()), set(server.network.state_dict())
    assert first == {k for k in whole if k.startswith(("stem", "layer1"))}
    assert second == whole - first
    with torch.device("meta"):
        empty = CODEC.split(Residual(), "layer1")[1]
    empty.network.load_state_dict(server.network.state_dict(), assign=True)
    assert torch.equal(empty(DEVICE_OF_LAYER1(X)), server(DEVICE_OF_LAYER1(X)))
    assert not hasattr(NET, "_tensor_constant0")


def test_where_a_network_cannot_be_cut():
    places = "it can be cut at #0, layer1.0, layer1, layer2, #1"
    for at, reason in {
        "soup": "no module has this path",
        "stem": "its result is not the map of a point",
        "layer1.0.act": "the module is run 2 times",
        "layer1.0.act#0": "not only its result crosses",
        "last": "its result is not the map of a point",
    }.items():
        with pytest.raises(InputError) as caught:
            CODEC.split(NET, at)
        assert f"cannot be cut at {at!r}: {reason}" in str(caught.value)
        assert places in str(caught.value)


class Branches(nn.Module):
    """Control flow that depends on the data."""

    def forward(self, x):
        x = torch.relu(x)
        return x if x.sum() > 0 else -x


class Careless(nn.Module):
    """A change in place whose result is not used."""

    def forward(self, x):
        y = torch.relu(x)
        y.add_(1)
        return y * 2


@pytest.mark.parametrize(
    ("model", "reason"), [(Branches(), "torch.fx cannot trace it: symbolically"), (Careless(), "changes a tensor in place")]
)
def test_networks_that_cannot_be_traced(model, reason):
    codec = plain_codec(model, X)
    with pytest.raises(InputError, match=reason):
        codec.split(model, "#0")


def test_batches_that_do_not_go_together():
    with pytest.raises(InputError, match="no samples"):
        DEVICE(X[:0])
    with pytest.raises(InputError, match="no packets"):
        SERVER([])
    with pytest.raises(InputError, match=r"maps of \(12, 12\) and \(20, 20\); decode them apart"):
        SERVER([PACKETS[0], *DEVICE(torch.randn(1, 3, 20, 20))])


@pytest.mark.slow
def test_the_example_sends_bytes_between_two_processes():
    pytest.importorskip("sklearn", reason="the example's data come with scikit-learn")
    script = Path(__file__).resolve().parents[1] / "examples" / "split_over_socket.py"
    done = subprocess.run([sys.executable, str(script), "--images", "100"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    sent, plain, split, whole = (float(re.search(r"[\d.]+", line[17:])[0]) for line in done.stdout.splitlines())
    assert 0 < sent < plain / 4
    assert plain == 100 * 24 * 8 * 8
    assert abs(split - whole) <= 3
    assert whole > 95
