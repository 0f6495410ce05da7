from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from transquant import dequantizer, grid
from transquant.allocation.search import Closest, largest_feasible, meet_size, slope_of
from transquant.allocation.steps import Grouping, matrix_steps
from transquant.entropy import lanes
from transquant.entropy.tables import expected_levels, magnitude_laws
from transquant.errors import CorruptFile
from transquant.quantizers.feedback import Paths, Rounding, quantize_feedback
from transquant.quantizers.metric import Damping, factor, noise_level, quadratic_form, regularise
from transquant.quantizers.trellis import SIZES, Trellis
from transquant.records import Plane
from transquant.trellis_code import TRELLIS_CODES


def moment(rng, side, condition=100.0):
    basis, _ = np.linalg.qr(rng.normal(size=(side, side)))
    return (basis * np.geomspace(1, condition, side)) @ basis.T


def naive_feedback(weight, step, left, right, rounding):
    rows, columns = weight.shape
    symbols, error = np.zeros((rows, columns), int), np.zeros((rows, columns))
    for j in range(columns):
        for i in range(rows - 1, -1, -1):
            u = weight[i, j] + left[i:, i] @ error[i:, : j + 1] @ right[: j + 1, j]
            size = abs(u) / step[i, j]
            q = 0 if size < rounding.dead_zone else int(size + 1 - rounding.dead_zone)
            value = 0.0 if q == 0 else q - rounding.offsets[0 if q == 1 else 1] / 64
            symbols[i, j] = q if u >= 0 else -q
            error[i, j] = weight[i, j] - np.sign(u) * value * step[i, j]
    return symbols, error


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 9), (128, 128), (140, 261), (260, 130)])
def test_blocks_equal_the_formula(rng, rows, columns):
    weight, step = rng.normal(size=(rows, columns)), rng.uniform(0.3, 1, (rows, columns))
    left, right = factor(moment(rng, rows)).unit[0], factor(moment(rng, columns), upper=True).unit[0]
    rounding = Rounding(0.6, (-6, 3))
    symbols, error = quantize_feedback(weight, step, left, right, rounding)
    expected = naive_feedback(weight, step, left, right, rounding)
    np.testing.assert_array_equal(symbols, expected[0])
    np.testing.assert_allclose(error, expected[1], atol=1e-9)


def test_distortion_is_that_of_independent_coefficients(rng):
    a, g = moment(rng, 90), moment(rng, 70)
    weight, c = 30 * rng.normal(size=(70, 90)), 0.5
    fa, fg = factor(a, upper=True), factor(g)
    step = c / np.sqrt(fg.diagonal[:, None] * fa.diagonal)
    _, error = quantize_feedback(weight, step, fg.unit[0], fa.unit[0], Rounding(0.5))
    distortion = quadratic_form(error, a, g)
    assert distortion == pytest.approx(weight.size * c**2 / 12, rel=0.05)
    mean_step = np.exp(np.log(step).mean())
    plain = weight - np.rint(weight / mean_step) * mean_step
    # arithmetic over geometric mean of eigenvalues log-uniform on 1 ... 100: 2.15 for each side
    assert distortion < 1.15 / 2.15**2 * quadratic_form(plain, a, g)


def test_one_sided_and_diagonal_factors(rng):
    weight, step = rng.normal(size=(20, 30)), np.full((20, 30), 0.5)
    right = factor(moment(rng, 30), upper=True).unit[0]
    one, _ = quantize_feedback(weight, step, None, right, Rounding())
    two, _ = quantize_feedback(weight, step, np.eye(20), right, Rounding())
    np.testing.assert_array_equal(one, two)
    plain, error = quantize_feedback(weight, step, None, None, Rounding())
    np.testing.assert_array_equal(plain, np.rint(weight / 0.5))
    np.testing.assert_allclose(error, weight - plain * 0.5)


def test_factor_of_full_block_and_diagonal_moments(rng):
    a = moment(rng, 12)
    for full in (factor(a), factor(a, upper=True)):
        np.testing.assert_allclose((full.unit[0] * full.diagonal) @ full.unit[0].T, a)
    assert not np.tril(full.unit[0], -1).any()
    blocks = np.stack([moment(rng, 4), moment(rng, 4)])
    parts = factor(blocks)
    assert len(parts.unit) == 2
    np.testing.assert_allclose((parts.unit[1] * parts.diagonal[4:]) @ parts.unit[1].T, blocks[1])
    assert factor(np.ones(5)).unit is None
    singular = np.ones((6, 6))
    assert (factor(singular).diagonal > 0).all()


