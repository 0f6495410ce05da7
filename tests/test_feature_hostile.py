"""Coders of every method behind packets and codec files that were forged: checksums and hashes fit, what they cover does not."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import transquant as tq
from conftest import make_net
from transquant.errors import FileError
from transquant.features import FeatureCodec, codec_file
from transquant.features.packets import Packet, pack, unpack

METHODS = ("auto", "pca", "pca-quantized", "none", "dct-cm")
X = torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(2))


@cache
def halves(method):
    """(codec, device, server, packets) of the second point."""
    codec = tq.features.calibrate(make_net(), [X], bits_per_value=4.0, method=method)
    device, server = codec.split(make_net(), "#1")
    return codec, device, server, device.encode(X[:4])


@pytest.mark.parametrize("method", METHODS)
def test_methods_pass_through_files_and_packets(method, tmp_path):
    codec, _, server, packets = halves(method)
    codec.save(tmp_path / "c")
    loaded = tq.features.load(tmp_path / "c")
    assert loaded.data == codec.data
    device, again = loaded.split(make_net(), "#1")
    assert device.encode(X[:4]) == packets
    assert torch.equal(again.decode(packets), server.decode(packets))
    for packet in packets:
        coder, whole = codec.coders[1], unpack(packet, codec.fingerprint)
        symbols = coder.decode(whole.payload, *whole.lengths)
        assert coder.encode(symbols) == whole.payload
        # heads of streams and what is lost to whole bits: never below the information content
        assert 8 * len(whole.payload) + 1 >= coder.ideal_bits(symbols)


@pytest.mark.parametrize("method", METHODS)
def test_forged_payloads(method):
    """A packet with any payload decodes to a finite map of the right size or raises FileError."""
    codec, _, server, packets = halves(method)
    good = unpack(packets[0], codec.fingerprint)

    @settings(max_examples=120, deadline=None)
    @given(st.data())
    def check(data):
        payload = bytearray(good.payload)
        if data.draw(st.booleans()):
            for _ in range(data.draw(st.integers(1, 4))):
                payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
        else:
            payload = data.draw(st.binary(max_size=200))
        lengths = data.draw(st.sampled_from([good.lengths, (1, 1), (), (3,), (40, 40), (2, 3, 4)]))
        try:
            values, _ = server.coded.decode(pack(codec.fingerprint, Packet(1, lengths, bytes(payload))), tq.Limits())
        except FileError:
            return
        assert values.dtype == np.float32
        assert len(values) == codec.points[1].channels
        assert not np.isnan(values).any()

    check()


@pytest.mark.parametrize("method", METHODS)
def test_forged_codec_files(method):
    """Arrays and settings that are changed under a fitting hash: FileError, or a codec whose packets still pass or raise FileError."""
    good = halves(method)[0].data
    header = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])
    arrays = codec_file.load(good)

    @settings(max_examples=120, deadline=None)
    @given(st.data())
    def check(data):
        top = json.loads(header["__metadata__"]["transquant"])
        changed = {k: v.copy() for k, v in arrays.items()}
        way = data.draw(st.sampled_from(["bytes", "shape", "dtype", "drop", "settings"] if changed else ["settings"]))
        name = data.draw(st.sampled_from(sorted(changed) or [""]))
        array = changed.get(name, np.zeros(0))
        if way == "bytes" and array.size:
            raw = np.frombuffer(array.tobytes(), np.uint8).copy()
            for _ in range(data.draw(st.integers(1, 8))):
                raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
            changed[name] = raw.view(array.dtype).reshape(array.shape)
        elif way == "shape":
            changed[name] = data.draw(st.sampled_from([array[:0], array.reshape(-1), array[None], np.concatenate([array, array])]))
        elif way == "dtype":
            with np.errstate(all="ignore"):
                changed[name] = array.astype(data.draw(st.sampled_from(["f8", "i1", "i4", "u2", "f2"])))
        elif way == "drop":
            del changed[name]
        else:
            point = top["content"]["points"][data.draw(st.integers(0, 1))]
            key = data.draw(st.sampled_from(sorted(point["settings"]) or [""]))
            point["settings"][key] = data.draw(st.sampled_from([None, -1, 0, 7, 1 << 40, 1e300, "x", [], True]))
        top["sha256"] = codec_file._digest(top["content"], changed).hex()
        with np.errstate(all="ignore"):
            try:
                codec = FeatureCodec(*codec_file.read_codec(codec_file.save(changed, {"transquant": json.dumps(top)})))
            except FileError:
                return
            coder = codec.coders[1]
            symbols = coder.quantize(np.linspace(-3, 3, 32 * 20, dtype=np.float32).reshape(32, 4, 5))
            try:
                coder.dequantize(coder.decode(coder.encode(symbols), 4, 5))
                coder.decode(b"\x80" * 40, 4, 5)
            except FileError:
                return

    check()
