"""Transforms: layouts, bases, exact synthesis, the metric in the coefficient domain, coding gains."""

from __future__ import annotations

from fractions import Fraction
from math import log2

import numpy as np
import pytest

from transquant.errors import CorruptFile
from transquant.quantizers.feedback import Rounding, quantize_feedback
from transquant.quantizers.metric import factor, quadratic_form
from transquant.records import CodedEntry
from transquant.transforms.exact import dct_basis, dct_matrix, synthesize
from transquant.transforms.fit import coding_gain_bits, elt, klt
from transquant.transforms.frame import Frame, band_cost, closed_frame, dct_frame, open_frame
from transquant.transforms.layout import Layout

ROWS, CHANNELS, TAPS = 6, 4, 9
AXES = {"r": ROWS, "c": CHANNELS, "k": TAPS, "j": CHANNELS * TAPS}


def spd(rng, side, condition=50.0):
    basis, _ = np.linalg.qr(rng.normal(size=(side, side)))
    return (basis * np.geomspace(1, condition, side)) @ basis.T


def entropy_bits(symbols):
    _, counts = np.unique(symbols, return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())


@pytest.mark.parametrize("axis", AXES)
def test_layout_is_the_definition(rng, axis):
    layout, r = Layout(axis, ROWS, CHANNELS, TAPS), AXES[axis]
    weight = rng.normal(size=(ROWS, CHANNELS * TAPS))
    x, w = layout.bands(weight), weight.reshape(ROWS, CHANNELS, TAPS)
    expected = {
        "r": lambda b, rest: w[b].reshape(-1)[rest],
        "c": lambda b, rest: w[rest // TAPS, b, rest % TAPS],
        "k": lambda b, rest: w[rest // CHANNELS, rest % CHANNELS, b],
        "j": lambda b, rest: weight[rest, b],
    }[axis]
    assert x.shape == (r, ROWS * CHANNELS * TAPS // r)
    assert all(x[b, m] == expected(b, m) for b in range(r) for m in range(x.shape[1]))
    np.testing.assert_array_equal(layout.weight(x), weight)
    coded = layout.coded(x)
    assert coded.shape == weight.shape
    np.testing.assert_array_equal(layout.coded_bands(coded), x)
    marks = layout.coded_bands(np.broadcast_to(layout.per_band(np.arange(r)), weight.shape))
    np.testing.assert_array_equal(marks, np.broadcast_to(np.arange(r)[:, None], x.shape))
    if axis == "k":  # a band's columns stay together
        np.testing.assert_array_equal(coded[:, :CHANNELS], w[:, :, 0])


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("diagonal", [False, True])
def test_distortion_is_the_same_in_any_basis(rng, axis, diagonal):
    a, g = spd(rng, CHANNELS * TAPS), spd(rng, ROWS)
    layout = Layout(axis, ROWS, CHANNELS, TAPS)
    synthesis = rng.normal(size=(AXES[axis],) * 2)
    frame = Frame(layout, synthesis, np.linalg.inv(synthesis), np.zeros(AXES[axis], np.int32))
    error = rng.normal(size=(ROWS, CHANNELS * TAPS))
    np.testing.assert_allclose(frame.synthesize(frame.analyze(error)), error, atol=1e-8)
    if diagonal:
        a, g = np.diag(a), np.diag(g)
        full = frame
        np.testing.assert_allclose(frame.column_moment(a), np.diag(full.column_moment(np.diag(a))) if axis != "r" else a)
        np.testing.assert_allclose(frame.row_moment(g), np.diag(full.row_moment(np.diag(g))) if axis == "r" else g)
        return
    coded = quadratic_form(frame.analyze(error), frame.column_moment(a), frame.row_moment(g))
    assert coded == pytest.approx(quadratic_form(error, a, g), rel=1e-9)


@pytest.mark.parametrize("axis", AXES)
def test_band_cost_is_the_mean_over_the_other_axes(rng, axis):
    """With white errors over all else, tr(Eᵀ cost E) / m is the distortion of an error along the axis."""
    a, g, layout, r = spd(rng, CHANNELS * TAPS), spd(rng, ROWS), Layout(axis, ROWS, CHANNELS, TAPS), AXES[axis]
    direction = rng.normal(size=r)
    m = ROWS * CHANNELS * TAPS // r
    total = 0.0
    for k in range(m):  # E‖·‖ over independent unit errors of each position
        x = np.zeros((r, m))
        x[:, k] = direction
        total += quadratic_form(layout.weight(x), a, g)
    assert direction @ band_cost(layout, a, g) @ direction == pytest.approx(total, rel=1e-9)
    np.testing.assert_allclose(np.diag(band_cost(layout, np.diag(a), np.diag(g))), np.diag(band_cost(layout, a, g)), rtol=1e-9)


def test_elt_diagonalises_both_forms_and_attains_the_bound(rng, monkeypatch):
    monkeypatch.setattr("transquant.transforms.fit.ELT_DAMPING", 0.0)
    h, g = spd(rng, 12), spd(rng, 12, 300)
    synthesis = elt(h, g)
    analysis = np.linalg.inv(synthesis)
    energies, costs = analysis @ h @ analysis.T, synthesis.T @ g @ synthesis
    for form in (energies, costs):
        assert np.abs(form - np.diag(np.diag(form))).max() < 1e-9 * np.abs(form).max()
    np.testing.assert_allclose(np.linalg.norm(synthesis, axis=0), 1)
    assert (np.diff(np.diag(energies)) <= 1e-9).all()

    def log_product(s):
        inverse = np.linalg.inv(s)
        return np.log(np.diag(inverse @ h @ inverse.T) * np.diag(s.T @ g @ s)).sum()

    bound = np.log(np.linalg.det(h)) + np.log(np.linalg.det(g))
    assert log_product(synthesis) == pytest.approx(bound, rel=1e-9)
    assert log_product(klt(h)) > bound + 0.1
    assert log_product(np.eye(12)) > bound + 0.1
    assert all(log_product(rng.normal(size=(12, 12))) > bound for _ in range(50))
    gains = [coding_gain_bits(h, g, s) for s in (np.eye(12), klt(h), synthesis)]
    assert gains[0] == 0
    assert gains[2] == pytest.approx((log_product(np.eye(12)) - bound) / 24 / np.log(2))
    assert gains[2] > gains[1]


def test_klt_decorrelates(rng):
    h = spd(rng, 9)
    basis = klt(h)
    np.testing.assert_allclose(basis.T @ basis, np.eye(9), atol=1e-12)
    diagonal = basis.T @ h @ basis
    assert np.abs(diagonal - np.diag(np.diag(diagonal))).max() < 1e-9
    assert (np.diff(np.diag(diagonal)) < 0).all()


def test_a_constant_or_dead_band_has_a_basis(rng):
    h = np.zeros((4, 4))
    h[0, 0] = 1.0
    for basis in (klt(h), elt(h, np.zeros((4, 4))), elt(h, np.diag([1.0, 0, 0, 0])), elt(np.zeros((4, 4)), np.eye(4))):
        assert np.isfinite(basis).all()
        assert abs(np.linalg.det(basis)) > 0.01


@pytest.mark.parametrize("method", ["klt", "elt"])
def test_predicted_coding_gain_is_measured_at_high_rate(rng, method):
    """Open loop: as many symbols' bits fewer, at the same distortion, as the formula says."""
    r, m = 8, 40_000
    h, g = spd(rng, r, 100), spd(rng, r, 30)
    x = np.linalg.cholesky(h) @ rng.normal(size=(r, m))
    basis = klt(h) if method == "klt" else elt(h, g)
    rates, distortions = [], []
    for synthesis in (np.eye(r), basis):
        steps = 0.05 / np.sqrt(np.diag(synthesis.T @ g @ synthesis))
        t = np.linalg.solve(synthesis, x)
        symbols = np.rint(t / steps[:, None]).astype(int)
        error = x - synthesis @ (symbols * steps[:, None])
        rates.append(np.mean([entropy_bits(row) for row in symbols]))
        distortions.append(np.einsum("im,ij,jm->", error, g, error) / x.size)
    gain = rates[0] - rates[1] + 0.5 * log2(distortions[0] / distortions[1])
    assert gain == pytest.approx(coding_gain_bits(h, g, basis), abs=0.02)


def test_closed_loop_gains_what_the_weights_correlation_holds(rng):
    """The metric costs nothing with feedback, transform or not; a KLT saves ½ log2 of arithmetic over geometric mean of H."""
    o, channels, taps = 400, 8, 9
    h = spd(rng, taps, 200)
    layout = Layout("k", o, channels, taps)
    weight = layout.weight(np.linalg.cholesky(h) @ rng.normal(size=(taps, o * channels)))
    a, g, c = spd(rng, channels * taps, 40), spd(rng, o, 10), 0.05
    frame = closed_frame(layout, klt(h), 8)
    rates = []
    for w, moment in ((weight, a), (frame.analyze(weight), frame.column_moment(a))):
        fa, fg = factor(moment, upper=True), factor(g)
        step = c / np.sqrt(fg.diagonal[:, None] * fa.diagonal)
        symbols, _ = quantize_feedback(w, step, fg.unit[0], fa.unit[0], Rounding(0.5))
        rates.append(np.mean(np.log2((symbols * step).std(0)[None] / step)))  # Gaussian entropies, up to a constant
    eigenvalues = np.linalg.eigvalsh(h)
    gain = 0.5 * (np.mean(np.log2(np.diag(h))) - np.mean(np.log2(eigenvalues)))
    assert rates[0] - rates[1] == pytest.approx(gain, abs=0.05)


@pytest.mark.parametrize("bits", [2, 3, 6, 12])
def test_a_coarse_basis_costs_no_distortion_in_the_closed_loop(rng, bits):
    layout = Layout("k", 40, 8, 9)
    weight, a, g, c = rng.normal(size=(40, 72)), spd(rng, 72), spd(rng, 40), 0.02
    frame = closed_frame(layout, klt(layout.bands(weight) @ layout.bands(weight).T), bits)
    fa, fg = factor(frame.column_moment(a), upper=True), factor(g)
    step = c / np.sqrt(fg.diagonal[:, None] * fa.diagonal)
    coeffs = frame.analyze(weight)
    _, error = quantize_feedback(coeffs, step, fg.unit[0], fa.unit[0], Rounding(0.5))
    measured = quadratic_form(weight - frame.synthesize(coeffs - error), a, g)
    assert measured == pytest.approx(weight.size * c**2 / 12, rel=0.08)


def test_open_frame_quantizes_the_basis_and_scales_the_coefficients(rng):
    layout = Layout("c", 5, 4, 9)
    weight, synthesis = rng.normal(size=(5, 36)), np.linalg.qr(rng.normal(size=(4, 4)))[0]
    quarters = np.array([-28, -24, -30, -26], np.int32)
    frame = open_frame(layout, synthesis, np.rint(synthesis / 2.0 ** (quarters / 4)).astype(np.int32), quarters)
    rebuilt = frame.synthesize(frame.analyze(weight))
    assert 0 < np.abs(rebuilt - weight).max() < 0.1
    np.testing.assert_allclose(layout.coded_bands(frame.analyze(weight)), synthesis.T @ layout.bands(weight))
    np.testing.assert_allclose(frame.synthesis, frame.basis * frame.scales)
    without = open_frame(layout, synthesis, np.where(np.arange(4) == 2, 0, frame.basis), quarters)
    assert not layout.coded_bands(without.analyze(weight))[2].any()


@pytest.mark.parametrize("kernel", [(3,), (3, 3), (5, 7), (2, 3, 4), (16,)])
def test_integer_dct(kernel):
    basis = dct_basis(kernel)
    exact = np.ones((1, 1))
    for size in kernel:
        matrix = dct_matrix(size)
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(size), atol=1e-12)
        exact = np.kron(exact, matrix)
    assert np.abs(basis / 4096 - exact).max() <= 0.5 / 4096
    assert basis.dtype == np.int32


def test_no_entry_of_a_dct_lies_near_a_rounding_tie():
    """So every reader rounds alike, whatever its cosine."""
    for first in range(1, 17):
        for second in range(1, 17):
            scaled = 4096 * np.kron(dct_matrix(first), dct_matrix(second))
            assert np.abs(scaled - np.floor(scaled) - 0.5).min() > 1e-5


@pytest.mark.parametrize("axis", AXES)
def test_synthesis_is_exact_integer_arithmetic(rng, axis):
    entry = CodedEntry("w", (ROWS, CHANNELS, 3, 3), transform="k", axis=axis)
    r = entry.bands
    coeffs = (rng.normal(size=(ROWS, CHANNELS * TAPS)) * np.exp(rng.normal(size=(ROWS, CHANNELS * TAPS)) * 4)).astype(np.float32)
    basis = rng.integers(-(1 << 15), (1 << 15) + 1, (r, r)).astype(np.int32)
    layout = Layout.of(entry)
    t = layout.coded_bands(coeffs)
    exponent = max(int(np.frexp(np.abs(coeffs).max())[1]), -1000)
    integers = [[round(Fraction(float(v)) * Fraction(2) ** (28 - exponent)) for v in row] for row in t]
    expected = np.array(
        [
            [np.float32(float(Fraction(sum(int(basis[i, b]) * integers[b][m] for b in range(r))) * Fraction(2) ** (exponent - 28)))
             for m in range(t.shape[1])]
            for i in range(r)
        ]
    )  # fmt: skip
    np.testing.assert_array_equal(synthesize(coeffs, basis, entry), layout.weight(expected))


def test_synthesis_of_zeros_and_of_too_much():
    entry = CodedEntry("w", (2, 3, 3, 3), transform="d", axis="k")
    assert not synthesize(np.zeros((2, 27), np.float32), None, entry).any()
    huge = np.full((2, 27), 3e38, np.float32)
    with pytest.raises(CorruptFile, match="does not fit float32"):
        synthesize(huge, None, entry)


def test_dct_frame_matches_what_a_reader_synthesizes(rng):
    entry = CodedEntry("w", (ROWS, CHANNELS, 3, 3), transform="d", axis="k")
    frame = dct_frame(Layout.of(entry), (3, 3))
    weight = rng.normal(size=(ROWS, CHANNELS * TAPS))
    coded = frame.analyze(weight) * frame.layout.per_band(frame.scales)
    decoded = synthesize(coded.astype(np.float32), None, entry)
    np.testing.assert_allclose(decoded, weight, atol=1e-5)
