"""Two-sided error feedback: quantize entry by entry, and let what is still free make up for what is lost.

For D = tr(G E A Eᵀ), E = W − Ŵ, with A = U_a D_a U_aᵀ and G = L_g D_g L_gᵀ (unit upper and lower triangular), the entries
are quantized from the first column to the last and from the last row to the first:

    u_ij = W_ij + Σ_{k≥i, l≤j, (k,l)≠(i,j)} L_g[k,i] E[k,l] U_a[l,j]        Ŵ_ij = Q(u_ij)

so that L_gᵀ E U_a = u − Ŵ, the plain rounding error of each entry, and D = Σ D_g,i D_a,j (u − Ŵ)²_ij as if the entries
were independent. (GPTQ, arXiv 2210.17323, is the one-sided case with one step; YAQA, arXiv 2505.22988, two-sided.)

Blocks of 128 × 128 (with a trellis 128 × 256) run in a compiled loop; what a block owes to the entries outside it comes from
matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numba as nb
import numpy as np
import torch
from numpy.typing import NDArray

from transquant.quantizers.trellis import Trellis
from transquant.records import FloatArray, IntArray

BLOCK = 128
PATH_BLOCK = 256  # columns of a block where paths are followed: each end of a block is decided without looking ahead
UNLIMITED = -1  # the bit depth of symbols that an entropy coder takes


@dataclass(frozen=True, slots=True)
class Rounding:
    """How u becomes a symbol: magnitudes below `dead_zone` (in steps) are zero, the others round with threshold
    `dead_zone` as well; `offsets` are the reconstruction offsets of magnitudes 1 and above, in 1/64 step. With a trellis
    paths decide instead of the dead zone."""

    dead_zone: float = 0.5
    offsets: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Paths:
    """What a trellis needs of a matrix: itself, which of its tensor's `rows` they are, in which column of the tensor they
    begin; what the square of an error costs, the product of `row_cost` float64 (O,) and `column_cost` float64 (n,), and the
    cost of a `bit`; uint8 (O, n), the `levels` of the coder's contexts."""

    trellis: Trellis
    rows: slice
    first_column: int
    row_cost: FloatArray
    column_cost: FloatArray
    bit: float
    levels: NDArray[np.uint8]

    def worth(self, block: tuple[slice, slice], step_size: FloatArray) -> FloatArray:
        """Bits that an error of one step is worth in a block of the matrix, from the block's steps."""
        level = self.row_cost[block[0], None] * self.column_cost[None, block[1]]
        worth: FloatArray = level * step_size**2 / self.bit
        return worth


def quantize_feedback(
    weight: FloatArray,
    step_size: FloatArray,
    output_factor: FloatArray | None,
    input_factor: FloatArray | None,
    rounding: Rounding,
    depths: NDArray[np.int8] | None = None,
    paths: Paths | None = None,
) -> tuple[IntArray, FloatArray]:
    """Quantize one matrix with two-sided feedback.

    `weight` and `step_size` float64 (O, n); `output_factor` L_g (O, O) unit lower and `input_factor` U_a (n, n) unit upper
    triangular, None for the identity. `depths` int8 (O, n): bit depths of saturating codes (FORMAT.md section 7); None
    for symbols of any size. Returns the symbols int32 (O, n) and the error W − Ŵ float64 (O, n)."""
    rows, columns = weight.shape
    symbols = np.zeros((rows, columns), np.int32)
    error = np.zeros((rows, columns))
    if depths is None:
        depths = np.broadcast_to(np.int8(UNLIMITED), weight.shape)
    if output_factor is None and input_factor is None and paths is None:
        sizes, limits = np.ascontiguousarray(step_size), np.ascontiguousarray(depths)
        _round(weight, sizes, limits, rounding.dead_zone, *_shrink(rounding), symbols, error)
        return symbols, error
    if output_factor is None and input_factor is None and paths is not None:
        _follow_freely(weight, step_size, rounding, paths, symbols, error)
        return symbols, error
    left = torch.eye(rows, dtype=torch.float64) if output_factor is None else torch.from_numpy(output_factor)
    right = torch.eye(columns, dtype=torch.float64) if input_factor is None else torch.from_numpy(input_factor)
    carried = torch.zeros(rows, columns, dtype=torch.float64)  # L_gᵀ E of the finished columns
    for begin, stop in _strips(columns, paths):
        inside = right[begin:stop, begin:stop].contiguous()
        base = torch.from_numpy(weight[:, begin:stop]).clone()
        if begin:
            base += carried[:, :begin] @ right[:begin, begin:stop]
        strip = torch.zeros(rows, stop - begin, dtype=torch.float64)  # E of this strip of columns
        for bottom in range(rows, 0, -BLOCK):
            top = max(0, bottom - BLOCK)
            target = base[top:bottom].clone()
            if bottom < rows:
                target += (left[bottom:, top:bottom].T @ strip[bottom:]) @ inside
            block = slice(top, bottom), slice(begin, stop)
            own, sizes = np.ascontiguousarray(weight[block]), np.ascontiguousarray(step_size[block])
            within = left[top:bottom, top:bottom].contiguous().numpy()
            if paths is not None:
                done = paths.trellis.block(
                    target.numpy(), own, sizes, paths.worth(block, sizes), np.ascontiguousarray(paths.levels[block]),
                    within, inside.numpy(), slice(paths.rows.start + top, paths.rows.start + bottom), _shrink(rounding),
                )  # fmt: skip
            else:
                done = _feedback_block(
                    target.numpy(), own, sizes, np.ascontiguousarray(depths[block]), within, inside.numpy(),
                    rounding.dead_zone, *_shrink(rounding),
                )  # fmt: skip
            symbols[block], strip[top:bottom] = done[0], torch.from_numpy(done[1])
        error[:, begin:stop] = strip.numpy()
        if stop < columns:
            carried[:, begin:stop] = left.T @ strip
    return symbols, error


