"""A codec attached to a network: its ledger, and what it says of networks that do not fit."""

from __future__ import annotations

import copy
import csv
import json
from math import log10

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from conftest import make_net
from feature_models import CODEC, NET, Block, X, outputs, residual
from plain_coder import PlainCoder, plain_codec, points_of
from transquant.errors import InputError, OutputError
from transquant.features import FeatureCodec
from transquant.features.packets import Packet, pack

# ------------------------------------------------------------------------------------------ attach and its ledger


@pytest.mark.parametrize("before", [False, True])
def test_ledger_counts_what_passes(before):
    """Every figure against one that is computed here, from maps as they are and packets made by hand."""
    codec = plain_codec(NET, X, 0.05, before=before)
    whole = outputs(NET)
    with codec.attach(NET) as ledger:
        coded = outputs(NET)
    assert not torch.equal(coded, whole)
    torch.testing.assert_close(coded, whole, atol=0.1, rtol=0.1)
    first = codec.coded[0]
    inside = outputs(NET.stem)
    after = functional.relu6(inside).numpy()
    packets, back, bits = [], [], 0.0
    for sample in inside.numpy() if before else after:
        symbols = first.coder.quantize(sample)
        bits += first.coder.ideal_bits(symbols)
        packets.append(pack(codec.fingerprint, Packet(0, (12, 12), first.coder.encode(symbols))))
        back.append(np.clip(first.coder.dequantize(symbols), 0, 6))
    row = ledger.points[0]
    assert (row.name, row.activation, row.mode) == ("#0", "relu6", "before" if before else "after")
    assert (row.samples, row.values, row.bytes) == (6, after.size, sum(map(len, packets)))
    assert row.bits_per_value == 8 * row.bytes / after.size
    assert row.ideal_bits == bits
    assert row.overhead_bytes == row.bytes - bits / 8
    assert row.sparsity == (after == 0).mean() > 0.2
    assert row.coded_sparsity == (np.stack(back) == 0).mean()
    noise = ((after - np.stack(back)).astype(np.float64) ** 2).sum()
    assert row.snr_db == pytest.approx(10 * log10((after.astype(np.float64) ** 2).sum() / noise))


def test_totals_grow_and_traffic_is_written_once_and_read_once():
    with CODEC.attach(NET) as ledger:
        assert (ledger.values, ledger.bytes) == (0, 0)
        outputs(NET)
        values, size = ledger.values, ledger.bytes
        outputs(NET)
    assert [r.name for r in ledger.points] == [p.name for p in CODEC.points]
    assert values == sum(p.channels * n for p, n in zip(CODEC.points, [144 * 6] * 5 + [36 * 6] * 2 + [6], strict=True))
    assert (
        (ledger.values, ledger.bytes)
        == (2 * values, 2 * size)
        == (sum(r.values for r in ledger.points), sum(r.bytes for r in ledger.points))
    )
    assert ledger.bits_per_value == 8 * size / values
    assert ledger.total.samples == 12
    moved = ledger.traffic
    assert (moved.coded, moved.eight_bit, moved.sixteen_bit) == (4 * size, 4 * values, 8 * values)
    assert moved.against_sixteen_bit == 2 * moved.against_eight_bit == 2 * values / size


def test_a_forward_without_loss_where_steps_are_tiny_and_a_lossless_row():
    codec = FeatureCodec([(p, PlainCoder(np.full(p.channels, 2.0**-10, np.float32))) for p in CODEC.points], {})
    with codec.attach(NET) as ledger:
        torch.testing.assert_close(outputs(NET), outputs(residual()), atol=2e-3, rtol=2e-3)
        assert all(r.snr_db > 40 for r in ledger.points)


