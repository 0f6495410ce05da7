from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transquant import codec
from transquant.entropy import lanes, lanes_for, portable, streams, tables
from transquant.entropy.tables import fold_for
from transquant.errors import CorruptFile
from transquant.records import Plane


def shapes_of(planes: list[Plane]) -> list[tuple[int, int, int, int, int, int]]:
    return [(*p.symbols.shape, p.kind, p.width, p.taps, p.state_bits) for p in planes]


def round_trip(planes: list[Plane], num_lanes: int, coder: str) -> tuple[bytes, list[float]]:
    data, bits = lanes.encode_planes(planes, num_lanes, coder)
    compiled, bits_again = lanes.decode_planes(data, shapes_of(planes), num_lanes, coder)
    plain = portable.decode_planes(data, shapes_of(planes), num_lanes, coder)
    for plane, one, two in zip(planes, compiled, plain, strict=True):
        np.testing.assert_array_equal(plane.symbols, one)
        np.testing.assert_array_equal(plane.symbols, two)
    assert bits == bits_again
    return data, bits


every_coder = pytest.mark.parametrize("coder", ["s", "m", "t", "l"])


@every_coder
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 20), columns=st.integers(0, 40), log_lanes=st.integers(0, 5), seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.1, 1.0, 5.0, 300.0, 1e5]), kind=st.integers(0, 2), taps=st.sampled_from([(1, 1), (3, 9), (2, 2), (1, 3)]),
    state_bits=st.sampled_from([0, 0, 3, 6]),
)  # fmt: skip
def test_both_decoders_give_back_what_was_encoded(coder, rows, columns, log_lanes, seed, spread, kind, taps, state_bits):
    rng = np.random.default_rng(seed)
    symbols = np.clip(np.rint(rng.laplace(0, spread, (rows, columns))), -tables.MAX_SYMBOL, tables.MAX_SYMBOL).astype(np.int32)
    planes = [Plane(symbols, kind, *taps), Plane(symbols[:1], 2), Plane(symbols, kind, *taps, state_bits)]
    round_trip(planes, 1 << log_lanes, coder)


@every_coder
@pytest.mark.parametrize("value", [0, 1, -1, 7, -7, 8, -8, 17, 18, 19, 1000, tables.MAX_SYMBOL, -tables.MAX_SYMBOL])
def test_constant_planes(coder, value):
    round_trip([Plane(np.full((5, 33), value, np.int32), 0)], 4, coder)


@every_coder
def test_mixture_of_small_and_extreme(coder):
    symbols = np.zeros((40, 50), np.int32)
    symbols[::7, ::5] = tables.MAX_SYMBOL
    symbols[3::9, 1::6] = -70_000
    round_trip([Plane(symbols, 0, 1, 1), Plane(symbols, 0, 3, 9, 3)], 16, coder)


@pytest.mark.parametrize(("coder", "loss"), [("s", 0.006), ("m", 0.008), ("t", 0.05), ("l", 0.008)])
def test_rate_is_close_to_entropy_and_information_content_close_to_bytes(rng, coder, loss):
    symbols = np.rint(rng.normal(0, 1.2, (512, 512))).astype(np.int32)
    data, bits = round_trip([Plane(symbols, 0)], 64, coder)
    _, counts = np.unique(symbols, return_counts=True)
    p = counts / counts.sum()
    entropy = -(p * np.log2(p)).sum() * symbols.size
    assert entropy < 8 * len(data) < (1 + loss) * entropy
    corrections = 1200 if coder == "l" else 0
    assert sum(bits) < 8 * len(data) < sum(bits) * 1.001 + 64 * 24 + corrections


@pytest.mark.parametrize(("coder", "share"), [("s", 0.92), ("m", 0.92), ("t", 0.96), ("l", 0.93)])
def test_contexts_find_rows_and_columns_of_different_scale(rng, coder, share):
    scale = np.exp(rng.normal(0, 1, (256, 1)) + rng.normal(0, 1, (1, 256)))
    symbols = np.rint(rng.normal(0, 1, (256, 256)) * scale).astype(np.int32)
    data, _ = round_trip([Plane(symbols, 0)], 1, coder)
    _, counts = np.unique(symbols, return_counts=True)
    p = counts / counts.sum()
    assert 8 * len(data) < share * -(p * np.log2(p)).sum() * symbols.size


@every_coder
def test_golden_bytes(coder):
    symbols = (np.arange(600, dtype=np.int32).reshape(20, 30) * 7919 % 23 - 11) // 4
    planes = [Plane(symbols[:1], 1), Plane(symbols, 0, 3, 9), Plane(symbols[3:4] * 900, 2)]
    data, _ = round_trip(planes, 8, coder)
    assert (len(data), hashlib.sha256(data).hexdigest()[:16]) == GOLDEN[coder]


