"""Hostile files: the documented exceptions, in bounded time and memory, and nothing else."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib

import numpy as np
import pytest

import transquant as tq
from transquant import reader
from transquant.errors import FileError, LimitExceeded

COUNT = 1000


@pytest.fixture(scope="module")
def data():
    import torch

    from conftest import make_net

    images = torch.randn(160, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return tq.compress(make_net(), images, bits=4.0, effort=1, overrides={"linear.bias": "exact"}).data


def split(data):
    """(header JSON, sections) of a good file."""
    raw_length, length = struct.unpack("<II", data[6:14])
    header = zlib.decompressobj(-15).decompress(data[18 : 18 + length])
    assert len(header) == raw_length
    sections, place = [], 18 + length
    for row in json.loads(header)["sections"]:
        sections.append(data[place : place + row[3]])
        place += row[3]
    return header, sections


def join(header, sections):
    """A file whose checksums and lengths are right, whatever its header says."""
    squeeze = zlib.compressobj(9, wbits=-15)
    packed = squeeze.compress(header) + squeeze.flush()
    lengths = struct.pack("<II", len(header), len(packed))
    crc = zlib.crc32(packed, zlib.crc32(b"\x01\x00" + lengths))
    return b"\x93TQ\n\x01\x00" + lengths + struct.pack("<I", crc) + packed + b"".join(sections)


def repaired(header, sections):
    """Join with the section table's lengths and checksums made right."""
    value = json.loads(header)
    for row, section in zip(value["sections"], sections, strict=False):
        row[3], row[4] = len(section), zlib.crc32(section)
    return join(json.dumps(value).encode(), sections)


