"""Trellis-coded quantization inside the feedback loop: the best path of many, each with its own error history.

Two scalar quantizers share the symbols: Q0 rebuilds k as k + 1/4 steps, Q1 as the mirror image, −k − 1/4 steps. Which of them
an entry uses is the lowest bit of a state, and the parity of its symbol moves the state along a convolutional code
(FORMAT.md section 3), so that together they reach the points of a lattice twice as fine, at the rate of one of them (Marcellin
& Fischer, IEEE Trans. Commun. 38(1), 1990; codes: Ungerboeck, IEEE Trans. Inf. Theory 28(1), 1982; entropy-coded, with mirrored
quantizers so that both have the same statistics: Fischer & Wang, IEEE Trans. Inf. Theory 38(2), 1992; Marcellin, IEEE Trans.
Commun. 42(1), 1994). A row of the matrix is a path. The Viterbi algorithm keeps one survivor a state, each with what its own
errors ask of the entries still to come (per-survivor processing), and weighs distortion against the code length that an
adaptive model predicts. After a block of columns the best survivor is taken.
"""

from __future__ import annotations

import numba as nb
import numpy as np
from numpy.typing import NDArray

from transquant.records import FloatArray, IntArray
from transquant.trellis_code import TRELLIS_CODES

SIZES = 24  # magnitudes whose code length is modelled one by one
PRIOR = 4.0  # how many symbols the first code lengths are worth
REFRESH = 8  # rows of a block after which code lengths are taken from the counts again
NEGATIVE = 0.6  # of symbols other than 0: −1 is rebuilt nearer to zero than 1
NEVER = 1e300


class Trellis:
    """The trellis of one tensor while its blocks pass: states of its rows, and the code lengths as they adapt.

    `state_bits`: log2 of the number of states; `segment`: columns after which the paths begin again in state 0; `laws`
    float64 (levels, `SIZES`): what to expect first, probabilities of the magnitudes by context level; `counts`: those of another
    trellis to go on from instead."""

    def __init__(self, state_bits: int, rows: int, segment: int, laws: FloatArray, counts: FloatArray | None = None) -> None:
        self.codes, self.num_states, self.segment = TRELLIS_CODES[state_bits], 1 << state_bits, segment
        self.states = np.zeros(rows, np.int64)
        signs = np.array([NEGATIVE, 1 - NEGATIVE])
        down, up = (PRIOR * laws[:, 1:, None] * signs).transpose(2, 0, 1)
        self.counts = np.concatenate([down[:, ::-1], PRIOR * laws[:, :1], up], 1)  # symbols 1 − SIZES … SIZES − 1
        if counts is not None:
            self.counts = counts.copy()
        self.bits = np.empty_like(self.counts)
        _code_lengths(self.counts, self.bits)

    def block(
        self, target: FloatArray, weight: FloatArray, step_size: FloatArray, worth: FloatArray, levels: NDArray[np.uint8],
        left: FloatArray | None, right: FloatArray | None, rows: slice, offsets: tuple[float, float],
    ) -> tuple[IntArray, FloatArray]:  # fmt: skip
        """Symbols and errors of one block, of these `rows` of the tensor. `left` and `right` None: nothing is fed back."""
        if left is None or right is None:
            free: tuple[IntArray, FloatArray] = _free_block(
                weight, step_size, worth, levels, self.states[rows], *self.codes, self.num_states, *offsets, self.counts, self.bits
            )
            return free
        done: tuple[IntArray, FloatArray] = _trellis_block(
            target, weight, step_size, worth, levels, left, right, self.states[rows], *self.codes, self.num_states, *offsets,
            self.counts, self.bits,
        )  # fmt: skip
        return done


@nb.njit(cache=True, nogil=True)
def _code_lengths(counts, bits):  # type: ignore[no-untyped-def]
    for level in range(counts.shape[0]):
        total = counts[level].sum()
        for k in range(counts.shape[1]):
            bits[level, k] = np.log2(total / counts[level, k])


@nb.njit(cache=True, nogil=True, inline="always")
def _place(k):  # type: ignore[no-untyped-def]
    """Where counts and lengths have symbol k."""
    return min(max(k, 1 - SIZES), SIZES - 1) + SIZES - 1


@nb.njit(cache=True, nogil=True, inline="always")
def _length(bits, k):  # type: ignore[no-untyped-def]
    return bits[_place(k)] + 0.1 * max(abs(k) - SIZES + 1, 0)


@nb.njit(cache=True, nogil=True, inline="always")
def _value(k, shrink_zero, shrink_more):  # type: ignore[no-untyped-def]
    """What Q0 rebuilds of symbol k, in steps; Q1's is the negative."""
    if k == 0:
        return 0.25 - shrink_zero
    return k + 0.25 - shrink_more if k > 0 else k + 0.25 + shrink_more


@nb.njit(cache=True, nogil=True, inline="always")
def _cheapest(scaled, parity, price, lengths, shrink_zero, shrink_more):  # type: ignore[no-untyped-def]
    """The symbol of this parity that costs least for an entry as its quantizer sees it, in steps, and its cost in bits."""
    k = 2 * int(np.floor((scaled - 0.25 - parity) / 2 + 0.5)) + parity
    gap = scaled - _value(k, shrink_zero, shrink_more)
    value = price * gap * gap + _length(lengths, k)
    if k > 0 or k < -1:  # or the next one nearer to zero
        nearer = k - 2 if k > 0 else k + 2
        gap = scaled - _value(nearer, shrink_zero, shrink_more)
        other = price * gap * gap + _length(lengths, nearer)
        if other < value:
            value, k = other, nearer
    return k, value


