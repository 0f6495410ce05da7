"""A codec of feature maps: attached, saved, split, and what it says of networks and packets that do not fit."""

from __future__ import annotations

import copy
import csv
import json
from math import log10

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import transquant as tq
from conftest import make_net
from plain_coder import PlainCoder, plain_codec, points_of
from transquant.errors import CorruptFile, FileError, InputError, LimitExceeded, OutputError, UnsupportedVersion
from transquant.features import FeatureCodec, codec_file, registry
from transquant.features.packets import Packet, pack, unpack

X = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(5))


class Block(nn.Module):
    """One activation module that is called twice, with a residual around the first."""

    def __init__(self, width=8):
        super().__init__()
        self.one, self.two, self.act = (
            nn.Conv2d(width, width, 3, padding=1),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        return self.act(self.two(self.act(self.one(x))) + x)


class Residual(nn.Module):
    """Modules and functions, ReLU, ReLU6 and GELU, in place and not, an optional argument, vectors at the end."""

    def __init__(self):
        super().__init__()
        self.stem, self.layer1, self.layer2 = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(Block(), Block()), nn.Sequential(Block())
        self.head, self.last = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x, scale=None):
        x = functional.relu6(self.stem(x))
        x = self.layer2(functional.max_pool2d(self.layer1(x), 2))
        x = functional.gelu(self.head(x.mean((2, 3))))
        return self.last(x) if scale is None else self.last(x) * scale


def residual():
    torch.manual_seed(0)
    return Residual().eval()


NET = residual()
CODEC = plain_codec(NET, X, 0.03, before=True)


def outputs(model, x=X):
    with torch.no_grad():
        return model(x)


# ---------------------------------------------------------------------------------------------- attach and its ledger


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


def outputs_of(codec, model, x, point):
    """With one point coded."""
    with codec.attach(model, only=[point]):
        return outputs(model, x)


# ---------------------------------------------------------------------------------------------- what does not fit


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


# ---------------------------------------------------------------------------------------------- the codec file


def test_saved_and_loaded_codecs_do_the_same(tmp_path):
    path = tmp_path / "net.codec"
    codec = plain_codec(NET, X, 0.03, before=True, method="plain", uncoded=["#1"])
    codec.save(path)
    loaded = tq.features.load(path)
    assert path.read_bytes() == codec.data == loaded.data
    assert (loaded.points, loaded.settings, loaded.fingerprint) == (codec.points, codec.settings, codec.fingerprint)
    assert repr(loaded) == f"FeatureCodec(7 points, plain, {len(codec.data):,} bytes, fingerprint {codec.fingerprint.hex()})"
    with codec.attach(NET) as one:
        expected = outputs(NET)
    with loaded.attach(NET) as other:
        assert torch.equal(outputs(NET), expected)
    assert one.as_dict() == other.as_dict()
    a, b = codec.split(NET, "layer1")[0], loaded.split(NET, "layer1")[0]
    assert a(X) == b(X)
    with pytest.raises(OutputError):
        codec.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["net.codec"]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_codec_files(data):
    """Flips and cuts give FileError; a flip that changes nothing (white space of the header) gives the same codec."""
    good = CODEC.data
    if data.draw(st.booleans()):
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    else:
        place = data.draw(st.integers(0, len(good) - 1))
        bad = good[:place] + bytes([good[place] ^ data.draw(st.integers(1, 255))]) + good[place + 1 :]
    with pytest.raises(FileError):
        codec_file.read_codec(bad)


def rewritten(change):
    """The codec file with other content, under a hash that fits."""
    header = json.loads(CODEC.data[8 : 8 + int.from_bytes(CODEC.data[:8], "little")])
    top = json.loads(header["__metadata__"]["transquant"])
    arrays = codec_file.load(CODEC.data)
    change(top, arrays)
    if "sha256" in top:
        top["sha256"] = codec_file._digest(top["content"], arrays).hex()
    return codec_file.save(arrays, {"transquant": json.dumps(top)})