def _follow_freely(
    weight: FloatArray, step_size: FloatArray, rounding: Rounding, paths: Paths, symbols: IntArray, error: FloatArray
) -> None:
    """The blocks of `quantize_feedback` where no entry depends on another's error, in the same order; fills both outputs."""
    for begin, stop in _strips(weight.shape[1], paths):
        for bottom in range(len(weight), 0, -BLOCK):
            top = max(0, bottom - BLOCK)
            block = slice(top, bottom), slice(begin, stop)
            own, sizes = np.ascontiguousarray(weight[block]), np.ascontiguousarray(step_size[block])
            worth, levels = paths.worth(block, sizes), np.ascontiguousarray(paths.levels[block])
            rows = slice(paths.rows.start + top, paths.rows.start + bottom)
            symbols[block], error[block] = paths.trellis.block(own, own, sizes, worth, levels, None, None, rows, _shrink(rounding))


def _strips(columns: int, paths: Paths | None) -> Iterator[tuple[int, int]]:
    """Strips of columns, none across the end of a path."""
    begin = 0
    while begin < columns:
        stop = min(begin + (BLOCK if paths is None else PATH_BLOCK), columns)
        if paths is not None:
            place, segment = paths.first_column + begin, paths.trellis.segment
            if place % segment == 0:
                paths.trellis.states[paths.rows] = 0
            stop = min(stop, begin + segment - place % segment)
        yield begin, stop
        begin = stop


def _shrink(rounding: Rounding) -> tuple[float, float]:
    return rounding.offsets[0] / 64, rounding.offsets[1] / 64


@nb.njit(cache=True, nogil=True, inline="always")
def _nearest(scaled, depth, dead_zone):  # type: ignore[no-untyped-def]
    """Symbol of u / step; magnitudes are bounded so that a wild value stays an int32 the coder can take."""
    if depth == 0:
        return 0
    if depth == 1:
        return -1 if scaled < 0 else 1
    size = abs(scaled)
    symbol = 0 if size < dead_zone else int(min(size + 1.0 - dead_zone, 1048575.0))
    symbol = -symbol if scaled < 0 else symbol
    if depth > 1:
        half = 1 << (depth - 1)
        symbol = min(max(symbol, -half), half - 1)
    return symbol


@nb.njit(cache=True, nogil=True, inline="always")
def _value(symbol, shrink_one, shrink_more):  # type: ignore[no-untyped-def]
    size = abs(symbol)
    value = 0.0 if size == 0 else size - (shrink_one if size == 1 else shrink_more)
    return -value if symbol < 0 else value


@nb.njit(cache=True, nogil=True)
def _round(weight, step_size, depths, dead_zone, shrink_one, shrink_more, symbols, error):  # type: ignore[no-untyped-def]
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            scaled = weight[i, j] / step_size[i, j]
            symbol = _nearest(scaled, depths[i, j], dead_zone)
            symbols[i, j] = symbol
            error[i, j] = weight[i, j] - _value(symbol, shrink_one, shrink_more) * step_size[i, j]


@nb.njit(cache=True, nogil=True)
def _feedback_block(target, weight, step_size, depths, left, right, dead_zone, shrink_one, shrink_more):  # type: ignore[no-untyped-def]
    """One block: `target` is W plus what the blocks already done ask for. Returns symbols and errors of the block."""
    rows, columns = target.shape
    symbols = np.zeros((rows, columns), np.int32)
    error = np.zeros((rows, columns))
    carried = np.zeros((columns, rows))  # (L_gᵀ E)ᵀ of the columns done in this block
    u = np.empty(rows)
    for j in range(columns):
        for i in range(rows):
            u[i] = target[i, j]
        for m in range(j):
            factor = right[m, j]
            if factor != 0.0:
                for i in range(rows):
                    u[i] += factor * carried[m, i]
        before = u.copy()
        for i in range(rows - 1, -1, -1):
            step = step_size[i, j]
            scaled = u[i] / step
            symbol = _nearest(scaled, depths[i, j], dead_zone)
            symbols[i, j] = symbol
            e = weight[i, j] - _value(symbol, shrink_one, shrink_more) * step
            error[i, j] = e
            for k in range(i):
                u[k] += left[i, k] * e
            carried[j, i] = u[i] - before[i] + e
    return symbols, error
