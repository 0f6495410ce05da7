"""The published coders of feature maps: exact inverses on integers, real rates, what damage does, and what the papers say."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transquant.errors import CorruptFile, InputError
from transquant.features import dct_masks, masks, pca
from transquant.features.checks import LEAST_STEP
from transquant.features.dct_masks import DctMaskCoder, DctMaskOptions, fit_dct_masks
from transquant.features.pca import PcaCoder, PcaOptions, bits_of, fit_pca, scalar_of
from transquant.features.records import Point, Sensitivity

PCA = [PcaOptions(t, tables=k) for t in ("none", "pca", "pca-q", "pca-t") for k in ("layer", "component")]
DCT = [
    DctMaskOptions(n, v, o)
    for n, v, o in [(8, "bytes", "given"), (4, "huffman", "clustered"), (16, "huffman", "given"), (32, "bytes", "clustered")]
]
every_option = pytest.mark.parametrize("options", [*PCA, *DCT], ids=str)


def relu(channels):
    return Point("block#0", "relu", 1, channels, 0.0, None)


def gelu(channels):
    return Point("block#0", "gelu", 1, channels)


def fit(options, samples, point, c):
    square = np.zeros((point.channels, point.channels))
    none = Sensitivity(square, np.zeros((point.channels, 5, 5)), square[0], square)
    c = c if isinstance(options, PcaOptions) else 255 * c  # both in parts of the range
    return (fit_pca if isinstance(options, PcaOptions) else fit_dct_masks)(options)(samples, point, none, c)


def maps(rng, samples, channels, height, width, rank=3):
    """Maps whose channels depend on each other, of very different variance, smooth over pixels."""
    mix = rng.normal(size=(channels, min(rank, channels))) * np.exp(rng.normal(size=(channels, 1)))
    x = np.einsum("cr,nrhw->nchw", mix, rng.normal(size=(samples, mix.shape[1], height, width)))
    return (x + 0.1 * rng.normal(size=x.shape) + rng.normal(size=(channels, 1, 1))).astype(np.float32)


def again(coder):
    """The coder that its own state makes, by way of JSON."""
    text, arrays = coder.state()
    assert all(isinstance(a, np.ndarray) for a in arrays.values())
    return (pca if isinstance(coder, PcaCoder) else dct_masks).from_state(json.loads(json.dumps(text)), arrays)


# both coders


@every_option
@pytest.mark.parametrize("point", [relu, gelu])
def test_integers_are_coded_exactly_at_every_shape(rng, options, point):
    for channels, height, width in [(1, 1, 1), (13, 1, 1), (13, 5, 3), (32, 1, 9), (6, 7, 1)]:
        samples = maps(rng, 4, channels, height, width)
        for c in (0.3, 0.02, 0.001):
            coder = fit(options, samples, point(channels), c)
            other = again(coder)
            assert coder.before == (isinstance(options, PcaOptions) and point is relu) == other.before
            for h, w in [(height, width), (1, 1), (2, 3), (9, 4)]:  # whatever it was fitted to
                values = 2 * maps(rng, 1, channels, h, w)[0]  # and beyond the range
                values = values if coder.before or not point(channels).clips else np.maximum(values, 0)
                symbols = coder.quantize(values)
                assert symbols.dtype == np.int32
                assert symbols.shape[1:] == (h, w)
                data = coder.encode(symbols)
                np.testing.assert_array_equal(coder.decode(data, h, w), symbols)
                assert data == other.encode(other.quantize(values))
                back = coder.dequantize(symbols)
                assert back.shape == values.shape
                assert back.dtype == np.float32
                np.testing.assert_array_equal(other.dequantize(symbols), back)
                assert other.ideal_bits(symbols) == coder.ideal_bits(symbols)
            assert (coder.kind, coder.mode) == (other.kind, other.mode)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([*PCA, *DCT]),
    st.integers(1, 20),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([0.2, 0.01]),
)
def test_any_symbols_in_range_come_back(seed, options, channels, height, width, c):
    rng = np.random.default_rng(seed)
    coder = fit(options, maps(rng, 2, channels, 4, 4), relu(channels), c)
    planes = len(coder.quantize(np.zeros((channels, 1, 1), np.float32)))
    if isinstance(coder, PcaCoder):
        symbols = rng.integers(0, coder.frequencies.shape[1], (planes, height, width))
    else:
        symbols = rng.integers(-127 if coder.dct else 0, 128 if coder.dct else 256, (planes, height, width))
        symbols *= rng.random(symbols.shape) < 0.5
        symbols[coder._coefficients :] = rng.integers(0, 2, (planes - coder._coefficients, height, width))
    symbols = symbols.astype(np.int32)
    np.testing.assert_array_equal(coder.decode(coder.encode(symbols), height, width), symbols)
    assert coder.dequantize(symbols).shape == (channels, height, width)


@every_option
def test_damaged_payloads_are_refused_or_are_maps(rng, options):
    samples = np.maximum(maps(rng, 4, 12, 8, 8), 0) if isinstance(options, DctMaskOptions) else maps(rng, 4, 12, 8, 8)
    coder = fit(options, samples, relu(12), 0.03)
    symbols = coder.quantize(samples[0])
    data = coder.encode(symbols)
    for cut in range(0, len(data), 7):
        with pytest.raises(CorruptFile):
            coder.decode(data[:cut], 8, 8)
    for more in (b"\0", b"\xff", bytes(9)):
        with pytest.raises(CorruptFile):
            coder.decode(data + more, 8, 8)
    for height, width in [(8, 9), (7, 8), (1 << 20, 1 << 20)]:
        with pytest.raises(CorruptFile):
            coder.decode(data, height, width)
    refused = 0
    for bit in range(0, 8 * len(data), 5):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        try:
            other = coder.decode(bytes(broken), 8, 8)
        except CorruptFile:
            refused += 1
            continue
        assert other.shape == symbols.shape
        assert not np.array_equal(other, symbols)
        assert coder.encode(other) == bytes(broken)  # every payload that is taken is the only one of its symbols
        assert np.isfinite(coder.dequantize(other)).all()
    assert refused or coder.kind == "pca"  # Huffman codes fall into step again


@every_option
def test_payloads_are_as_large_as_the_model_says(rng, options):
    samples = maps(rng, 32, 24, 16, 16)
    sizes = []
    for c in (0.1, 0.03, 0.01):
        coder = fit(options, samples[:16], relu(24), c)
        x = samples[16:] if coder.before else np.maximum(samples[16:], 0)
        symbols = [coder.quantize(s) for s in x]
        real = 8 * sum(len(coder.encode(q)) for q in symbols)
        ideal = sum(coder.ideal_bits(q) for q in symbols)
        coded = sum(q.size for q in symbols)
        assert ideal <= real < ideal + coded + 8 * len(symbols)  # at most a bit a symbol
        if coder.kind == "dct-masks" and options.values == "bytes":
            assert real < ideal + 8 * len(symbols)
        errors = [float(np.square(coder.dequantize(q) - s).mean()) for q, s in zip(symbols, x, strict=True)]
        sizes.append((real, np.mean(errors)))
    assert sizes[0][0] < sizes[1][0] < sizes[2][0]
    assert sizes[0][1] > sizes[1][1] > sizes[2][1] or getattr(options, "transform", "") == "pca-t"


@every_option
def test_values_that_cannot_be_coded_are_said(rng, options):
    samples = maps(rng, 2, 6, 4, 4)
    coder = fit(options, samples, relu(6), 0.05)
    for value, word in ((np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite"), (2e30, "too large")):
        broken = samples.copy()
        broken[0, 3, 1, 2] = value
        with pytest.raises(InputError, match=rf"'block#0' has {word}"):
            coder.quantize(broken[0])
        with pytest.raises(InputError, match=word):
            fit(options, broken, relu(6), 0.05)
    with pytest.raises(InputError, match="shape 4 x 4 x 4, expected are 6 channels"):
        coder.quantize(samples[0, :4])
    with pytest.raises(InputError, match="above 0"):
        fit(options, samples, relu(6), 0.0)
    with pytest.raises(InputError, match="expected are samples x 6"):
        fit(options, samples[:0], relu(6), 0.1)


@every_option
@pytest.mark.parametrize("value", [0.0, 3.5, -2.0, 1e-38])
def test_maps_of_one_value_come_back(options, value):
    samples = np.full((2, 5, 3, 3), value, np.float32)
    coder = fit(options, samples, relu(5), 0.1)
    x = samples[0] if coder.before else np.maximum(samples[0], 0)
    symbols = coder.quantize(x)
    data = coder.encode(symbols)
    np.testing.assert_array_equal(coder.decode(data, 3, 3), symbols)
    assert np.abs(coder.dequantize(symbols) - x).max() <= 0.06 * abs(value) + LEAST_STEP


@every_option
def test_damaged_states_are_refused(rng, options):
    coder = fit(options, maps(rng, 4, 8, 8, 8), relu(8), 0.03)
    module = pca if isinstance(coder, PcaCoder) else dct_masks
    text, arrays = coder.state()
    required = set(arrays) - {"order", "classes"}
    for name in arrays:
        changes = [arrays[name].astype(np.int8), arrays[name][:-1], arrays[name][None]]
        for changed in changes + [None] * (name in required):
            with pytest.raises(CorruptFile):
                module.from_state(text, {**arrays, name: changed})
    for name in set(text) - {"point", "low", "high"}:
        for changed in (None, "x", -1, [1], float("nan")):
            with pytest.raises(CorruptFile):
                module.from_state({**text, name: changed}, arrays)


@every_option
@pytest.mark.parametrize(("size", "c"), [(1e30, 1e-3), (1e30, 1e299), (1e-36, 1e-3), (1.0, 1e299), (1.0, 1e-300)])
def test_the_largest_and_smallest_values_and_scalars(rng, options, size, c):
    samples = maps(rng, 4, 9, 5, 5)
    samples = (samples / np.abs(samples).max() * size).astype(np.float32)
    coder = again(fit(options, samples, relu(9), c))
    x = samples[0] if coder.before else np.maximum(samples[0], 0)
    symbols = coder.quantize(x)
    np.testing.assert_array_equal(coder.decode(coder.encode(symbols), 5, 5), symbols)
    assert np.isfinite(coder.dequantize(symbols)).all()
    if c == 1e299:
        assert np.all(symbols == 0)


# feature map transform coding


def test_the_scalar_is_the_step_in_parts_of_the_range(rng):
    samples = maps(rng, 8, 10, 6, 6)
    for b in (2.0, 3.5, 5.0, 8.0):
        assert bits_of(scalar_of(b)) == pytest.approx(b)
        coder = fit(PcaOptions("none"), samples, relu(10), scalar_of(b))
        centred = samples - samples.mean((0, 2, 3), keepdims=True)
        assert coder.step == pytest.approx((centred.max() - centred.min()) / (2**b - 2), rel=1e-4)
        assert coder.frequencies.shape[1] == round(2**b - 2) + 1
        symbols = np.concatenate([coder.quantize(x) for x in samples])
        assert symbols.min() == 0
        assert symbols.max() == coder.frequencies.shape[1] - 1
    assert fit(PcaOptions(), samples, relu(10), 1e-12).frequencies.shape[1] == 2**14 + 1  # as fine as it gets


@pytest.mark.parametrize("options", PCA, ids=str)
def test_what_is_decoded_has_the_mean_of_the_samples(rng, options):
    samples = maps(rng, 16, 10, 8, 8)
    coder = fit(options, samples, relu(10), scalar_of(2.5))
    back = np.stack([coder.dequantize(coder.quantize(x)) for x in samples])
    np.testing.assert_allclose(back.mean((0, 2, 3)), samples.mean((0, 2, 3)), atol=1e-4)


def test_components_are_uncorrelated_in_order_of_variance_and_fewest_of_them_hold_the_share(rng):
    samples = maps(rng, 16, 12, 8, 8, rank=2)
    coder = fit(PcaOptions(), samples, relu(12), 1e-4)
    np.testing.assert_allclose(coder.basis.T @ coder.basis, np.eye(12), atol=1e-5)
    x = samples.transpose(1, 0, 2, 3).reshape(12, -1).astype(np.float64)
    covariance = coder.basis.T @ np.cov(x) @ coder.basis
    variances = np.diag(covariance)
    assert np.all(np.diff(variances) <= 1e-9)
    assert np.abs(covariance - np.diag(variances)).max() < 1e-5 * variances[0]
    truncated = fit(PcaOptions("pca-t", share=0.95), samples, relu(12), 1e-4)
    kept = truncated.basis.shape[1]
    share = np.cumsum(variances) / variances.sum()
    assert share[kept - 1] >= 0.95 > (share[kept - 2] if kept > 1 else 0)
    assert len(truncated.quantize(samples[0])) == kept < 12
    error = np.square(np.stack([truncated.dequantize(truncated.quantize(x)) for x in samples]) - samples).sum()
    assert error == pytest.approx(variances[kept:].sum() * samples[:, 0].size, rel=0.01)
    assert fit(PcaOptions("pca-t", share=1.0), samples, relu(12), 0.1).basis.shape[1] == 12


def test_a_quantized_basis_is_stored_in_bytes_and_near(rng):
    samples = maps(rng, 8, 24, 6, 6)
    coder = fit(PcaOptions("pca-q"), samples, relu(24), 0.01)
    _, arrays = coder.state()
    assert arrays["indices"].dtype == np.uint8
    assert "basis" not in arrays
    assert len(np.unique(coder.basis)) <= 256
    exact = fit(PcaOptions("pca"), samples, relu(24), 0.01).basis
    assert np.abs(coder.basis - exact).max() < 0.02


def test_pca_and_tables_of_components_save_bits_where_channels_depend_on_each_other(rng):
    samples = maps(rng, 64, 24, 16, 16)
    rates = {}
    for options in (PcaOptions("none"), PcaOptions("pca"), PcaOptions("pca", tables="component")):
        best = {}
        for b in np.arange(2.5, 9, 0.5):
            coder = fit(options, samples[:48], relu(24), scalar_of(b))
            symbols = [coder.quantize(x) for x in samples[48:]]
            error = np.mean([np.square(coder.dequantize(q) - x).mean() for q, x in zip(symbols, samples[48:], strict=True)])
            best[10 * np.log10(error)] = 8 * np.mean([len(coder.encode(q)) for q in symbols]) / samples[0].size
        decibels = sorted(best)
        rates[options] = np.interp(10 * np.log10(0.01), decibels, [best[d] for d in decibels])
    none, with_pca, by_component = rates.values()
    assert with_pca < 0.9 * none
    assert by_component < with_pca


# channel DCT with masks


@pytest.mark.parametrize(("point", "largest"), [(relu, 255), (gelu, 127)])
def test_a_scalar_of_one_is_eight_bits(rng, point, largest):
    samples = maps(rng, 4, 6, 5, 5)
    values = np.maximum(samples, 0) if point is relu else samples
    for c in (0.1, 1, 4):
        coder = fit(DctMaskOptions(), samples, point(6), c / 255)
        assert coder.mode == "S"
        assert np.abs([coder.quantize(x) for x in values]).max() == np.rint(largest / max(c, 1))
        back = np.stack([coder.dequantize(coder.quantize(x)) for x in values])
        assert np.abs(back - values).max() <= coder.step * 0.501


def test_bytes_of_masks_and_values_add_up(rng):
    samples = np.maximum(maps(rng, 8, 20, 8, 8), 0)
    coder = DctMaskCoder("p", 20, False, False, False, 8, float(samples.max()) / 255, 0.0, None)
    symbols = coder.quantize(samples[0])
    assert len(coder.encode(symbols)) == 20 * 64 // 8 + np.count_nonzero(symbols)
    dense = DctMaskCoder("p", 20, True, True, False, 8, 0.1, 0.0, None)
    symbols = dense.quantize(samples[0])
    assert symbols.shape == (24 + 20, 8, 8)  # coefficients of blocks that are filled up, zeros of channels
    assert len(dense.encode(symbols)) == 44 * 64 // 8 + np.count_nonzero(symbols[:24])


def test_exact_zeros_come_back_and_nothing_beyond_the_clip(rng):
    samples = np.clip(maps(rng, 4, 16, 8, 8), 0, 6)
    for zero_mask in (False, True):
        coder = DctMaskCoder("p", 16, True, zero_mask, False, 8, 0.5, 0.0, 6.0)
        back = np.stack([coder.dequantize(coder.quantize(x)) for x in samples])
        assert back.min() >= 0
        assert back.max() <= 6
        assert np.all(back[samples == 0] == 0) == zero_mask


def test_the_transform_is_the_orthonormal_dct(rng):
    for block in (4, 8, 16, 32):
        matrix = dct_masks._dct(block).astype(np.float64)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(block), atol=1e-6)
        np.testing.assert_allclose(matrix[0], block**-0.5, rtol=1e-6)
        np.testing.assert_allclose(
            matrix[1] / matrix[1, 0], np.cos(np.pi * (np.arange(block) + 0.5) / block) / np.cos(np.pi / 2 / block), atol=1e-5
        )


def test_layers_get_the_mode_that_costs_them_least(rng):
    smooth = (
        5 + np.cos(np.linspace(0, 1, 16))[:, None, None] * rng.normal(1, 0.5, (8, 1, 6, 6)) + 0.01 * rng.normal(size=(8, 16, 6, 6))
    )
    sparse = rng.laplace(size=(8, 16, 6, 6)) * (rng.random((8, 16, 6, 6)) < 0.15)
    half = np.where(rng.random((8, 1, 6, 6)) < 0.3, smooth, 0)  # whole pixels are 0: the mask of zeros is for nothing
    for values, modes in ((smooth, {"T"}), (np.abs(sparse), {"S"}), (half, {"T"})):
        for kind in ("bytes", "huffman"):
            coder = fit(DctMaskOptions(values=kind), values.astype(np.float32), relu(16), 0.02)
            assert coder.mode in modes, kind
    ragged = np.where(rng.random(smooth.shape) < 0.5, smooth, 0).astype(np.float32)
    assert fit(DctMaskOptions(), ragged, relu(16), 0.02).mode == "S"
    assert fit(DctMaskOptions(), smooth.astype(np.float32) - 5, gelu(16), 0.02).mode == "T"


def test_an_order_by_similarity_puts_like_channels_side_by_side(rng):
    groups = rng.normal(size=(6, 2, 5, 5))
    scattered = rng.permutation(np.repeat([0, 1], 8))
    samples = (groups[:, scattered] + 0.05 * rng.normal(size=(6, 16, 5, 5))).astype(np.float32)
    coder = fit(DctMaskOptions(order="clustered"), samples, gelu(16), 0.02)
    assert sorted(coder.order) == list(range(16))
    assert len(set(scattered[coder.order[:8]])) == 1
    assert coder.mode == "T"
    given_order = fit(DctMaskOptions(), samples, gelu(16), 0.02)
    assert coder.ideal_bits(coder.quantize(samples[0])) < 0.8 * given_order.ideal_bits(given_order.quantize(samples[0]))


def test_packing_compiled_and_plain_are_the_same(rng):
    for signed, low in ((True, -127), (False, 0)):
        symbols = (rng.integers(low, 128, 203) * (rng.random(203) < 0.6)).astype(np.int32)
        symbols[150:] = symbols[150:] != 0
        results = []
        for pack, population, unpack in (
            (masks.pack, masks.population, masks.unpack),
            (masks.pack.py_func, masks.population.py_func, masks.unpack.py_func),
        ):
            bits, indices, back = np.zeros(26, np.uint8), np.zeros(203, np.int32), np.empty(203, np.int32)
            count = pack(symbols, 150, signed, 127 if signed else 255, bits, indices)
            assert count == population(bits, 150) == np.count_nonzero(symbols[:150])
            unpack(bits, indices[:count], 150, signed, back)
            np.testing.assert_array_equal(back, symbols)
            results.append((bits.tobytes(), indices.tobytes()))
        assert results[0] == results[1]


@pytest.mark.parametrize(("plane", "value"), [(0, 128), (0, -128), (16, 2), (16, -1)])
def test_symbols_out_of_range_are_said(plane, value):
    coder = DctMaskCoder("p", 16, True, True, False, 8, 0.1, 0.0, None)
    symbols = np.zeros((32, 2, 2), np.int32)
    symbols[plane, 1, 1] = value
    with pytest.raises(InputError, match="out of range"):
        coder.encode(symbols)


@pytest.mark.parametrize("wrong", [
    lambda: PcaOptions("klt"), lambda: PcaOptions(share=0.0), lambda: PcaOptions(share=1.5), lambda: PcaOptions(tables="both"),
    lambda: DctMaskOptions(block=7), lambda: DctMaskOptions(values="zip"), lambda: DctMaskOptions(order="best"),
])  # fmt: skip
def test_options_that_are_not_known_are_said(wrong):
    with pytest.raises(InputError, match="allowed are"):
        wrong()