def test_codec_files_that_lie():
    def point(**changes):
        return lambda top, arrays: top["content"]["points"][0].update(changes)

    cases = [
        (lambda top, arrays: None, None, ""),
        (lambda top, arrays: top.update(version=2), UnsupportedVersion, "version 2"),
        (lambda top, arrays: top.update(version=0), CorruptFile, "version"),
        (lambda top, arrays: top.update(kind="soup"), CorruptFile, "kind 'soup'"),
        (lambda top, arrays: top["content"].update(more=1), CorruptFile, "points and settings"),
        (lambda top, arrays: top["content"].update(points={}), CorruptFile, "expected a list"),
        (lambda top, arrays: arrays.update({"99/steps": np.ones(3)}), CorruptFile, "belongs to none of the 8 points"),
        (lambda top, arrays: arrays.update({"steps": np.ones(3)}), CorruptFile, "belongs to none"),
        (lambda top, arrays: arrays.pop("3/steps"), CorruptFile, "cannot be made again: KeyError"),
        (lambda top, arrays: arrays.update({"3/steps": np.ones((2, 5), np.float32)}), CorruptFile, "cannot be made again"),
        (point(kind="fractal"), UnsupportedVersion, "'fractal', which needs a newer version"),
        (point(channels=9), CorruptFile, "cannot be made again"),
        (point(channels=-1), CorruptFile, "channels is -1"),
        (point(axis="1"), CorruptFile, "axis is '1'"),
        (point(low="0"), CorruptFile, "clips at"),
        (point(low=None), CorruptFile, "does not fit"),
        (point(name=""), CorruptFile, "name"),
        (point(more=1), CorruptFile, "expected an object with"),
        (point(settings=[]), CorruptFile, "expected an object"),
    ]
    for change, error, message in cases:
        data = rewritten(change)
        if error is None:
            assert FeatureCodec(*codec_file.read_codec(data)).data == CODEC.data
            continue
        with pytest.raises(error, match=message):
            FeatureCodec(*codec_file.read_codec(data))


def test_other_files(tmp_path):
    (tmp_path / "a").write_bytes(b"nothing of the sort" * 9)
    with pytest.raises(CorruptFile, match="a: this is no codec file"):
        tq.features.load(tmp_path / "a")
    (tmp_path / "b").write_bytes(codec_file.save({"x": np.ones(2)}))
    with pytest.raises(CorruptFile, match="no 'transquant'"):
        tq.features.load(tmp_path / "b")
    with pytest.raises(InputError, match="cannot read"):
        tq.features.load(tmp_path / "c")
    with pytest.raises(LimitExceeded):
        tq.features.load(tmp_path / "a", tq.Limits(max_decoded_bytes=10))


def test_kinds_are_known_by_name():
    assert {"predictive", "pca", "dct-masks"} <= set(registry.KINDS)
    with pytest.raises(UnsupportedVersion):
        registry.from_state("soup", {}, {})


# ---------------------------------------------------------------------------------------------- packets


@settings(deadline=None)
@given(st.binary(max_size=40), st.integers(0, 4095), st.lists(st.integers(1, 2**31), max_size=7), st.binary(min_size=4, max_size=4))
def test_packets_come_back(payload, index, lengths, fingerprint):
    packet = Packet(index, tuple(lengths), payload)
    assert unpack(pack(fingerprint, packet), fingerprint) == packet


def test_layout_of_a_packet():
    """FORMAT of docs/features.md, byte by byte."""
    import zlib

    data = pack(b"\1\2\3\4", Packet(20, (7, 300), b"xyz"))
    rest = bytes([8 * 20 + 2 & 127 | 128, 1, 7, 300 & 127 | 128, 2]) + b"xyz"
    assert data == b"\1\2\3\4" + zlib.crc32(b"\1\2\3\4" + rest).to_bytes(4, "little") + rest


DEVICE, SERVER = CODEC.split(NET, "layer1.0")
PACKETS = DEVICE(X)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_packets(data):
    good = PACKETS[0]
    if data.draw(st.booleans()):
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    else:
        place = data.draw(st.integers(0, len(good) - 1))
        bad = good[:place] + bytes([good[place] ^ data.draw(st.integers(1, 255))]) + good[place + 1 :]
    with pytest.raises(CorruptFile, match="damaged or truncated|is truncated"):
        SERVER.decode(bad)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 20), st.lists(st.integers(1, 2**34), max_size=7))
def test_forged_packets(payload, index, lengths):
    """With a checksum that fits: nothing but FileError, and no memory for maps that are not there."""
    with pytest.raises(FileError):
        SERVER.decode(pack(CODEC.fingerprint, Packet(index, tuple(lengths), payload)))


def test_packets_of_something_else():
    with pytest.raises(CorruptFile, match=r"of point 6 of the codec, expected 2, 'layer1.0.act#1'"):
        SERVER.decode(CODEC.split(NET, "layer2")[0](X)[0])
    other = plain_codec(NET, X, 0.04, before=True)
    with pytest.raises(CorruptFile, match=f"fingerprint is {other.fingerprint.hex()}, this codec's {CODEC.fingerprint.hex()}"):
        SERVER.decode(other.split(NET, "layer1.0")[0](X)[0])
    with pytest.raises(LimitExceeded, match="asks for a map of"):
        SERVER.decode(pack(CODEC.fingerprint, Packet(2, (2000, 2000), b"")))
    headless = pack(CODEC.fingerprint, Packet(2, (7, 7), b""))[:8] + b"\x92"
    with pytest.raises(CorruptFile):
        SERVER.decode(headless)


# ---------------------------------------------------------------------------------------------- split


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


DEVICE_OF_LAYER1 = CODEC.split(NET, "layer1")[0]


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


def test_points_keep_their_order():
    assert [p.name for p in points_of(NET, X)] == [p.name for p in CODEC.points]
