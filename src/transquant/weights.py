"""One weight at scalar c:  transform → metric → steps or depths → feedback → symbols.

W ─ analyze ─ C      A, G ─ regularise ─ Bᵀ A B, Sᵀ G S ─ L D Lᵀ ─ steps     C, steps, L ─ feedback ─ symbols ─ synthesize ─ Ŵ
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, log2

import numpy as np
from numpy.typing import NDArray

from transquant.allocation.depths import DepthTable
from transquant.allocation.steps import StepPlan, matrix_steps, row_plan, silenced
from transquant.bitstream import tensor_values
from transquant.choices import IDENTITY, Choice, LayerTransform, Method
from transquant.dequantizer import dequantize
from transquant.entropy.tables import MAX_SYMBOL, expected_levels, fold_for, magnitude_laws
from transquant.grid import MAX_EXPONENT, MAX_QP, steps, total_index
from transquant.packing import group_sizes
from transquant.quantizers.feedback import Paths, Rounding, quantize_feedback
from transquant.quantizers.metric import (
    Damping,
    Factor,
    diagonal,
    factor,
    mean_diagonal,
    noise_level,
    quadratic_form,
    regularise,
)
from transquant.quantizers.saturating import MOST_DEPTH, best_steps
from transquant.quantizers.trellis import SIZES, Trellis
from transquant.records import (
    MAX_BASIS,
    MAX_DEPTH,
    BandCodes,
    CodedEntry,
    CodedTensor,
    FloatArray,
    IntArray,
    LayerStats,
    WeightSpec,
)
from transquant.transforms.algebra import condition, inverse, product
from transquant.transforms.fit import elt, klt
from transquant.transforms.frame import WORST_CONDITION, Frame, band_cost, closed_frame, dct_frame, open_frame
from transquant.transforms.layout import Layout
from transquant.transforms.reduced import ReducedFrame, low_rank_basis

LARGEST_SYMBOL = MAX_SYMBOL / 8
PATH_QUARTERS = 2  # by how much a trellis' steps are larger at the same distortion, quarter octaves: between 1.16 and 1.4
RANK_BITS = 7  # of the entries of a basis of few columns, which is not inverted: its errors are made up for by the coefficients
LEAST_BASIS_DEPTH = 3  # fixed-length, closed loop: fewer bits leave a basis that cannot be inverted

Moments = Sequence[tuple[FloatArray, FloatArray]]  # (columns, rows) of each group


@dataclass(frozen=True, slots=True)
class CodedWeight:
    """A coded weight, its predicted distortion, and float64 (O,) what the layer's bias must add, or None."""

    tensor: CodedTensor
    distortion: float
    shift: FloatArray | None


def lagrangian(c: float) -> float:
    """λ, distortion a bit: the slope of the rate–distortion function at the water level c²/12, 2 ln 2 · c²/12."""
    return float(np.log(2) / 6 * c * c)