def test_written_ledgers(tmp_path):
    with CODEC.attach(NET) as ledger:
        outputs(NET)
    ledger.to_csv(tmp_path / "l.csv")
    rows = list(csv.DictReader((tmp_path / "l.csv").open()))
    assert [r["name"] for r in rows] == [*(p.name for p in CODEC.points), "total"]
    assert int(rows[-1]["bytes"]) == ledger.bytes == sum(int(r["bytes"]) for r in rows[:-1])
    ledger.to_json(tmp_path / "l.json")
    read = json.loads((tmp_path / "l.json").read_text())
    assert read["total"]["bits_per_value"] == ledger.bits_per_value
    assert read["traffic"]["coded"] == 2 * ledger.bytes
    text = str(ledger)
    assert len(text.splitlines()) == 2 + len(ledger.points) + 2
    assert f"{ledger.bytes:,}" in text
    assert f"{2 * ledger.bytes:,} bytes" in text
    assert ledger.table().row_count == len(ledger.points) + 1
    with pytest.raises(OutputError):
        ledger.to_csv(tmp_path / "no" / "l.csv")
    pytest.importorskip("matplotlib")
    ledger.to_picture(tmp_path / "l.png")
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="ends in one of"):
        ledger.to_picture(tmp_path / "l.doc")


def test_the_network_is_as_it_was():
    model = residual()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    state, whole = copy.deepcopy(model.state_dict()), outputs(model)
    with CODEC.attach(model):
        outputs(model)
    with pytest.raises(RuntimeError, match="channels"), CODEC.attach(model):
        outputs(model, X[:, :2])
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert torch.equal(outputs(model), whole)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_only_some_points_and_points_without_a_coder():
    with CODEC.attach(NET, only=["layer1.0.act#1"]) as ledger:
        outputs(NET)
    assert [r.name for r in ledger.points] == ["layer1.0.act#1"]
    partial = plain_codec(NET, X, 0.03, uncoded=["#0", "#1"])
    with partial.attach(NET) as ledger:
        outputs(NET)
    assert {"#0", "#1"}.isdisjoint(r.name for r in ledger.points)
    with pytest.raises(InputError, match="no point 'layer9'; its points are #0, layer1"), CODEC.attach(NET, only=["layer9"]):
        pass


def test_other_sizes_and_each_sample_is_its_own():
    x = torch.randn(3, 3, 21, 9, generator=torch.Generator().manual_seed(1))
    with CODEC.attach(NET) as together:
        coded = outputs(NET, x)
    alone = []
    with CODEC.attach(NET) as ledger:
        for k in range(3):
            torch.testing.assert_close(outputs(NET, x[k : k + 1]), coded[k : k + 1], atol=0.05, rtol=0.05)
            alone.append(ledger.points[0].bytes)
    assert alone[-1] == together.points[0].bytes
    assert together.points[0].values == 3 * 8 * 21 * 9


def test_threads_change_nothing():
    before, packets = torch.get_num_threads(), []
    device, _ = CODEC.split(NET, "#0")
    device.network, maps = nn.Identity(), outputs(NET.stem)  # convolutions may differ in their last digits
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            packets.append(device.encode(maps))
    finally:
        torch.set_num_threads(before)
    assert packets[0] == packets[1]


def test_sequences_and_half_precision():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 5), nn.ReLU()).eval().to(torch.bfloat16)
    x = torch.randn(2, 7, 6).to(torch.bfloat16)
    codec = plain_codec(model, x, 2.0**-8, before=True)
    assert [(p.axis, p.channels) for p in codec.points] == [(2, 10), (2, 5)]
    with codec.attach(model) as ledger:
        result = outputs(model, x)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, outputs(model, x), atol=0.05, rtol=0.05)
    assert ledger.values == 2 * 7 * 15
    device, server = codec.split(model, "3")
    assert torch.equal(server(device(x)), outputs_of(codec, model, x, "3#0"))


