"""Codec files and packets: saved, loaded, damaged, forged."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import transquant as tq
from feature_models import CODEC, NET, X, outputs
from plain_coder import plain_codec
from transquant.errors import CorruptFile, FileError, InputError, LimitExceeded, OutputError, UnsupportedVersion
from transquant.features import FeatureCodec, codec_file, registry
from transquant.features.packets import Packet, pack, unpack

# ------------------------------------------------------------------------------------------ the codec file


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

    def instead(number, array):
        def change(top, arrays):
            del top["content"]["shared"][f"{number}/steps"]
            arrays[f"{number}/steps"] = array

        return change

    cases = [
        (lambda top, arrays: None, None, ""),
        (lambda top, arrays: top.update(version=2), UnsupportedVersion, "version 2"),
        (lambda top, arrays: top.update(version=0), CorruptFile, "version"),
        (lambda top, arrays: top.update(kind="soup"), CorruptFile, "kind 'soup'"),
        (lambda top, arrays: top["content"].update(more=1), CorruptFile, "points, settings and shared arrays"),
        (lambda top, arrays: top["content"].update(points={}), CorruptFile, "expected a list"),
        (lambda top, arrays: arrays.update({"99/steps": np.ones(3)}), CorruptFile, "belongs to none of the 8 points"),
        (lambda top, arrays: arrays.update({"steps": np.ones(3)}), CorruptFile, "belongs to none"),
        (lambda top, arrays: top["content"]["shared"].pop("3/steps"), CorruptFile, "cannot be made again: KeyError"),
        (instead(3, np.ones((2, 5), np.float32)), CorruptFile, "does not fit its 8"),
        (lambda top, arrays: top["content"]["shared"].update({"3/steps": "99/steps"}), CorruptFile, "cannot be"),
        (lambda top, arrays: top["content"]["shared"].update({"3/steps": ["0/steps"]}), CorruptFile, "cannot be"),
        (lambda top, arrays: top["content"]["shared"].update({"0/steps": "0/steps"}), CorruptFile, "cannot be"),
        (lambda top, arrays: top["content"].update(shared=[]), CorruptFile, "points, settings and shared arrays"),
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


# ------------------------------------------------------------------------------------------ packets


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
