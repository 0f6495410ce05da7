"""The binary model of FORMAT.md section 5: a plane as adaptive decisions, one function for both directions, compiled."""

from __future__ import annotations

import numba as nb
import numpy as np

from transquant.entropy import tables
from transquant.entropy.rans import code_bit

_R, _LEVEL = tables.RECIPROCAL, tables.LEVEL_OF
_P_MIN, _P_MAX, _LIMIT = tables.P_MIN, tables.P_MAX, tables.COUNT_LIMIT
_UNARY, _GAMMA, _MAX, _HALF = tables.NUM_UNARY, tables.NUM_GAMMA, tables.MAX_SYMBOL, tables.P_HALF
_P_BITS = tables.P_BITS
_MAX_DECISIONS = _UNARY + _GAMMA + 64  # of one symbol


@nb.njit(cache=True, nogil=True, inline="always")
def _probability(counts, index):  # type: ignore[no-untyped-def]
    p = (counts[index, 1] * _R[counts[index, 0] + counts[index, 1]]) >> (32 - _P_BITS)
    return min(max(p, _P_MIN), _P_MAX)


@nb.njit(cache=True, nogil=True, inline="always")
def _learn(counts, index, bit):  # type: ignore[no-untyped-def]
    counts[index, bit] += 2


@nb.njit(cache=True, nogil=True, inline="always")
def _bound(counts, index):  # type: ignore[no-untyped-def]
    while counts[index, 0] + counts[index, 1] > _LIMIT:
        counts[index, 0] = (counts[index, 0] + 1) >> 1
        counts[index, 1] = (counts[index, 1] + 1) >> 1


@nb.njit(cache=True, nogil=True, inline="always")
def _sign_class(value):  # type: ignore[no-untyped-def]
    return 0 if value == 0 else (1 if value > 0 else 2)


@nb.njit(cache=True, nogil=True, inline="always")
def _mirrored(sign_class, odd):  # type: ignore[no-untyped-def]
    return 3 - sign_class if odd and sign_class else sign_class