GOLDEN = {
    "s": (266, "1ea90a549640aa55"),
    "m": (296, "21a93967401cc554"),
    "t": (318, "9492c429fc8f9474"),
    "l": (340, "82130cdf8bd66c51"),
}


@every_coder
def test_damage_is_found(rng, coder):
    symbols = np.rint(rng.normal(0, 2, (30, 30))).astype(np.int32)
    shapes = [(30, 30, 0, 1, 1, 0)]
    data, _ = lanes.encode_planes([Plane(symbols, 0)], 4, coder)
    for bad in (data[:-2], data + b"\0\0", data[:-1], data[:7], b"", b"\0" * len(data)):
        for decode in (lanes.decode_planes, portable.decode_planes):
            with pytest.raises(CorruptFile):
                decode(bad, shapes, 4, coder)
    found = 0
    for k in range(0, len(data), 3):
        bad = bytearray(data)
        bad[k] ^= 1 << (k % 8)
        outcomes = []
        for decode in (lanes.decode_planes, portable.decode_planes):
            try:
                decode(bytes(bad), shapes, 4, coder)
                outcomes.append("ok")
            except CorruptFile:
                outcomes.append("corrupt")
        assert outcomes[0] == outcomes[1]
        found += outcomes[0] == "corrupt"
    assert found == len(range(0, len(data), 3))  # four states of 16 known bits each


def test_the_rans_core_agrees_with_an_independent_coder():
    constriction = pytest.importorskip("constriction")
    rng = np.random.default_rng(3)
    symbols = np.rint(rng.normal(0, 1.5, 20_000)).astype(np.int32)
    model = constriction.stream.model.QuantizedGaussian(-50, 50, 0.0, 1.5)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(symbols, model)
    theirs = coder.num_bits()
    for coder in ("s", "m"):
        ours = 8 * len(lanes.encode_planes([Plane(symbols.reshape(100, 200), 0)], 1, coder)[0])
        assert ours < 1.015 * theirs  # they know the law, we learn it


@pytest.mark.parametrize(
    ("values", "largest", "rows", "magnitude", "expected"),
    [
        (100, 100, 1, 1, 1), (270_000, 36_864, 64, 1, 8), (1 << 20, 1 << 20, 1024, 1, 256), (1_000_000, 1_000_000, 1000, 0.3, 256),
        (1 << 20, 1 << 20, 1024, 4, 512), (1 << 20, 1 << 20, 1024, 40, 1024), (1 << 20, 1 << 20, 600, 40, 1024), (1 << 20, 1 << 20, 64, 4, 64),
    ],
)  # fmt: skip
def test_lanes_follow_the_size_and_the_rate(values, largest, rows, magnitude, expected):
    assert lanes_for(values, largest, rows, magnitude) == expected


@pytest.mark.parametrize(
    ("rows", "groups", "taps", "expected"),
    [
        (64, 16384, 1, 8),
        (10, 131072, 1, 64),
        (1000, 1024, 1, 1),
        (64, 1000, 9, 1),
        (100, 2999, 9, 1),
        (7, 20000, 9, 80),
        (1, 1 << 20, 1, 512),
    ],
)
def test_few_long_rows_are_folded(rows, groups, taps, expected):
    fold = fold_for(rows, groups, taps)
    assert fold == expected
    assert groups % fold == 0


def test_folded_matrices_come_back_in_their_shape():
    """Through the whole file and both readers."""
    import transquant as tq
    from transquant.container import read_container

    torch.manual_seed(0)
    layer = torch.nn.Linear(20000, 60, bias=False)
    data = tq.compress(layer, None, bits=1.5).data
    (entry,) = read_container(data).entries
    assert entry.fold == 10
    arrays = tq.reader.loads(data)["weight"]
    decoded = tq.codec.CompressedModel(data, None).state_dict()["weight"]
    assert arrays.shape == (60, 20000)
    assert arrays.tobytes() == decoded.numpy().tobytes()
    weight = layer.weight.detach()
    assert (decoded - weight).square().mean() < 0.3 * weight.square().mean()


@every_coder
def test_many_lanes_for_one_long_row_take_no_memory(coder):
    """A file chooses its lanes; what they take is bounded by the symbols all the same."""
    symbols = np.zeros((1, 1 << 22), np.int32)
    symbols[0, ::1000] = -3
    data, _ = lanes.encode_planes([Plane(symbols, 0, 1, 1, 3)], 1024, coder)
    found, _ = lanes.decode_planes(data, [(*symbols.shape, 0, 1, 1, 3)], 1024, coder)
    np.testing.assert_array_equal(found[0], symbols)