def numbers_of(value, path=()):
    """Paths of all numbers and texts in a JSON value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers_of(item, (*path, key))
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from numbers_of(item, (*path, place))
    else:
        yield path


def changed(header, rng):
    """The header with one value replaced by something unpleasant."""
    value = json.loads(header)
    paths = list(numbers_of(value))
    path = paths[rng.integers(len(paths))]
    nasty = [
        0, -1, 1, 2, 7, 255, 4096, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 62, 1 << 200, -(1 << 63), 0.5, 1e308, True, None, "", "x", "float16",
        "int8", "complex64", "r", "s", "c", "../../etc/passwd", "\x00", "é" * 600, [], [3], {}, {"k": "c"},
    ]  # fmt: skip
    place = value
    for key in path[:-1]:
        place = place[key]
    old = place[path[-1]]
    new = nasty[rng.integers(len(nasty))]
    if isinstance(old, int) and rng.random() < 0.4:
        new = old + int(rng.integers(-3, 4))
    place[path[-1]] = new
    return json.dumps(value).encode()


def mutants(data):
    """COUNT files: bits flipped, cut, spliced, values of the header replaced, checksums repaired or not."""
    rng = np.random.default_rng(20)
    header, sections = split(data)
    for number in range(COUNT):
        kind = number % 8
        if kind == 0:  # flipped bytes anywhere
            bad = bytearray(data)
            for place in rng.integers(0, len(bad), rng.integers(1, 5)):
                bad[place] ^= 1 << rng.integers(8)
            yield bytes(bad)
        elif kind == 1:  # cut, or longer
            yield data[: rng.integers(0, len(data))] if rng.random() < 0.8 else data + rng.bytes(rng.integers(1, 100))
        elif kind == 2:  # one part of the file over another
            bad = bytearray(data)
            a, b, n = rng.integers(0, len(bad)), rng.integers(0, len(bad)), rng.integers(1, 200)
            bad[a : a + n] = bad[b : b + n]
            yield bytes(bad)
        elif kind in (3, 4):  # a section whose checksum is right and whose content is not
            new = [bytearray(s) for s in sections]
            target = new[rng.integers(len(new))]
            for place in rng.integers(0, len(target), rng.integers(1, 6)):
                target[place] = rng.integers(256)
            if rng.random() < 0.3:
                del target[rng.integers(len(target)) :]
            yield repaired(header, [bytes(s) for s in new])
        else:  # a header whose checksum is right and whose content is not
            bad = header
            for _ in range(rng.integers(1, 4)):
                bad = changed(bad, rng)
            yield join(bad, sections)


def test_mutated_truncated_and_spliced_files(data):
    """A FileError, or (where the mutation happens to be harmless) arrays; quickly, in little memory."""
    refused = 0
    tracemalloc.start()
    try:
        for bad in mutants(data):
            tracemalloc.reset_peak()
            start = time.perf_counter()
            refused += refuses(_compiled, bad)
            assert time.perf_counter() - start < 5
            assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert refused > 0.8 * COUNT


def test_numpy_reader_on_mutated_files(data):
    """Every fifth of them, since it is slow on files of many planes."""
    for number, bad in enumerate(mutants(data)):
        if number % 5 == 0:
            start = time.perf_counter()
            refuses(reader.loads, bad)
            assert time.perf_counter() - start < 30


def refuses(read, bad):
    try:
        read(bad)
    except FileError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 400
        return True
    return False


def _compiled(data):
    from transquant import bitstream
    from transquant.container import read_container
    from transquant.entropy.lanes import decode_planes

    container = read_container(data, None)
    return bitstream.values(container, bitstream.decode(container, lambda d, s, n: decode_planes(d, s, n)[0]))


def test_both_backends_agree_on_bad_files(data):
    for number, bad in enumerate(mutants(data)):
        if number % 8 not in (3, 4) or number % 3:
            continue
        results = []
        for read in (_compiled, reader.loads):
            try:
                results.append({k: v.tobytes() for k, v in read(bad).items()})
            except FileError as error:
                results.append(type(error))
        assert results[0] == results[1]


def bomb(data, **entry):
    header, sections = split(data)
    value = json.loads(header)
    value["tensors"][0].update(entry)
    for key in set("xy") - set(entry):  # transforms bound their bands before anything else
        value["tensors"][0].pop(key, None)
    return join(json.dumps(value).encode(), sections)


def test_declared_sizes_are_checked_before_memory_is_taken(data):
    tracemalloc.start()
    try:
        for shape in ([1 << 20, 1 << 20], [(1 << 31) - 1] * 8, [1 << 14, 3, 64, 64]):
            with pytest.raises(LimitExceeded, match=r"Limits\("):
                reader.loads(bomb(data, s=shape))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_inflation_stops_at_the_declared_length(data):
    header, sections = split(data)
    zeros = b" " * (15 << 20)
    squeeze = zlib.compressobj(9, wbits=-15)
    packed = squeeze.compress(header + zeros) + squeeze.flush()
    lengths = struct.pack("<II", len(header), len(packed))  # says less than it inflates to
    crc = zlib.crc32(packed, zlib.crc32(b"\x01\x00" + lengths))
    with pytest.raises(FileError):
        reader.loads(b"\x93TQ\n\x01\x00" + lengths + struct.pack("<I", crc) + packed + b"".join(sections))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"step": NaN}',
        b"[" * 2000,
        b'{"step":[2048,0],"step":[2048,0]}',
        b'{"step":' + b"9" * 5000 + b"}",
        b"\xff\xfe{}",
    ],
)
def test_headers_that_are_no_headers(text):
    with pytest.raises(FileError):
        reader.loads(join(text, []))


def test_newer_files_say_so(data):
    header, sections = split(data)
    newer = bytearray(data)
    newer[4] = 2
    value = json.loads(header)
    cases = [bytes(newer), join(json.dumps({**value, "features": ["trellis"]}).encode(), sections)]
    for key, new in (("z", "t8"), ("x", "klt"), ("k", "n")):
        cases.append(bomb(data, **{key: new}))
    for bad in cases:
        with pytest.raises(tq.errors.UnsupportedVersion, match="newer version"):
            reader.loads(bad)


KILLED = """
import sys, os, signal, threading, torch
sys.path.insert(0, {tests!r})
from conftest import make_net
import transquant.cli as cli
import transquant.container.file as file
real = os.replace
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = die   # the last moment before the file would appear
import transquant as tq
tq.compress(make_net(), None, size=3000).save({path!r})
"""


def test_killed_before_the_rename_leaves_no_output(tmp_path):
    from pathlib import Path

    path = tmp_path / "net.tq"
    code = KILLED.format(tests=str(Path(__file__).parent), path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    assert not path.exists()