def test_quadratic_form_of_the_three_kinds_of_moment(rng):
    error = rng.normal(size=(5, 8))
    a, g = np.stack([moment(rng, 4), moment(rng, 4)]), moment(rng, 5)
    full = np.zeros((8, 8))
    full[:4, :4], full[4:, 4:] = a
    expected = np.trace(g @ error @ full @ error.T)
    assert quadratic_form(error, a, g) == pytest.approx(expected)
    assert quadratic_form(error, full, g) == pytest.approx(expected)
    d, e = rng.uniform(1, 2, 8), rng.uniform(1, 2, 5)
    assert quadratic_form(error, d, e) == pytest.approx(np.trace(np.diag(e) @ error @ np.diag(d) @ error.T))


def test_noise_level_matches_the_trace(rng):
    a, g, water, variance = moment(rng, 9), moment(rng, 6), 0.3, 0.5
    mean_in, mean_out = np.trace(a) / 9, np.trace(g) / 6
    r = noise_level(Damping(noise=1.0), water, variance, mean_in, mean_out)
    trace = np.trace(np.kron(regularise(g, r), regularise(a, r)))
    assert trace == pytest.approx(np.trace(np.kron(g, a)) + water / variance * 54)


def test_dequantization_is_exact(rng):
    symbols = np.array([[0, 1, -1, 2, -2, 1 << 19, -((1 << 20) - 1)]], np.int32)
    step, offsets = (3001, -30), (5, -9)
    for qp in (-37, -2, 0, 3, 41):
        t = grid.total_index(qp, None, None, 1)
        values = grid.dequantize(symbols, step, t, offsets)
        for symbol, value in zip(symbols[0], values[0], strict=True):
            size = abs(int(symbol))
            numerator = 64 * size - (offsets[min(size, 2) - 1] if size else 0)
            exact = Fraction(int(np.sign(symbol)) * numerator * 3001 * int(grid.QUARTERS[qp % 4])) * Fraction(2) ** (
                -30 + qp // 4 - 20
            )
            assert value == np.float32(float(exact))
    with pytest.raises(CorruptFile):
        grid.dequantize(symbols, (4095, 60), grid.total_index(400, None, None, 1), offsets)


