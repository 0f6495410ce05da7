"""Fixed-length codes: round trips, corrupt sections, and the allocation of depths against brute force."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transquant.allocation.depths import DepthTable
from transquant.errors import CorruptFile
from transquant.packing import group_sizes, indices, pack, tensor_bits, unpack
from transquant.quantizers.saturating import MOST_DEPTH, best_steps, quantized
from transquant.records import BandCodes, CodedEntry, CodedTensor
from transquant.transforms.layout import Layout


def random_tensor(rng, shape, axis, transform, depths=range(17)):
    entry = CodedEntry("w", shape, transform=transform, axis=axis, coding="f")
    sizes = group_sizes(entry)

    def symbols(rows, columns, depth):
        if depth <= 1:
            return (2 * rng.integers(0, 2, (rows, columns)) - 1) * depth
        return rng.integers(-(1 << (depth - 1)), 1 << (depth - 1), (rows, columns))

    values = entry.rows * entry.columns // max(entry.bands, 1)
    chosen = rng.choice(depths, len(sizes)).astype(np.int32)
    bands = np.concatenate([symbols(n, values, b) for n, b in zip(sizes, chosen, strict=True)]).astype(np.int32)
    basis = basis_depths = None
    if entry.basis_side:
        basis_depths = rng.choice(depths, len(sizes)).astype(np.int32)
        columns = [symbols(n, entry.bands, b) for n, b in zip(sizes, basis_depths, strict=True)]
        basis = np.ascontiguousarray(np.concatenate(columns).T.astype(np.int32))
    codes = BandCodes(chosen, rng.integers(-1000, 1001, len(sizes)).astype(np.int32), basis_depths)
    return CodedTensor(entry, Layout.of(entry).coded(bands), None, None, basis, codes)


SHAPES = [(5, 3), (17, 9), (4, 6, 3, 3), (1, 1), (2, 8, 5), (64, 20)]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(SHAPES), st.sampled_from("rckj"), st.sampled_from("ike"))
def test_round_trip(seed, shape, axis, transform):
    rng = np.random.default_rng(seed)
    tensors = [random_tensor(rng, shape, axis, transform), random_tensor(rng, (3, 7), "c", "i")]
    tensors[1] = CodedTensor(CodedEntry("v", (3, 7), axis="c", coding="f"), tensors[1].symbols, codes=tensors[1].codes)
    data = pack(tensors)
    decoded = unpack(data, [t.entry for t in tensors])
    for given_tensor in tensors:
        back = decoded[given_tensor.entry.name]
        np.testing.assert_array_equal(back.symbols, given_tensor.symbols)
        np.testing.assert_array_equal(back.codes.depths, given_tensor.codes.depths)
        np.testing.assert_array_equal(back.codes.indices, given_tensor.codes.indices)
        if given_tensor.basis is not None:
            np.testing.assert_array_equal(back.basis, given_tensor.basis)
    assert sum(tensor_bits(t).payload + tensor_bits(t).side for t in tensors) == 8 * len(data)
    for broken in (data[:-1], data + b"\0"):
        with pytest.raises(CorruptFile):
            unpack(broken, [t.entry for t in tensors])


def test_payload_is_depth_times_values(rng):
    tensor = random_tensor(rng, (16, 8, 3, 3), "c", "i", depths=[3])
    bits = tensor_bits(tensor)
    assert bits.payload == 3 * 16 * 8 * 9
    assert bits.side == 8 * 3 * len(group_sizes(tensor.entry))
    np.testing.assert_array_equal(np.unique(indices(tensor.entry, tensor.codes)), np.unique(tensor.codes.indices))


@pytest.mark.parametrize("change", ["depth", "index", "padding"])
def test_bad_fields(rng, change):
    tensor = random_tensor(rng, (5, 3), "c", "i", depths=[3])
    data = bytearray(pack([tensor]))
    if change == "depth":
        data[0] = 17
    elif change == "index":
        data[1:3] = b"\xff\x7f"
    else:
        data[-1] |= 1
    with pytest.raises(CorruptFile, match={"depth": "bit depth of 17", "index": "step index", "padding": "zero bits"}[change]):
        unpack(bytes(data), [tensor.entry])


def test_groups_are_the_papers(rng):
    """About eight groups a layer; fewer columns than bands make more of them (methods: A.4)."""
    for shape, axis, expected in (((64, 64, 3, 3), "c", 8), ((64, 64, 3, 3), "k", 5), ((10, 64), "c", 32), ((16, 3, 3, 3), "c", 3)):
        entry = CodedEntry("w", shape, axis=axis, coding="f")
        assert len(group_sizes(entry)) == expected, shape
        assert sum(group_sizes(entry)) == entry.bands


def test_table_finds_the_best_step(rng):
    values = rng.laplace(size=4000)
    errors, quarters = best_steps(values)
    assert (np.diff(errors) < 0).all()
    for depth in range(1, MOST_DEPTH + 1):
        trials = {q: float(np.sum((values - quantized(values, 2 ** (q / 4), depth)) ** 2)) for q in range(-60, 30)}
        assert errors[depth] == pytest.approx(min(trials.values()))
        assert trials[int(quarters[depth])] == pytest.approx(errors[depth])


def test_equal_slope_is_optimal(rng):
    """No other depths of all groups together have less distortion within as many bits."""
    groups = [rng.normal(size=n) * s for n, s in ((40, 1.0), (40, 0.3), (10, 5.0), (80, 0.05))]
    sensitivities = (1.0, 4.0, 0.5, 2.0)
    tables = [DepthTable(*best_steps(g, 5), g.size) for g in groups]
    points = [(sum(t.count * b for t, b in zip(tables, chosen, strict=True)),
               sum(h * t.errors[b] for t, h, b in zip(tables, sensitivities, chosen, strict=True)))
              for chosen in product(range(6), repeat=4)]  # fmt: skip
    for lmbda in (3.0, 0.3, 0.03, 0.003):
        chosen = [t.best(h, lmbda) for t, h in zip(tables, sensitivities, strict=True)]
        bits = sum(t.count * b for t, b in zip(tables, chosen, strict=True))
        distortion = sum(h * t.errors[b] for t, h, b in zip(tables, sensitivities, chosen, strict=True))
        assert distortion <= min(d for b, d in points if b <= bits) * (1 + 1e-12)


def test_one_bit_is_symmetric():
    np.testing.assert_array_equal(quantized(np.array([-3.0, -0.1, 0.0, 2.0]), 0.5, 1), [-0.5, -0.5, 0.5, 0.5])
    np.testing.assert_array_equal(quantized(np.array([-3.0, -0.1, 0.3, 2.0]), 0.5, 2), [-1.0, 0, 0.5, 0.5])