class Excited(nn.Module):
    """Linear layers on pooled maps and on pixels, between a convolution and the activation behind it."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate, self.mix = nn.Conv2d(3, 5, 3), nn.Linear(5, 5), nn.Linear(5, 7)

    def forward(self, x):
        x = self.conv(x)
        x = torch.relu(x * torch.sigmoid(self.gate(torch.relu(x.mean((2, 3)))))[:, :, None, None])
        return torch.relu(self.mix(x.movedim(1, -1)))


def test_channels_are_where_the_last_layer_of_such_a_shape_left_them():
    model = Excited()
    assert [(p.axis, p.channels) for p in points_of(model, X)] == [(1, 5), (1, 5), (3, 7)]
    whole = nn.Sequential(nn.ReLU(), model)
    codec = plain_codec(whole, X, 0.02)
    with codec.attach(whole):
        for side in (12, 9):  # a pass does not begin with what the last one left
            assert outputs(whole, X[..., :side, :side]).shape == (6, side - 2, side - 2, 7)


def outputs_of(codec, model, x, point):
    """With one point coded."""
    with codec.attach(model, only=[point]):
        return outputs(model, x)


# ------------------------------------------------------------------------------------------ what does not fit


def wider():
    model = residual()
    model.layer1[1] = Block(8)
    model.head = nn.Linear(8, 14)
    model.last = nn.Linear(14, 4)
    return model


def with_other_activation():
    model = residual()
    model.layer2[0].act = nn.SiLU()
    return model


def longer():
    model = residual()
    model.layer2.append(Block())
    return model


def shorter():
    model = residual()
    model.layer1 = model.layer1[:1]
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (wider, r"at '#1' channels is 14 here, 12 in the codec"),
        (with_other_activation, r"at 'layer2.0.act#0' activation is 'silu' here, 'relu' in the codec"),
        (longer, r"it has no point 'layer2.1.act#0' \(relu\)"),
        (shorter, r"did not come by 2 of its 8 points, such as 'layer1.1.act#0'"),
        (make_net, r"at '#0' activation is 'relu' here, 'relu6' in the codec"),
    ],
)
def test_another_network(make, message):
    model = make()
    with pytest.raises(InputError, match=message), CODEC.attach(model):
        outputs(model)


def test_more_calls_than_were_calibrated():
    model = residual()
    model.layer1[0].forward = lambda x, b=model.layer1[0]: b.act(b.act(b.act(b.one(x))))
    with pytest.raises(InputError, match=r"'layer1.0.act' calls activations more often than the 2 times"), CODEC.attach(model):
        outputs(model)


def test_only_part_of_the_network():
    """Where it begins and ends would not be known."""
    with pytest.raises(InputError, match=r"only what model\(...\) runs"), CODEC.attach(NET):
        outputs(NET.layer1, torch.randn(1, 8, 4, 4))


def test_maps_that_are_empty_or_not_finite():
    model = residual()
    with pytest.raises(InputError, match=r"'#0' is empty: it has shape \(0, 8, 12, 12\)"), CODEC.attach(model):
        outputs(model, X[:0])
    model.layer1[1].one.weight.data[3] = torch.inf
    with pytest.raises(InputError, match=r"'layer1.1.act#0' has NaN or infinite"), CODEC.attach(model):
        outputs(model)


def test_codecs_that_make_no_sense():
    point = next(p for p in CODEC.points if p.activation == "gelu")
    coder = PlainCoder(np.ones(point.channels, np.float32))
    with pytest.raises(InputError, match="one or more points"):
        FeatureCodec([], {})
    with pytest.raises(InputError, match="1 different of 2"):
        FeatureCodec([(point, coder), (point, coder)], {})
    with pytest.raises(InputError, match="allowed is what comes out"):
        FeatureCodec({point: PlainCoder(coder.steps, before=True)}, {})
    for settings_ in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises(InputError, match="JSON"):
            FeatureCodec({point: coder}, settings_)


def test_points_keep_their_order():
    assert [p.name for p in points_of(NET, X)] == [p.name for p in CODEC.points]
