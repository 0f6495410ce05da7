"""Whole files by property: any entries of any shapes, dtypes and symbols come back from both decoders as they went in."""

from __future__ import annotations

from math import prod

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz_target import sections
from transquant import bitstream
from transquant.container import pack_raw, read_container, unpack_raw, write_container
from transquant.container.dtypes import CODED_DTYPES, DTYPES
from transquant.entropy import lanes, portable, tables
from transquant.records import AliasEntry, BatchNormEntry, CodedBatchNorm, CodedEntry, CodedTensor, Plane, RawEntry

SIDES = st.sampled_from([0, 1, 1, 2, 3, 5])
SHAPES = st.lists(SIDES, max_size=5).map(tuple)
# what symbols are drawn from: constants, few values, the whole alphabet, its ends alone
ALPHABETS = st.sampled_from(
    [[0], [1], [-1], [0, 1], [-7, 7], list(range(-20, 21)), [17, 18, 19], [tables.MAX_SYMBOL], [-tables.MAX_SYMBOL, tables.MAX_SYMBOL],
     [0, tables.MAX_SYMBOL], [0, 0, 0, 0, 0, 0, 0, -(1 << 19)]]
)  # fmt: skip
CODERS = st.sampled_from(["s", "m", "t", "l"])
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def entries(draw):
    """(entry, what it holds): coded tensors of all dtypes and step groups, BatchNorms, exact tensors."""
    name = f"{draw(st.integers(0, 10**9))}.ü"
    rng = np.random.default_rng(draw(SEEDS))
    kind = draw(st.sampled_from("cccbr"))
    if kind == "r":
        entry = RawEntry(name, draw(SHAPES), draw(st.sampled_from(sorted(DTYPES))))
        size = prod(entry.shape) * DTYPES[entry.dtype].size
        return entry, bytes(size) if draw(st.booleans()) else rng.bytes(size)
    alphabet = np.array(draw(ALPHABETS), np.int32)
    dtype, qp = draw(st.sampled_from(CODED_DTYPES)), draw(st.integers(-400, -300))  # small, so that nothing overflows
    if kind == "b":
        channels = draw(SIDES)
        norm = BatchNormEntry(
            name, channels, dtype, (qp, -400), draw(st.floats(0, 0.999)), draw(st.none() | st.integers(0, 2**63 - 1))
        )
        return norm, CodedBatchNorm(norm, rng.choice(alphabet, channels), rng.choice(alphabet, channels))
    shape = draw(SHAPES)
    groups = draw(st.sampled_from(["", "r", "c", "rc"])) if len(shape) > 1 else ""
    offsets = draw(st.integers(-31, 31)), draw(st.integers(-31, 31))
    state_bits = draw(st.sampled_from([0, 2, 3, 4, 5, 6])) if len(shape) > 1 else 0
    coded = CodedEntry(name, shape, dtype, qp, offsets, groups, coding="t" if state_bits else "u", state_bits=state_bits)
    exponents = [rng.integers(-64, 65, n).astype(np.int32) for n in (coded.rows, coded.columns // max(coded.taps, 1))]
    rows, columns = (e if letter in groups else None for e, letter in zip(exponents, "rc", strict=True))
    return coded, CodedTensor(coded, rng.choice(alphabet, (coded.rows, coded.columns)), rows, columns)


def decoders():
    return lambda *job: lanes.decode_planes(*job)[0], portable.decode_planes


@settings(max_examples=60, deadline=None)
@given(st.lists(entries(), min_size=1, max_size=4, unique_by=lambda e: e[0].name), CODERS)
def test_whole_files(given_entries, coder):
    all_entries = [e for e, _ in given_entries]
    tensors = {e.name: h for e, h in given_entries if not isinstance(e, RawEntry)}
    raw = {e.name: h for e, h in given_entries if isinstance(e, RawEntry)}
    first = all_entries[0]
    target = first.key("bias") if isinstance(first, BatchNormEntry) else first.name
    aliases = [AliasEntry("one", target), AliasEntry("two", "one")]
    parts = [(e, tensors.get(e.name)) for e in (*all_entries, *aliases)]
    file = bitstream.encode((2048, -60), parts, raw, lambda jobs: [lanes.encode_planes(*job) for job in jobs], coder)
    container = read_container(file.data)
    assert list(container.entries) == [*all_entries, *aliases]
    results = []
    for decode in decoders():
        decoded = bitstream.decode(container, sections(decode))
        for name, held in tensors.items():
            fields = ("scale", "shift") if isinstance(held, CodedBatchNorm) else ("symbols", "row_exponents", "column_exponents")
            for field in fields:
                np.testing.assert_array_equal(getattr(decoded[name], field), getattr(held, field))
        results.append(bitstream.values(container, decoded))
    assert list(results[0]) == list(results[1])
    for key, array in results[0].items():
        assert array.tobytes() == results[1][key].tobytes()
    for entry in all_entries:
        if not isinstance(entry, BatchNormEntry):
            assert results[0][entry.name].shape == entry.shape
    for name, data in raw.items():
        found = results[0][name]
        entry = next(e for e in all_entries if e.name == name)
        if entry.dtype == "bool":
            assert found.tobytes() == bytes(b != 0 for b in data)
        elif entry.dtype == "bfloat16":
            assert (found.view(np.uint32) >> 16).astype("<u2").tobytes() == data
        else:
            assert found.tobytes() == data
    assert results[0]["two"].tobytes() == results[0][target].tobytes()
    assert write_container(container) == file.data


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12), st.integers(0, 2), ALPHABETS, SEEDS), max_size=4),
    st.sampled_from([1, 2, 32, 64, 1024]),
    CODERS,
)
def test_planes_of_any_alphabet_in_any_lanes(given_planes, num_lanes, coder):
    planes = []
    for rows, columns, kind, alphabet, seed in given_planes:
        planes.append(
            Plane(
                np.random.default_rng(seed).choice(np.array(alphabet, np.int32), (rows, columns)),
                kind,
                1,
                1,
                seed % 5 and seed % 5 + 2,
            )
        )
    data, _ = lanes.encode_planes(planes, num_lanes, coder)
    for decode in decoders():
        for plane, found in zip(
            planes, decode(data, [(*p.symbols.shape, p.kind, 1, 1, p.state_bits) for p in planes], num_lanes, coder), strict=True
        ):
            np.testing.assert_array_equal(plane.symbols, found)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=50), max_size=6))
def test_raw_sections(pieces):
    assert [bytes(p) for p in unpack_raw(pack_raw(pieces), [len(p) for p in pieces])] == pieces