def code_weight(
    spec: WeightSpec, weight: FloatArray, stats: LayerStats, c: float, step: tuple[int, int], choice: Choice,
    transform: LayerTransform, method: Method, rows: FloatArray | None = None,
) -> CodedWeight:  # fmt: skip
    """Quantize one weight, float64 (O, n), whose `stats` are not all zero. `step`: the global step on the format's grid. `rows`:
    log2 of the rows' steps relative to it, float64 (O,), where the caller has said (entropy coding without a transform)."""
    moments, damped, variance = metric_of(weight, stats, c, choice)
    coding = "f" if method.coding == "fixed" else "u"
    entry = CodedEntry(spec.name, spec.shape, spec.dtype, transform=transform.kind, axis=transform.axis, coding=coding)  # type: ignore[arg-type]
    part = _fixed if coding == "f" else _of_rank if transform.kept else _entropy_coded
    known = {} if rows is None else {"rows": rows}
    tensor, frame, decoded = part(entry, weight, moments, damped, variance, c, step, choice, transform, method, **known)
    error = weight - (decoded if frame is None else frame.synthesize(decoded))
    del decoded  # matrices are large
    shift = None if stats.input_mean is None else np.zeros((len(moments), len(weight) // len(moments)))
    for k, block in enumerate(error.reshape(len(moments), -1, weight.shape[1])):
        if shift is not None and stats.input_mean is not None:
            shift[k] = (block * stats.input_mean[k]).sum(1)
    return CodedWeight(tensor, predicted(error, stats), None if shift is None else shift.reshape(-1))


def metric_of(weight: FloatArray, stats: LayerStats, c: float, choice: Choice) -> tuple[Moments, Moments, float]:
    """Moments of each group as they are and regularised for scalar c, and the mean square of the weight."""
    moments = [_live(stats, k) for k in range(len(stats.input_moment))]
    variance = float(np.mean(weight**2))
    return moments, [_regularised(a, g, variance, choice.level or c, choice.damping) for a, g in moments], variance


def predicted(error: FloatArray, stats: LayerStats) -> float:
    """Distortion of an error, float64 (O, n), in units of the metric."""
    pairs = zip(stats.input_moment, stats.output_moment, strict=True)
    blocks = error.reshape(len(stats.input_moment), -1, error.shape[1])
    return float(sum(quadratic_form(block, *pair) for block, pair in zip(blocks, pairs, strict=True)))


def _entropy_coded(
    entry: CodedEntry, weight: FloatArray, moments: Moments, damped: Moments, variance: float, c: float, step: tuple[int, int],
    choice: Choice, transform: LayerTransform, method: Method, foldable: bool = True, rows: FloatArray | None = None,
) -> tuple[CodedTensor, Frame | None, FloatArray]:  # fmt: skip
    """One step index and half-octave exponents; symbols for the entropy coder."""
    frame = frame_of(entry, weight, damped, transform, c if not method.feedback else None)
    factors = [_factors(frame, a, g, method.feedback) for a, g in damped]
    dead = _unused(weight, moments) if frame is None else None
    if rows is None:
        plan = matrix_steps(
            np.stack([g.diagonal for _, g in factors]), np.stack([a.diagonal for a, _ in factors]), entry.group_columns,
            choice.grouping, dead,
        )  # fmt: skip
    else:
        plan = row_plan(rows)
        if np.isinf(rows).any():  # zeros are to stay: in a trellis symbol 0 has a value
            method = replace(method, state_bits=0)
    if method.state_bits:
        plan = replace(plan, qp=min(plan.qp + PATH_QUARTERS, MAX_QP))
        if dead is not None:
            plan = silenced(plan, np.all(dead.reshape(-1, entry.group_columns), axis=1))
    coeffs = weight if frame is None else frame.analyze(weight)
    plan = plan if frame is None else _scaled(plan, frame)
    sizes = _step_sizes(entry, plan, step, frame)
    if coarser := quarter_octaves(np.abs(coeffs) / sizes):
        plan = replace(plan, qp=plan.qp + coarser)
        sizes = _step_sizes(entry, plan, step, frame)
    fold = fold_for(entry.rows, entry.columns // max(entry.group_columns, 1), entry.group_columns) if foldable else 1
    rounding, trellis = choice.rounding(), None
    if method.state_bits:
        held = c / (choice.level or c)  # offsets are integers: where they follow c, sizes jump
        rounding = Rounding(offsets=_path_offsets(held * coeffs / sizes, choice.shrink))
        trellis = Trellis(method.state_bits, entry.rows, entry.columns // fold, magnitude_laws(SIZES))
        entry = replace(entry, coding="t", state_bits=method.state_bits)
    bit = choice.rate * lagrangian(c)
    symbols, decoded = quantize_groups(coeffs, np.broadcast_to(sizes, weight.shape), factors, rounding, None, trellis, bit)
    has = ("r" if plan.row_exponents is not None else "") + ("c" if plan.column_exponents is not None else "")
    entry = replace(entry, qp=plan.qp, recon_offsets=rounding.offsets, groups=has, fold=fold)  # type: ignore[arg-type]
    return CodedTensor(entry, symbols, plan.row_exponents, plan.column_exponents, _used(entry, frame, symbols)), frame, decoded


def _of_rank(
    entry: CodedEntry, weight: FloatArray, moments: Moments, damped: Moments, variance: float, c: float, step: tuple[int, int],
    choice: Choice, transform: LayerTransform, method: Method,
) -> tuple[CodedTensor, None, FloatArray]:  # fmt: skip
    """A product of a basis of `kept` columns and as many bands of coefficients, which are coded as a weight of their own; columns
    and bands up to the format's full number are zero. A layer of one group."""
    layout, kept = Layout.of(entry), min(transform.kept, entry.bands)
    basis = low_rank_basis(layout, weight, *damped[0])[:, :kept]
    kept = basis.shape[1]
    integers = np.rint(basis * 2.0**RANK_BITS)
    frame = ReducedFrame(layout, integers * 2.0**-RANK_BITS)
    own = frame.analyze(weight, band_cost(layout, *damped[0]))
    shape = (kept, *entry.shape[1:]) if layout.axis == "r" else (entry.rows, kept, *entry.shape[2:])
    part = replace(entry, shape=shape, transform="i", axis="")
    coded, _, decoded = _entropy_coded(
        part, own, frame.moments(moments), frame.moments(damped), float(np.mean(own**2)), c, step, choice, IDENTITY, method,
        foldable=layout.axis == "r",
    )  # fmt: skip
    rows, columns = entry.rows - coded.symbols.shape[0], entry.columns - coded.symbols.shape[1]
    bands = (0, entry.bands - kept)
    symbols = np.pad(coded.symbols, ((0, rows), (0, columns)))
    of_rows, of_columns = coded.row_exponents, coded.column_exponents
    if layout.axis == "r":
        of_rows = None if of_rows is None else np.pad(of_rows, bands)
    else:
        of_columns = None if of_columns is None else np.pad(of_columns, bands)
    whole = replace(
        coded.entry,
        shape=entry.shape,
        transform=transform.kind,
        axis=transform.axis,
        qp=max(coded.entry.qp - 4 * RANK_BITS, -MAX_QP),
    )
    sent = np.pad(integers, ((0, 0), bands)).astype(np.int32)
    return CodedTensor(whole, symbols, of_rows, of_columns, sent), None, frame.synthesize(decoded)


def _unused(weight: FloatArray, moments: Moments) -> NDArray[np.bool_]:
    """Columns that are zero and that no input reaches, (n,)."""
    unused: NDArray[np.bool_] = np.all(weight == 0, axis=0)
    for a, _ in moments:
        reached = a if a.ndim == 1 else np.einsum("...ii->...i", a).reshape(-1)
        unused = unused & (reached <= 0)
    return unused


def _path_offsets(scaled: FloatArray, shrink: float) -> tuple[int, int]:
    """By how many 1/64 steps a trellis rebuilds symbol 0, and the others, nearer to zero, for entries in steps: to the centroids
    of a normal law, the others by a share `shrink` of the way."""
    spread = max(float(np.sqrt(np.mean(scaled**2))), 1e-9)
    return round(16 * (1 - min(1.0, 1.6 * spread))), round(shrink * min(4 / spread, 16.0))


def _scaled(plan: StepPlan, frame: Frame) -> StepPlan:
    """Steps of the coefficients as they are coded: those of the basis' columns taken over."""
    base = 2 * round(float(frame.quarters.mean()) / 2)
    plan = replace(plan, qp=min(max(plan.qp + base, -MAX_QP), MAX_QP))
    own = (frame.quarters - base) // 2
    if not own.any():
        return plan
    by_row = frame.layout.axis == "r"
    exponents = plan.row_exponents if by_row else plan.column_exponents
    total = np.clip(own if exponents is None else exponents + own, -MAX_EXPONENT, MAX_EXPONENT).astype(np.int32)
    return replace(plan, row_exponents=total) if by_row else replace(plan, column_exponents=total)


def _step_sizes(entry: CodedEntry, plan: StepPlan, step: tuple[int, int], frame: Frame | None) -> FloatArray:
    """Steps of the coefficients in units of a basis with unit-norm columns, broadcastable to (O, n)."""
    sizes = steps(step, total_index(plan.qp, plan.row_exponents, plan.column_exponents, entry.group_columns))
    return sizes if frame is None else sizes / frame.layout.per_band(frame.scales)


def _fixed(
    entry: CodedEntry, weight: FloatArray, moments: Moments, damped: Moments, variance: float, c: float, step: tuple[int, int],
    choice: Choice, transform: LayerTransform, method: Method,
) -> tuple[CodedTensor, Frame | None, FloatArray]:  # fmt: skip
    """A bit depth and a step for each group of bands, by equal slope; saturating codes."""
    layout, lmbda, sizes = Layout.of(entry), lagrangian(c), group_sizes(entry)
    frame, basis_depths = None, None
    if transform.kind == "d":
        frame = dct_frame(layout, entry.shape[2:])
    elif transform.kind != "i":
        synthesis = _basis(layout, weight, damped, transform)
        bands = product(inverse(synthesis), layout.bands(weight))
        worth = _column_cost(layout, damped, bands) * _by_group((bands**2).sum(1), sizes)
        frame, basis_depths = _packed_frame(layout, synthesis, worth, lmbda, sizes, method.feedback)
    bands = layout.bands(weight) if frame is None else layout.coded_bands(frame.analyze(weight))
    factors = [_factors(frame, a, g, method.feedback) for a, g in damped]
    gains = _by_group(_band_gains(layout, factors), sizes) / np.array(sizes)
    groups = [_depth_table(part, MOST_DEPTH) for part in _split(bands, sizes)]
    depths = np.array([t.best(float(h), lmbda) for t, h in zip(groups, gains, strict=True)], np.int32)
    base = 4 * log2(float(steps(step, np.zeros((1, 1), np.int64))[0, 0]))
    quarters = np.array([t.quarters[b] for t, b in zip(groups, depths, strict=True)])
    if frame is not None:  # a group of columns has one scale
        quarters = quarters + frame.quarters[np.cumsum(sizes) - sizes]
    indices = np.where(depths > 0, np.rint(quarters - base), 0).astype(np.int32)
    per_band = np.repeat(steps(step, indices[None].astype(np.int64))[0], sizes)
    per_band = per_band if frame is None else per_band / frame.scales
    step_size = np.broadcast_to(layout.per_band(per_band), weight.shape)
    limits = np.broadcast_to(layout.per_band(np.repeat(depths, sizes).astype(np.int8)), weight.shape)
    symbols, decoded = quantize_groups(layout.coded(bands), step_size, factors, Rounding(), limits)
    basis = _used(entry, frame, symbols)
    if basis is not None and basis_depths is not None:  # no codes for columns that no coefficient needs
        basis_depths = np.where([part.any() for part in np.split(basis, np.cumsum(sizes)[:-1], axis=1)], basis_depths, 0)
    codes = BandCodes(depths, indices, None if basis_depths is None else basis_depths.astype(np.int32))
    return CodedTensor(entry, symbols, None, None, basis, codes), frame, decoded


def _depth_table(part: FloatArray, most: int) -> DepthTable:
    return DepthTable(*best_steps(part, most), part.size)


def _live(stats: LayerStats, group: int) -> tuple[FloatArray, FloatArray]:
    """Moments of a group; a dead group among live ones takes the mean of all."""
    a, g = stats.input_moment[group], stats.output_moment[group]
    return (a, g) if a.any() and g.any() else (stats.input_moment.mean(0), stats.output_moment.mean(0))


def _regularised(a: FloatArray, g: FloatArray, variance: float, c: float, damping: Damping) -> tuple[FloatArray, FloatArray]:
    if a.ndim == g.ndim == 1:  # no feedback, no noise to keep in bounds
        damping = replace(damping, noise=0.0)
    noise = noise_level(damping, c * c / 12, variance, mean_diagonal(a), mean_diagonal(g))
    return regularise(a, damping.alpha + noise), regularise(g, damping.gamma + noise)


def _factors(frame: Frame | None, a: FloatArray, g: FloatArray, feedback: bool) -> tuple[Factor, Factor]:
    """Factors of the regularised moments in the coefficient domain; without feedback their diagonals."""
    if frame is not None:
        a, g = frame.column_moment(a), frame.row_moment(g)
    return (factor(a, upper=True), factor(g)) if feedback else (Factor(None, diagonal(a)), Factor(None, diagonal(g)))


def _basis(layout: Layout, weight: FloatArray, damped: Moments, transform: LayerTransform) -> FloatArray:
    bands = layout.bands(weight)
    energy = product(bands, bands.T)
    return klt(energy) if transform.kind == "k" else elt(energy, sum(band_cost(layout, a, g) for a, g in damped))  # type: ignore[arg-type]


def frame_of(
    entry: CodedEntry, weight: FloatArray, damped: Moments, transform: LayerTransform, open_at: float | None
) -> Frame | None:
    """The frame of a transform with an entropy-coded basis; `open_at`: the scalar c of the open loop, else None."""
    if transform.kind == "i":
        return None
    layout = Layout.of(entry)
    if transform.kind == "d":
        return dct_frame(layout, entry.shape[2:])
    synthesis = _basis(layout, weight, damped, transform)
    if open_at is None:
        return closed_frame(layout, synthesis, transform.bits)
    # an entry of column b is as sensitive as its band has energy: the same rule as for weights
    bands = product(inverse(synthesis), layout.bands(weight))
    sizes = open_at / np.sqrt(np.maximum(_column_cost(layout, damped, bands) * (bands**2).sum(1), 1e-300))
    largest = np.abs(synthesis).max(0)
    # half octaves, as step exponents are: between its points the coefficients' steps follow c smoothly
    quarters = 2 * np.ceil(2 * np.log2(np.clip(sizes, largest / MAX_BASIS, 4 * largest))).astype(np.int32)
    return open_frame(layout, synthesis, np.rint(synthesis / 2.0 ** (quarters / 4)).astype(np.int32), quarters)


def _column_cost(layout: Layout, damped: Moments, bands: FloatArray) -> float:
    """What the square of an error in an entry of a basis costs, for a band of unit energy."""
    costs = [float(np.mean(np.diagonal(band_cost(layout, a, g)))) for a, g in damped]
    return sum(costs) / int(bands.shape[1])


def _packed_frame(
    layout: Layout, synthesis: FloatArray, worth: FloatArray, lmbda: float, sizes: list[int], feedback: bool
) -> tuple[Frame, IntArray]:
    """The frame of a basis in fixed-length codes and its depths by group; `worth`: what an
    error of a column costs. In the closed loop coefficients come from the decoded basis, which must have an inverse."""
    tables = [_depth_table(part, MAX_DEPTH) for part in _split(synthesis.T, sizes)]
    for least in range(LEAST_BASIS_DEPTH if feedback else 0, MAX_DEPTH + 1):
        depths = np.array([t.best(float(h), lmbda, least) for t, h in zip(tables, worth, strict=True)], np.int32)
        quarters = np.array([t.quarters[b] for t, b in zip(tables, depths, strict=True)], np.int32)
        scale, depth = np.repeat(quarters, sizes), np.repeat(depths, sizes)
        half = 2.0 ** np.maximum(depth - 1, 0)
        basis = np.clip(np.rint(synthesis / 2.0 ** (scale / 4)), -half, half - 1)
        basis = np.where(depth == 1, np.where(synthesis < 0, -1, 1), basis) * (depth > 0)
        exact = open_frame(layout, synthesis, basis.astype(np.int32), scale)
        if not feedback:
            return exact, depths
        if condition(exact.synthesis) < WORST_CONDITION:
            break
    return replace(exact, analysis=inverse(exact.synthesis)), depths


def _used(entry: CodedEntry, frame: Frame | None, symbols: IntArray) -> IntArray | None:
    """The basis to send: columns whose band is zero throughout are not needed."""
    if frame is None or frame.basis is None:
        return None
    used: IntArray = np.abs(Layout.of(entry).coded_bands(symbols)).max(1) > 0
    return np.where(used[None, :], frame.basis, 0).astype(np.int32)


def _band_gains(layout: Layout, factors: Sequence[tuple[Factor, Factor]]) -> FloatArray:
    """Mean sensitivity of a band's coefficients, float64 (r,)."""
    each = [g.diagonal[:, None] * a.diagonal[None, :] for a, g in factors]
    gains: FloatArray = layout.coded_bands(np.concatenate(each)).mean(1)
    return gains


def _split(bands: FloatArray, sizes: Sequence[int]) -> list[FloatArray]:
    return np.split(bands, np.cumsum(sizes)[:-1])


def _by_group(values: FloatArray, sizes: Sequence[int]) -> FloatArray:
    return np.array([part.sum() for part in _split(values, sizes)])


def quantize_groups(
    coeffs: FloatArray, sizes: FloatArray, factors: Sequence[tuple[Factor, Factor]], rounding: Rounding,
    depths: NDArray[np.int8] | None = None, trellis: Trellis | None = None, bit: float = 0.0,
) -> tuple[IntArray, FloatArray]:  # fmt: skip
    """Symbols int32 and decoded coefficients float64, both (O, n); groups and diagonal blocks of columns are independent.
    `bit`: the distortion that a bit is worth to the trellis."""
    symbols, decoded = np.empty(coeffs.shape, np.int32), np.empty(coeffs.shape)
    height = len(coeffs) // len(factors)
    for k, (input_factor, output_factor) in enumerate(factors):
        rows = slice(k * height, (k + 1) * height)
        left = None if output_factor.unit is None else output_factor.unit[0]
        blocks = input_factor.unit or (None,)
        width = coeffs.shape[1] // len(blocks)
        for b, right in enumerate(blocks):
            block = rows, slice(b * width, (b + 1) * width)
            target = np.ascontiguousarray(coeffs[block])
            limits = None if depths is None else np.ascontiguousarray(depths[block])
            size, paths = sizes[block], None
            if trellis is not None:
                costs = output_factor.diagonal, input_factor.diagonal[block[1]]
                paths = Paths(trellis, rows, b * width, *costs, bit, expected_levels(target / size))
            symbols[block], error = quantize_feedback(target, size, left, right, rounding, limits, paths)
            np.subtract(target, error, out=decoded[block])
    return symbols, decoded


def dequantized(tensor: CodedTensor, step: tuple[int, int]) -> FloatArray:
    """What a reader will give, float64 (O, n)."""
    return tensor_values(tensor, step, dequantize).astype(np.float64)


def quarter_octaves(magnitudes: FloatArray) -> int:
    """By how much a step index must grow so that symbols stay well inside the format's range; feedback needs some room."""
    largest = float(magnitudes.max(initial=0.0))
    return max(0, ceil(4 * log2(largest / LARGEST_SYMBOL))) if largest > 0 else 0
