from __future__ import annotations

import json
import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transquant.container import pack_raw, paths, read_container, read_file, unpack_raw, write_container, write_file
from transquant.errors import CorruptFile, FileError, InputError, LimitExceeded, OutputError, UnsupportedVersion
from transquant.records import AliasEntry, BatchNormEntry, CodedEntry, Container, Limits, RawEntry, Section

EXAMPLE = Container(
    (2048, -3),
    (
        CodedEntry("a.weight", (3, 4), "float16", -5, (1, -2), "rc"),
        BatchNormEntry("b", 5, "float32", (1, 2), 1e-5, 7),
        RawEntry("c", (2,), "int64"),
        AliasEntry("d", "b.bias"),
    ),
    (Section("s", 2, 4, b"xyz"), Section("r", 1, 0, pack_raw([bytes(16)]))),
    {"by": "test"},
)


def repack(header: bytes | dict, body: bytes = b"", **fixed) -> bytes:
    """A file around a header, with its checksum right."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    squeezed = fixed.get("squeezed") or (c := zlib.compressobj(9, zlib.DEFLATED, -15)).compress(raw) + c.flush()
    lengths = struct.pack("<BBII", fixed.get("version", 1), fixed.get("flags", 0), fixed.get("raw_length", len(raw)), len(squeezed))
    return b"\x93TQ\n" + lengths + struct.pack("<I", zlib.crc32(lengths + squeezed)) + squeezed + body


def header_of(data: bytes) -> tuple[dict, bytes]:
    length = struct.unpack_from("<I", data, 10)[0]
    return json.loads(zlib.decompress(data[18 : 18 + length], -15)), data[18 + length :]


def test_round_trip_and_golden_bytes():
    data = write_container(EXAMPLE)
    assert read_container(data) == EXAMPLE
    assert data[:6] == b"\x93TQ\n\x01\x00"
    header, body = header_of(data)
    assert header["tensors"][0] == {"n": "a.weight", "s": [3, 4], "q": -5, "d": [1, -2], "g": "rc", "t": "float16"}
    assert header["tensors"][1:] == [
        {"k": "b", "n": "b", "s": [5], "q": [1, 2], "e": 1e-5, "b": 7},
        {"k": "r", "n": "c", "s": [2], "t": "int64"},
        {"k": "a", "n": "d", "o": "b.bias"},
    ]
    assert body.startswith(b"xyz")
    assert repack(header, body)[18:] == data[18:] or read_container(repack(header, body)) == EXAMPLE


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20).filter(
    lambda s: all(ord(c) != 127 for c in s)
)


@settings(max_examples=50, deadline=None)
@given(st.lists(names, unique=True, min_size=1, max_size=8), st.integers(-400, 400), st.integers(2048, 4095), st.integers(-160, 60))
def test_any_names_and_numbers(labels, qp, mantissa, exponent):
    entries = tuple(CodedEntry(name, (2, 3), "float32", qp) for name in labels)
    container = Container((mantissa, exponent), entries, (Section("s", len(entries), 1, b"123"),), {})
    assert read_container(write_container(container)) == container


BAD = {
    "negative dimension": (["tensors", 0, "s"], [-1, 4], CorruptFile),
    "huge dimension": (["tensors", 0, "s"], [2**31, 4], CorruptFile),
    "nothing times huge": (["tensors", 0, "s"], [0, 2**31 - 1, 2**31 - 1], LimitExceeded),
    "huge times nothing": (["tensors", 0, "s"], [2**31 - 1, 0], LimitExceeded),
    "exact nothing times huge": (["tensors", 2, "s"], [0, 2**31 - 1, 2**31 - 1], LimitExceeded),
    "huge product": (["tensors", 0, "s"], [2**30, 2**30], LimitExceeded),
    "nine dimensions": (["tensors", 0, "s"], [1] * 9, CorruptFile),
    "float dimension": (["tensors", 0, "s"], [3.0, 4], CorruptFile),
    "bool dimension": (["tensors", 0, "s"], [True, 4], CorruptFile),
    "null shape": (["tensors", 0, "s"], None, CorruptFile),
    "step index": (["tensors", 0, "q"], 401, CorruptFile),
    "offset": (["tensors", 0, "d"], [32, 0], CorruptFile),
    "offsets": (["tensors", 0, "d"], [1], CorruptFile),
    "fold that does not divide": (["tensors", 0, "f"], 3, CorruptFile),
    "fold 0": (["tensors", 0, "f"], 0, CorruptFile),
    "fold too large": (["tensors", 0, "f"], 2048, CorruptFile),
    "groups": (["tensors", 0, "g"], "x", UnsupportedVersion),
    "quantizer": (["tensors", 0, "z"], "trellis", UnsupportedVersion),
    "transform": (["tensors", 0, "x"], "klt", UnsupportedVersion),
    "dtype": (["tensors", 0, "t"], "float8", UnsupportedVersion),
    "integer dtype for a coded tensor": (["tensors", 0, "t"], "int8", CorruptFile),
    "new key": (["tensors", 0, "zz"], 1, UnsupportedVersion),
    "new kind": (["tensors", 0, "k"], "v", UnsupportedVersion),
    "kind no text": (["tensors", 0, "k"], [1], CorruptFile),
    "empty name": (["tensors", 0, "n"], "", CorruptFile),
    "control character": (["tensors", 0, "n"], "a\0b", CorruptFile),
    "surrogate": (["tensors", 0, "n"], "\ud800", CorruptFile),
    "long name": (["tensors", 0, "n"], "x" * 513, CorruptFile),
    "same name twice": (["tensors", 0, "n"], "c", CorruptFile),
    "name of a BatchNorm's vector": (["tensors", 0, "n"], "b.running_var", CorruptFile),
    "eps": (["tensors", 1, "e"], 1, CorruptFile),
    "eps text": (["tensors", 1, "e"], "0", CorruptFile),
    "counter": (["tensors", 1, "b"], -1, CorruptFile),
    "alias of nothing": (["tensors", 3, "o"], "z", CorruptFile),
    "entry no object": (["tensors", 0], [], CorruptFile),
    "tensors no list": (["tensors"], {}, CorruptFile),
    "mantissa": (["step"], [2047, 0], CorruptFile),
    "exponent": (["step"], [2048, 61], CorruptFile),
    "section kind": (["sections", 0, 0], "q", UnsupportedVersion),
    "section count": (["sections", 0, 1], 3, CorruptFile),
    "lanes no power of two": (["sections", 0, 2], 3, CorruptFile),
    "lanes 0": (["sections", 0, 2], 0, CorruptFile),
    "lanes 2048": (["sections", 0, 2], 2048, CorruptFile),
    "section too long": (["sections", 0, 3], 4, CorruptFile),
    "section too short": (["sections", 0, 3], 2, CorruptFile),
    "section checksum": (["sections", 0, 4], 5, CorruptFile),
    "two raw sections": (["sections", 0, 0], "r", CorruptFile),
    "features": (["features"], ["trellis"], UnsupportedVersion),
    "top-level key": (["new"], 1, UnsupportedVersion),
    "metadata": (["metadata"], {"a": 1}, CorruptFile),
}


@pytest.mark.parametrize("rule", BAD)
def test_every_rule_of_the_header(rule):
    path, value, error = BAD[rule]
    header, body = header_of(write_container(EXAMPLE))
    place = header
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(error) as caught:
        read_container(repack(json.dumps(header).encode(), body))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"null", b"{", b'{"step":[2048,0],"step":[2048,0]}', b'{"a":NaN}', b'{"a":1e999}', b"\xff\xfe", b"[" * 100_000,
     b'{"a":' + b"9" * 5000 + b"}", b'{"tensors":[],"sections":[]}', b'{"a":[[[[[[[[[]]]]]]]]]}'],
)  # fmt: skip
def test_headers_that_are_no_header(raw):
    with pytest.raises(FileError):
        read_container(repack(raw))


def test_version_flags_and_lengths():
    header, body = header_of(write_container(EXAMPLE))
    raw = json.dumps(header).encode()
    for error, fixed in (
        (UnsupportedVersion, {"version": 2}), (UnsupportedVersion, {"flags": 1}), (LimitExceeded, {"raw_length": 1 << 30}),
        (CorruptFile, {"raw_length": len(raw) - 1}), (CorruptFile, {"raw_length": len(raw) + 1}), (CorruptFile, {"squeezed": b"\0\1"}),
    ):  # fmt: skip
        with pytest.raises(error):
            read_container(repack(raw, body, **fixed))
    for data in (b"", b"\x93TQ", b"PK\3\4" + bytes(40), write_container(EXAMPLE) + b"\0", write_container(EXAMPLE)[:-1]):
        with pytest.raises(CorruptFile):
            read_container(data)


def test_bombs_stay_small():
    bomb = (c := zlib.compressobj(9, zlib.DEFLATED, -15)).compress(bytes(200 << 20)) + c.flush()
    tracemalloc.start()
    try:
        with pytest.raises(CorruptFile):
            read_container(repack(b"{}", squeezed=bomb, raw_length=1000))
        with pytest.raises(CorruptFile):
            unpack_raw(bomb, [1000])
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_limits_and_number_of_entries():
    big = Container((2048, 0), (CodedEntry("a", (4096, 4096)),), (Section("s", 1, 1, b"x" * 100),), {})
    data = write_container(big)
    with pytest.raises(LimitExceeded, match="max_expansion"):
        read_container(data)
    assert read_container(data, Limits(max_expansion=10**9)) == big
    with pytest.raises(LimitExceeded, match="max_decoded_bytes"):
        read_container(data, Limits(max_expansion=10**9, max_decoded_bytes=1 << 20))
    many = {"step": [2048, 0], "tensors": [{"n": str(k), "s": [0], "k": "r"} for k in range(100_001)], "sections": []}
    with pytest.raises(CorruptFile, match="100000"):
        read_container(repack(many))
    alias = [{"n": "a", "s": [1000, 1000], "q": 0}] + [{"k": "a", "n": f"b{k}", "o": "a"} for k in range(50)]
    with pytest.raises(LimitExceeded):
        read_container(repack({"step": [2048, 0], "tensors": alias, "sections": [["s", 1, 1, 0, 0]]}))


def test_random_damage_raises_one_family():
    data = write_container(EXAMPLE)
    rng = np.random.default_rng(0)
    for _ in range(500):
        bad = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            bad[rng.integers(len(bad))] = rng.integers(256)
        bad = bad[: rng.integers(len(bad) + 1)] if rng.random() < 0.3 else bad
        if bytes(bad) != data:
            with pytest.raises(FileError):
                read_container(bytes(bad))


def test_write_is_all_or_nothing(tmp_path, monkeypatch):
    target = tmp_path / "net.tq"
    write_file(target, b"old")
    for name, error in (("fsync", OSError(28, "No space left on device")), ("replace", KeyboardInterrupt())):

        def fail(*args, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises((OutputError, KeyboardInterrupt)):
                write_file(target, b"new")
        assert target.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["net.tq"]
    write_file(target, b"new")
    assert target.read_bytes() == b"new"


def test_paths(tmp_path, monkeypatch):
    for path in (tmp_path / "no" / "net.tq", tmp_path):
        with pytest.raises(OutputError):
            paths.check_writable(path)
        with pytest.raises(OutputError):
            write_file(path, b"x")
    with pytest.raises(InputError, match="No such file"):
        read_file(tmp_path / "none.tq")
    with pytest.raises(InputError):
        read_file(tmp_path)
    (tmp_path / "big").write_bytes(bytes(1000))
    with pytest.raises(LimitExceeded):
        read_file(tmp_path / "big", Limits(max_decoded_bytes=10))

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(paths.tempfile, "mkstemp", refuse)
    with pytest.raises(OutputError, match="Permission denied"):
        paths.check_writable(tmp_path / "net.tq")
    with pytest.raises(OutputError, match="Permission denied"):
        write_file(tmp_path / "net.tq", b"x")