@pytest.mark.parametrize(("coder", "most"), [("m", 1.005), ("t", 1.04), ("l", 1.01)])
def test_static_tables_cost_little_and_adaptive_ones_nothing_against_decisions(coder, most):
    """Trellis planes, as weights are: the laws fit them."""
    rng = np.random.default_rng(5)
    scale = np.exp(0.5 * rng.normal(size=(256, 1)) + 0.4 * rng.normal(size=(1, 256)))
    symbols = np.floor(rng.laplace(0, 0.8, (256, 256)) * scale + 0.25).astype(np.int32)
    sizes = {k: len(lanes.encode_planes([Plane(symbols, 0, 1, 1, 3)], 8, k)[0]) for k in ("s", coder)}
    assert sizes[coder] < most * sizes["s"]


@pytest.mark.parametrize("spread", [0.2, 0.32, 0.7, 2.9])
def test_tables_that_come_with_the_tokens_fit_where_the_laws_do_not(spread):
    """One law for all entries, from half a bit to four: its levels are noise."""
    symbols = np.rint(np.random.default_rng(1).laplace(0, spread, (512, 512))).astype(np.int32)
    sizes = {k: len(lanes.encode_planes([Plane(symbols, 0)], 64, k)[0]) for k in ("m", "t", "l")}
    assert sizes["l"] < 1.005 * sizes["m"]
    assert sizes["t"] > 1.005 * sizes["l"]


@pytest.mark.parametrize("rows", [20, 0])
def test_corrections_that_are_too_large_are_refused(monkeypatch, rows):
    planes = [Plane(np.eye(20, 30, dtype=np.int32)[:rows], 0, 1, 1, state_bits) for state_bits in (0, 3)]
    monkeypatch.setattr(lanes, "corrections_for", lambda trellis, seen: np.full((21, 16), 64 if trellis else -63, np.int32))
    monkeypatch.setattr(tables, "MAX_CORRECTION", 64)
    data, _ = round_trip(planes, 8, "l")
    monkeypatch.undo()
    if rows == 0:  # no values, no tables
        assert data == np.full(8, tables.STATE_LOW, "<u4").tobytes()
        return
    for decode in (lanes.decode_planes, portable.decode_planes):
        with pytest.raises(CorruptFile, match="correction of a table is out of range, allowed is ±63"):
            decode(data, shapes_of(planes), 8, "l")


@pytest.mark.parametrize(
    ("coder", "values", "expected"),
    [
        ("s", 1 << 25, 1),
        ("m", 0, 1),
        ("m", (1 << 21) - 1, 1),
        ("m", 1 << 21, 2),
        ("t", 5 << 20, 5),
        ("t", 1 << 25, 8),
        ("l", 1 << 21, 2),
    ],
)
def test_large_sections_have_streams(coder, values, expected):
    assert streams.num_streams(coder, values) == expected


@pytest.mark.parametrize(("rows", "count"), [(0, 3), (1, 8), (7, 3), (1000, 8)])
def test_streams_take_all_rows_once(rows, count):
    parts = [streams.rows_of(k, count, rows, tables.WEIGHTS) for k in range(count)]
    assert [r for part in parts for r in part] == list(range(rows))
    assert [len(streams.rows_of(k, count, rows, 2)) for k in range(count)] == [rows] + [0] * (count - 1)


def test_streams_are_cut_as_they_were_joined():
    pieces = [b"ab", b"", b"cdefg"]
    data = streams.join(pieces)
    assert streams.cut(data, 3) == pieces
    for bad in (b"", data[:7], b"\xff" * 40, data[:8] + b"a"):
        with pytest.raises(CorruptFile):
            streams.cut(bad, 3)


@pytest.mark.parametrize("coder", ["adaptive", "static"])
def test_a_file_of_two_streams(coder):
    """Through the whole file, by one thread and by two, and by the numpy reader."""
    import transquant as tq

    torch.manual_seed(0)
    layer = torch.nn.Linear(1049, 2000)
    data = tq.compress(layer, None, step=0.001, coder=coder, effort=1, transform="identity", trellis=False).data
    arrays = tq.reader.loads(data)
    assert len(data) > codec.WORTH_THREADS
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            state = codec.CompressedModel(data, None).state_dict()
            assert {k: v.numpy().tobytes() for k, v in state.items()} == {k: v.tobytes() for k, v in arrays.items()}
    finally:
        torch.set_num_threads(threads)