@pytest.mark.parametrize("state_bits", [0, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("fold", [1, 3])
def test_compiled_dequantization_gives_the_same_bits(rng, state_bits, fold):
    symbols = np.rint(rng.laplace(0, 2, (17, 12 * fold))).astype(np.int32)
    symbols[0, :3] = 0, (1 << 20) - 1, 1 - (1 << 20)
    rows, columns = rng.integers(-64, 65, 17).astype(np.int32), rng.integers(-64, 65, 6 * fold).astype(np.int32)
    for exponent in (-160, -40, -20):  # down to values that are rounded to nothing
        for t in (
            grid.total_index(-30, rows, None, 2),
            grid.total_index(-31, rows, columns, 2),
            grid.total_index(7, None, None, 1),
        ):
            given = symbols, (3001, exponent), t, (9, -13), state_bits, fold
            plain, compiled = grid.dequantize(*given), dequantizer.dequantize(*given)
            np.testing.assert_array_equal(plain.view(np.uint32), compiled.view(np.uint32))
    with pytest.raises(CorruptFile):
        dequantizer.dequantize(symbols, (4095, 60), grid.total_index(400, None, None, 1), (0, 0), state_bits, fold)


def test_global_step_is_the_nearest(rng):
    for value in 2.0 ** rng.uniform(-40, 20, 200):
        mantissa, exponent = grid.global_step(value)
        assert 2048 <= mantissa <= 4095
        assert abs(mantissa * 2.0**exponent - value) <= 0.51 * 2.0**exponent
    assert grid.steps((2048, -11), np.array([[0, 4, -2]])).tolist() == [[1.0, 2.0, 23170 / 32768]]


def test_steps_share_the_distortion_equally(rng):
    d_out, d_in = rng.uniform(0.1, 10, (1, 50)), rng.uniform(0.1, 10, (1, 45))
    plan = matrix_steps(d_out, d_in, 9, Grouping("rc", 1.0))
    t = grid.total_index(plan.qp, plan.row_exponents, plan.column_exponents, 9)
    share = grid.steps((2048, -11), t) ** 2 * d_out.T * d_in
    columns = d_in.reshape(5, 9)
    floor = np.exp(np.log(columns).mean(1).repeat(9))  # what one step a column group cannot follow
    spread = np.log2(share / (d_in / floor))
    assert np.abs(spread).max() < 0.5 + 0.5 + 0.25 + 1e-6
    assert matrix_steps(np.ones((1, 4)), np.ones((1, 9)), 9, Grouping("rc", 1.0)).row_exponents is None


def test_equal_slopes_beat_every_other_allocation():
    """Brute force over step exponents of three tensors: the rule Δ ∝ 1/√h has the least D + λR at high rate."""
    h, variance = np.array([0.3, 5.0, 40.0]), np.array([1.0, 0.2, 0.01])
    c = 0.05
    rule = np.log2(c / np.sqrt(h))
    lmbda = c**2 * np.log(2) / 6  # −dD/dR of Δ²h/12 at the rule

    def cost(log_step):
        rate = 0.5 * np.log2(2 * np.pi * np.e * variance) - log_step
        return (h * 4.0**log_step / 12 + lmbda * rate).sum()

    best = min(np.array(np.meshgrid(*[np.arange(-2, 2.01, 0.125)] * 3)).reshape(3, -1).T, key=lambda d: cost(rule + d))
    np.testing.assert_array_equal(best, 0)


def test_size_search_lands_inside_its_window():
    def size(c):
        return 1000 + 50_000 * np.log2(1 + 1 / c) // 1

    for target in (2000, 33_333, 300_000):
        found = meet_size(size, target, 0.004 * target, 1.0, 10_000)
        assert found.feasible
        assert 0.996 * target <= found.value <= target
    assert not meet_size(size, 900, 9, 1.0, 10_000).feasible


def test_slopes_are_those_between_points_that_are_apart():
    assert slope_of({}, 7.0) == slope_of({1.0: 500.0}, 7.0) == 7.0
    assert slope_of({2.0: 500.0, 1.0: 600.0, 1.5: 9e9}, 7.0) == 100.0
    assert slope_of({1.0: 600.0, 1.001: 500.0}, 7.0) == 7.0  # chance
    assert slope_of({1.0: 500.0, 2.0: 600.0}, 7.0) == 7.0

    def passes(slope):
        """Of files that are 2 % larger than those of an earlier search, which fell by 900 bytes an octave."""
        sizes = []
        meet_size(lambda c: sizes.append(10_200 - 900 * np.log2(c)) or sizes[-1], 10_000, 60, 1.0, slope)
        return len(sizes)

    assert passes(slope_of({1.0: 10_000.0, 1.1: 10_000 - 900 * np.log2(1.1)}, 2000.0)) == 2 < passes(2000.0)


def test_search_survives_a_staircase():
    found = meet_size(lambda c: 1000 * round(10 / c), 4500, 10, 1.0, 1000)
    assert found.feasible
    assert found.value == 4000


def test_the_draft_that_is_kept_is_the_one_the_search_finds():
    for limit in (5, 50, 500):
        closest = Closest(limit)
        found = meet_size(lambda c: closest.offer(c, int(100 / c)), limit, 1, 1.0, 50, max_steps=8)  # noqa: B023
        assert closest.size == found.value
        assert closest.item == found.c
    closest = Closest(10)
    assert [closest.offer(k, k) for k in (30, 20, 40)] == [30, 20, 40]
    assert closest.item == 20


def test_largest_feasible():
    found = largest_feasible(lambda c: c <= 7.3, 0.01, 0.01)
    assert 7.2 < found.c <= 7.3
    assert not largest_feasible(lambda c: False, 1.0, 0.01).feasible


def trellis_pass(weight, state_bits, step, left=None, right=None, segment=None, bit=0.0, offsets=(0, 0)):
    trellis = Trellis(state_bits, len(weight), segment or weight.shape[1], magnitude_laws(SIZES))
    costs = np.ones(len(weight)), np.ones(weight.shape[1])
    paths = Paths(trellis, slice(0, len(weight)), 0, *costs, bit or step**2 / 1e9, expected_levels(weight / step))
    return quantize_feedback(weight, np.full(weight.shape, step), left, right, Rounding(0.5, offsets), None, paths)


def rebuilt(symbols, state_bits, step, offsets=(0, 0)):
    """The definition, entry by entry."""
    feedback, forward = TRELLIS_CODES[state_bits]
    values = np.zeros(symbols.shape)
    for i, row in enumerate(symbols):
        state = 0
        for j, k in enumerate(row):
            value = k + 0.25 - (np.sign(k) * offsets[1] if k else offsets[0]) / 64
            values[i, j] = (-value if state & 1 else value) * step
            state = (state >> 1) ^ (feedback * (state & 1)) ^ (forward * (k & 1))
    return values


@pytest.mark.parametrize("state_bits", [2, 3, 4, 5, 6])
def test_a_reader_rebuilds_what_the_trellis_meant(rng, state_bits):
    weight, left = rng.normal(size=(21, 150)), factor(moment(rng, 21)).unit[0]
    right = factor(moment(rng, 150), upper=True).unit[0]
    symbols, error = trellis_pass(weight, state_bits, 0.5, left, right, bit=0.01, offsets=(5, -6))
    np.testing.assert_allclose(weight - error, rebuilt(symbols, state_bits, 0.5, (5, -6)), atol=1e-12)
    read = grid.dequantize(symbols, (2048, -12), np.zeros((1, 1), np.int64), (5, -6), state_bits)
    np.testing.assert_array_equal(read, rebuilt(symbols, state_bits, 0.5, (5, -6)).astype(np.float32))


@pytest.mark.parametrize("state_bits", [2, 3, 6])
def test_paths_without_feedback_are_those_of_identity_factors(rng, state_bits):
    weight = rng.laplace(size=(150, 300))
    free = trellis_pass(weight, state_bits, 0.5, bit=0.02, segment=100)
    fed = trellis_pass(weight, state_bits, 0.5, np.eye(150), np.eye(300), bit=0.02, segment=100)
    np.testing.assert_array_equal(free[0], fed[0])
    np.testing.assert_array_equal(free[1], fed[1])


def test_paths_begin_again_after_a_segment(rng):
    weight = rng.normal(size=(3, 300))
    symbols, error = trellis_pass(weight, 3, 0.7, segment=50, bit=0.01)
    parts = rebuilt(symbols.reshape(18, 50), 3, 0.7).reshape(3, 300)
    np.testing.assert_allclose(weight - error, parts, atol=1e-12)
    alone, _ = trellis_pass(np.ascontiguousarray(weight[:, 100:150]), 3, 0.7, bit=0.01)
    assert (alone == symbols[:, 100:150]).mean() > 0.8  # the same but for the code lengths learnt before


def test_the_best_path_is_found(rng):
    """Against all paths of a short row, without a price on bits; the metric couples the entries only through `u`."""
    for _ in range(20):
        weight, step = rng.normal(size=(1, 5)), 1.0
        _, error = trellis_pass(weight, 2, step)
        candidates = np.array(list(product(range(-3, 4), repeat=5)))
        best = min(((weight - rebuilt(c[None], 2, step)) ** 2).sum() for c in candidates)
        assert (error**2).sum() == pytest.approx(best)


def test_granular_gain_grows_with_the_states(rng):
    """At high rate 0.99 dB for 4 states and 1.09 dB for 8 (Marcellin & Fischer 1990, table III), less where a path is cut."""
    weight = rng.normal(size=(100, 512)) * 20
    gains = [10 * np.log10(1 / 12 / (trellis_pass(weight, bits, 1.0)[1] ** 2).mean()) for bits in (2, 3, 5)]
    # parities alone: rate is that of one step, distortion that of the best path
    assert 0.9 < gains[0] < gains[1] < gains[2] < 1.53


def test_bits_are_traded_for_distortion(rng):
    weight = rng.normal(size=(60, 200))
    outcomes = []
    for bit in (0.0, 0.05, 0.2):
        symbols, error = trellis_pass(weight, 3, 1.0, bit=bit)
        bits = lanes.encode_planes([Plane(symbols, 0, 1, 1, 3)], 1, "m")[1][0]
        outcomes.append((bits, (error**2).sum()))
    assert outcomes[0][0] > outcomes[1][0] > outcomes[2][0]
    assert outcomes[0][1] < outcomes[1][1] < outcomes[2][1]


def test_a_trellis_beats_the_scalar_quantizer_in_bytes(rng):
    """Half of what a scalar quantizer loses to the rate–distortion bound, coded for real, at a rate near 2.5 bits."""
    weight = rng.normal(size=(200, 400))
    step = np.full(weight.shape, 0.7)
    losses = []
    for symbols, error, bits in (
        (*quantize_feedback(weight, step, None, None, Rounding(0.55, (-3, -3))), 0),
        (*trellis_pass(weight, 3, 0.85, bit=0.25 * np.log(2) / 6 * 0.85**2), 3),
    ):
        rate = lanes.encode_planes([Plane(symbols, 0, 1, 1, bits)], 1, "m")[1][0] / weight.size
        losses.append(rate - 0.5 * np.log2(1 / (error**2).mean()))
    assert losses[1] < 0.45 * losses[0]