@nb.njit(cache=True, nogil=True)
def code_decisions(  # type: ignore[no-untyped-def]
    q, width, taps, lanes, col_shift, decoding, feedback, forward, magnitude, gamma, signs, start, states, words, log, cursor
):
    """Code one plane int32 (rows, columns); see `lanes` for the rest. Returns the log."""
    rows, columns = q.shape
    col = np.zeros(columns, np.int64)
    row = np.zeros(lanes, np.int64)
    level = np.zeros(lanes, np.int64)
    shift = np.zeros(lanes, np.int64)
    size = np.zeros(lanes, np.int64)  # |symbol|: given when encoding, built up when decoding
    high = np.zeros(lanes, np.int64)  # size >> shift
    bits_of = np.zeros(lanes, np.int64)
    active = np.zeros(lanes, np.int64)
    path = np.zeros(lanes, np.int64)  # state of the lane's trellis
    true_sign = np.zeros((min(lanes, rows) if forward else 0, columns), np.int8)  # of what a trellis' symbols stand for
    for first in range(0, rows, lanes):
        count = min(lanes, rows - first)
        row[:count] = start[0]
        path[:] = 0
        for j in range(columns):
            if not decoding and cursor[0] + count * _MAX_DECISIONS > len(log):
                grown = np.empty(2 * len(log) + count * _MAX_DECISIONS, np.uint64)
                grown[: cursor[0]] = log[: cursor[0]]
                log = grown
            around = 0
            if first > 0:
                before, after = col[max(j - 1, 0)], col[min(j + 1, columns - 1)]
                around = (2 * col[j] + before + after) >> 2
            any_shift = False
            for lane in range(count):
                m = row[lane]
                if first > 0:
                    m = (m + around) >> 1
                level[lane] = _LEVEL[min(m, 2047)]
                s = -3
                t = m >> 8
                while t > 0:
                    t >>= 1
                    s += 1
                shift[lane] = max(s, 0)
                any_shift = any_shift or s > 0
                size[lane] = abs(q[first + lane, j])
                high[lane] = 0 if decoding else size[lane] >> shift[lane]
                active[lane] = lane

            # stage 1: unary
            num = count
            for k in range(_UNARY):
                left = 0
                for a in range(num):
                    lane = active[a]
                    p = _probability(magnitude[:, k], level[lane])
                    bit = code_bit(decoding, 1 if high[lane] > k else 0, p, lane, states, words, log, cursor)
                    bits_of[a] = bit
                for a in range(num):
                    _learn(magnitude[:, k], level[active[a]], bits_of[a])
                for a in range(num):
                    lane = active[a]
                    _bound(magnitude[:, k], level[lane])
                    if bits_of[a]:
                        if decoding:
                            high[lane] = k + 1
                        active[left] = lane
                        left += 1
                num = left
                if num == 0:
                    break

            # stage 2: Elias gamma of what is above the unary part; here size holds r + 1, bits_of its length
            if num > 0:
                over = num
                lengths = np.zeros(lanes, np.int64)
                rest = np.zeros(lanes, np.int64)
                members = active[:over].copy()
                for a in range(over):
                    lane = members[a]
                    rest[lane] = 1 if decoding else high[lane] - _UNARY + 1
                for k in range(_GAMMA):
                    left = 0
                    p = _probability(gamma, k)
                    for a in range(num):
                        lane = active[a]
                        bit = code_bit(decoding, 1 if rest[lane] >> (k + 1) else 0, p, lane, states, words, log, cursor)
                        bits_of[a] = bit
                    for a in range(num):
                        _learn(gamma, k, bits_of[a])
                    _bound(gamma, k)
                    for a in range(num):
                        if bits_of[a]:
                            lengths[active[a]] = k + 1
                            active[left] = active[a]
                            left += 1
                    num = left
                    if num == 0:
                        break
                if num > 0:
                    cursor[2] = 1
                    return log
                position = 1
                while True:
                    done = True
                    for a in range(over):
                        lane = members[a]
                        if lengths[lane] >= position:
                            done = False
                            given = (rest[lane] >> (lengths[lane] - position)) & 1
                            bit = code_bit(decoding, given, _HALF, lane, states, words, log, cursor)
                            if decoding:
                                rest[lane] = (rest[lane] << 1) | bit
                    if done:
                        break
                    position += 1
                if decoding:
                    for a in range(over):
                        high[members[a]] = rest[members[a]] + _UNARY - 1

            # stage 3: low bits
            if decoding:
                for lane in range(count):
                    size[lane] = high[lane]
            if any_shift:
                position = 1
                while True:
                    done = True
                    for lane in range(count):
                        if shift[lane] >= position:
                            done = False
                            given = (size[lane] >> (shift[lane] - position)) & 1
                            bit = code_bit(decoding, given, _HALF, lane, states, words, log, cursor)
                            if decoding:
                                size[lane] = (size[lane] << 1) | bit
                    if done:
                        break
                    position += 1

            # stage 4: signs
            total = 0
            inside = j % taps
            for lane in range(count):
                r = first + lane
                size_now = size[lane]
                if size_now > _MAX:
                    cursor[2] = 1
                    return log
                total += size_now
                row[lane] += ((size_now << 8) - row[lane]) >> 3
                odd = path[lane] & 1
                if forward:
                    path[lane] = (path[lane] >> 1) ^ (feedback * odd) ^ (forward * (size_now & 1))
                if size_now == 0:
                    if forward:
                        true_sign[lane, j] = 0
                    continue
                if forward:  # as seen from this state, which is the mirror image of another
                    left_sign = true_sign[lane, j - 1] if j > 0 and (width == 1 or j % width != 0) else 0
                    above = true_sign[lane, j - width] if inside >= width else 0
                    c = (min(size_now, 3) - 1) * 9 + _mirrored(left_sign, odd) * 3 + _mirrored(above, odd)
                else:
                    left_sign = _sign_class(q[r, j - 1]) if j > 0 and (width == 1 or j % width != 0) else 0
                    above = _sign_class(q[r, j - width]) if inside >= width else 0
                    earlier = _sign_class(q[r - lanes, j]) if first > 0 else 0
                    c = (left_sign * 3 + above) * 3 + earlier
                level[lane] = c
                p = _probability(signs, c)
                bit = code_bit(decoding, 1 if q[r, j] > 0 else 0, p, lane, states, words, log, cursor)
                bits_of[lane] = bit
                if forward:
                    true_sign[lane, j] = _mirrored(2 - bit, odd)
                if decoding:
                    q[r, j] = size_now if bit else -size_now
            for lane in range(count):
                if size[lane] > 0:
                    _learn(signs, level[lane], bits_of[lane])
            for lane in range(count):
                if size[lane] > 0:
                    _bound(signs, level[lane])
            mean = (total << 8) // count
            if first == 0:
                col[j] = mean
            else:
                col[j] += (mean - col[j]) >> col_shift
            if cursor[2]:
                return log
        start[0] = col.sum() // columns
    return log