@nb.njit(cache=True, nogil=True)
def _free_block(  # type: ignore[no-untyped-def]
    weight, step_size, worth, levels, states, feedback, forward, num_states, shrink_zero, shrink_more, counts, bits
):
    """`_trellis_block` where no entry depends on another's error: survivors have nothing of their own but their cost."""
    rows, columns = weight.shape
    symbols = np.zeros((rows, columns), np.int32)
    error = np.zeros((rows, columns))
    cost, new_cost = np.empty(num_states), np.empty(num_states)
    parent = np.empty((columns, num_states), np.int64)
    choices = np.empty((columns, 2, 2), np.int32)  # by state's and symbol's parity
    price = np.empty((2, 2))
    for i in range(rows - 1, -1, -1):
        cost[:] = NEVER
        cost[states[i]] = 0.0
        for j in range(columns):
            scaled = min(max(weight[i, j] / step_size[i, j], -1048000.0), 1048000.0)
            for odd in range(2):
                seen = -scaled if odd else scaled
                for parity in range(2):
                    choices[j, odd, parity], price[odd, parity] = _cheapest(
                        seen, parity, worth[i, j], bits[levels[i, j]], shrink_zero, shrink_more
                    )
            new_cost[:] = NEVER
            for s in range(num_states):
                if cost[s] >= NEVER:
                    continue
                odd = s & 1
                for parity in range(2):
                    value = price[odd, parity] + cost[s]
                    to = (s >> 1) ^ (odd * feedback) ^ (parity * forward)
                    if value < new_cost[to]:
                        new_cost[to] = value
                        parent[j, to] = 2 * s + parity
            cost, new_cost = new_cost, cost
        s = int(np.argmin(cost))
        states[i] = s
        for j in range(columns - 1, -1, -1):
            parity = parent[j, s] & 1
            s = parent[j, s] >> 1
            k = choices[j, s & 1, parity]
            value = _value(k, shrink_zero, shrink_more) * step_size[i, j]
            symbols[i, j] = k
            error[i, j] = weight[i, j] - (-value if s & 1 else value)
            counts[levels[i, j], _place(k)] += 1.0
        if i % REFRESH == 0:
            _code_lengths(counts, bits)
    return symbols, error


@nb.njit(cache=True, nogil=True)
def _trellis_block(  # type: ignore[no-untyped-def]
    target, weight, step_size, worth, levels, left, right, states, feedback, forward, num_states, shrink_zero, shrink_more,
    counts, bits,
):  # fmt: skip
    rows, columns = target.shape
    symbols = np.zeros((rows, columns), np.int32)
    error = np.zeros((rows, columns))
    carried = np.zeros((rows, columns))  # E U_a of the rows done in this block
    want, new_want = np.empty((num_states, columns)), np.empty((num_states, columns))  # u of each survivor
    cost, new_cost = np.empty(num_states), np.empty(num_states)
    parent = np.empty((columns, num_states), np.int64)
    symbol = np.empty((columns, num_states), np.int32)
    for i in range(rows - 1, -1, -1):
        start = states[i]
        for j in range(columns):
            want[start, j] = target[i, j]
        for k in range(i + 1, rows):
            factor = left[k, i]
            if factor != 0.0:
                for j in range(columns):
                    want[start, j] += factor * carried[k, j]
        cost[:] = NEVER
        cost[start] = 0.0
        for j in range(columns):
            new_cost[:] = NEVER
            step, price, lengths = step_size[i, j], worth[i, j], bits[levels[i, j]]
            for s in range(num_states):
                if cost[s] >= NEVER:
                    continue
                odd = s & 1
                scaled = min(max(want[s, j] / step, -1048000.0), 1048000.0)
                if odd:
                    scaled = -scaled
                for parity in range(2):
                    k, value = _cheapest(scaled, parity, price, lengths, shrink_zero, shrink_more)
                    value += cost[s]
                    to = (s >> 1) ^ (odd * feedback) ^ (parity * forward)
                    if value < new_cost[to]:
                        new_cost[to] = value
                        parent[j, to] = s
                        symbol[j, to] = k
            for s in range(num_states):
                if new_cost[s] >= NEVER:
                    continue
                before = parent[j, s]
                value = _value(symbol[j, s], shrink_zero, shrink_more) * step
                e = weight[i, j] - (-value if before & 1 else value)
                for m in range(j + 1, columns):
                    new_want[s, m] = want[before, m] + right[j, m] * e
            want, new_want = new_want, want
            cost, new_cost = new_cost, cost
        last = np.argmin(cost)
        states[i] = last
        s = int(last)
        for j in range(columns - 1, -1, -1):
            k = symbol[j, s]
            s = parent[j, s]
            value = _value(k, shrink_zero, shrink_more) * step_size[i, j]
            symbols[i, j] = k
            e = weight[i, j] - (-value if s & 1 else value)
            error[i, j] = e
            counts[levels[i, j], _place(k)] += 1.0
            for m in range(j, columns):
                carried[i, m] += right[j, m] * e
        if i % REFRESH == 0:
            _code_lengths(counts, bits)
    return symbols, error
