"""The token model of FORMAT.md section 5: a plane of weights as one event an entry, one function for both directions, compiled.

    contexts ─ tokens (written to the log, or read from the states) ─ escapes and low bits ─ learn ─ averages

Everything that happens for each entry is a loop over a column's lanes in narrow integers, without branches, so that compilers
turn it into vector instructions. Reading tokens is one lane after the other, but tables that stay let most lanes pass with
their neighbours: first all are taken for zeros that need no word, then those that are not are listed and read.
"""

from __future__ import annotations

import numba as nb
import numpy as np

from transquant.entropy import tables
from transquant.entropy.escapes import read_rest, write_rest
from transquant.entropy.rans import event

_LEVEL = (tables.SIGNS * tables.LEVEL_OF + tables.SIGNS // 2).astype(np.uint32)  # the context of a level where no sign is known
_ONE = tables.P_ONE
_TOKENS, _ESCAPE, _MIDDLE = tables.TOKENS, tables.ESCAPE, tables.MIDDLE
_MAX_SHIFT, _SHIFT_FROM = tables.MAX_SHIFT, tables.THRESHOLDS[tables.SHIFT_LEVEL - 1]
_TILE = 16  # columns that are kept with a column's lanes side by side
_MAX_EVENTS = tables.MAX_EVENTS
_MANY = 16  # lanes for which vector instructions pay
_I = np.int32
_U = np.uint32
_U0, _U1, _U2, _U3, _U4, _U8, _U16 = _U(0), _U(1), _U(2), _U(3), _U(4), _U(8), _U(16)
_UMASK, _UBITS, _ULOW, _UESCAPE = _U(_ONE - 1), _U(tables.P_BITS), _U(tables.STATE_LOW), _U(_ESCAPE)
_UROW, _ULOOKUP, _UREST = _U(_TOKENS + 1), _U(tables.LOOKUP_BITS), _U(tables.P_BITS - tables.LOOKUP_BITS)
_LAST = _I(len(tables.LEVEL_OF) - 1)


@nb.njit(cache=True, nogil=True)
def code_tokens(  # type: ignore[no-untyped-def]
    q, width, taps, lanes, col_shift, decoding, adaptive, feedback, forward, counts, fresh, begins, lookup, zeros, progress, start,
    states, words, log, cursor,
):  # fmt: skip
    """Code one plane int32 (rows, columns); see `lanes` for the rest. Returns the log."""
    rows, columns = q.shape
    side = min(lanes, rows)
    col = np.zeros(columns, np.int64)
    fast, slow, mean = np.zeros(side, np.int32), np.zeros(side, np.int32), np.zeros(side, np.int32)
    sign, law, others = np.zeros(side, np.int32), np.zeros(side, np.uint32), np.zeros(side, np.uint8)
    lists = np.zeros((3, side + 1), np.uint32)  # of lanes
    some, escapes, wide = lists[0], lists[1], lists[2]
    every = np.arange(side).astype(np.uint32)
    path, shift = np.zeros(side, np.int8), np.zeros(side, np.int64)
    signs = np.zeros((columns + 1 if adaptive else 1, side), np.int8)  # the last row stays 0
    tile = np.zeros((_TILE, side), np.int32)
    touched = np.zeros(tables.NUM_CONTEXTS, np.uint8)
    for first in range(0, rows, lanes):
        count = min(lanes, rows - first)
        fast[:] = start[0]
        slow[:] = start[0]
        path[:] = 0
        for j in range(columns):
            t = j % _TILE
            column = tile[t]
            if not decoding:
                if cursor[0] + count * _MAX_EVENTS > len(log):
                    grown = np.empty(2 * len(log) + count * _MAX_EVENTS, np.uint64)
                    grown[: cursor[0]] = log[: cursor[0]]
                    log = grown
                if t == 0:
                    for lane in range(count):
                        for k in range(min(_TILE, columns - j)):
                            tile[k, lane] = q[first + lane, j + k]
            around = 0
            if first > 0:
                around = (2 * col[j] + col[max(j - 1, 0)] + col[min(j + 1, columns - 1)]) >> 2
            top = _averages(count, fast, slow, around, 1 if first > 0 else 0, mean)
            if adaptive:
                left = j - 1 if j > 0 and (width == 1 or j % width != 0) else columns
                above = j - width if j % taps >= width else columns
                _sign_contexts(count, signs, left, above, path, sign)
            shifted = _shifts(count, mean, shift, wide) if top >= _SHIFT_FROM else 0

            if not decoding:
                escaped = _write(count, mean, sign, begins, column, shifted, shift, fresh, touched, log, cursor, escapes)
            elif adaptive:
                escaped = _search(count, mean, sign, begins, states, words, cursor, fresh, touched, column, escapes)
            elif count >= _MANY:
                _take_zeros(count, mean, zeros, law, states, others, column)
                number = _list(count, others, some)
                escaped = _look_up(number, some, mean, begins, lookup, states, words, cursor, column, escapes)
            else:
                escaped = _look_up(count, every, mean, begins, lookup, states, words, cursor, column, escapes)
            if decoding and (escaped or shifted):
                read_rest(escaped, escapes, shifted, wide, shift, fresh, touched, begins, column, states, words, cursor)
            elif escaped or shifted:
                write_rest(escaped, escapes, shifted, wide, shift, fresh, touched, begins, column, log, cursor)
            if cursor[2] or cursor[1] > len(words) - tables.SPARE_WORDS:
                cursor[2] = 1
                return log

            progress[0] += count
            progress[1] += count
            if adaptive and progress[0] >= min(tables.REBUILD, progress[1] >> tables.REBUILD_SHIFT):
                _learn(counts, fresh, touched, begins)
                progress[0] = 0
            total = _follow(count, column, fast, slow)
            if adaptive:
                _sign_states(count, column, np.int8(feedback), np.int8(forward), path, signs, j)
            average = (total << 8) // count
            if first == 0:
                col[j] = average
            else:
                col[j] += (average - col[j]) >> col_shift
            if decoding and (t == _TILE - 1 or j == columns - 1):
                for lane in range(count):
                    for k in range(t + 1):
                        q[first + lane, j - t + k] = tile[k, lane]
        start[0] = col.sum() // columns
    if adaptive:
        _learn(counts, fresh, touched, begins)
        progress[0] = 0
    return log


@nb.njit(cache=True, nogil=True)
def _averages(count, fast, slow, around, half, mean):  # type: ignore[no-untyped-def]
    """The magnitudes to expect, in 1/256, and the largest of them."""
    around, half, top = _I(around), _I(half), _I(0)
    for lane in range(count):
        m = _I(_I(_I(_I(3 * fast[lane] + 5 * slow[lane]) >> 3) + around) >> half)
        mean[lane] = m
        top = max(top, m)
    return top


@nb.njit(cache=True, nogil=True)
def _sign_contexts(count, signs, left, above, path, sign):  # type: ignore[no-untyped-def]
    """Of two neighbours together, as the states of their lanes' trellises see them: −2 … 2."""
    for lane in range(count):
        both = np.int8(signs[left, lane] + signs[above, lane])
        odd = np.int8(path[lane] & 1)
        sign[lane] = np.int8((both ^ -odd) + odd)


@nb.njit(cache=True, nogil=True)
def _shifts(count, mean, shift, wide):  # type: ignore[no-untyped-def]
    """How many low bits are plain, and the lanes that have such; how many they are."""
    number = 0
    for lane in range(count):
        shift[lane] = 0
        wide[number] = lane
        number += mean[lane] >= _SHIFT_FROM
    for k in range(number):
        s, rest = -2, mean[wide[k]] >> 8
        while rest > 0:
            rest >>= 1
            s += 1
        shift[wide[k]] = min(s, _MAX_SHIFT)
    return number


@nb.njit(cache=True, nogil=True)
def _write(count, mean, sign, begins, column, shifted, shift, fresh, touched, log, cursor, escapes):  # type: ignore[no-untyped-def]
    """Tokens of a column to the log; the lanes with escapes and how many they are."""
    pos, escaped = cursor[0], 0
    for lane in range(count):
        high = np.int64(column[lane])
        if shifted:
            high >>= shift[lane]
        k = high + _MIDDLE if -_MIDDLE <= high <= _MIDDLE else _ESCAPE
        c = np.int64(_LEVEL[min(mean[lane], _LAST)]) + sign[lane]
        begin = np.int64(begins[c * (_TOKENS + 1) + k])
        log[pos + lane] = event(lane, begin, np.int64(begins[c * (_TOKENS + 1) + k + 1]) - begin)
        fresh[c * _TOKENS + k] += _U1
        touched[c] = 1
        escapes[escaped] = lane
        escaped += k == _ESCAPE
    cursor[0] += count
    return escaped


@nb.njit(cache=True, nogil=True)
def _search(count, mean, sign, begins, states, words, cursor, fresh, touched, column, escapes):  # type: ignore[no-untyped-def]
    """Tokens of a column from the states, by bisection; the lanes with escapes and how many they are."""
    pos, escaped = np.uint64(cursor[1]), np.uint64(0)
    for lane in range(count):
        x = states[lane]
        c = _U(_LEVEL[min(mean[lane], _LAST)] + sign[lane])
        low = x & _UMASK
        row = _U(c * _UROW)
        k = _U(_U(begins[row + _U8] <= low) << _U3)
        k = _U(k + (_U(begins[row + k + _U4] <= low) << _U2))
        k = _U(k + (_U(begins[row + k + _U2] <= low) << _U1))
        k = _U(k + _U(begins[row + k + _U1] <= low))
        begin = begins[row + k]
        x = _U(_U(_U(begins[row + k + _U1] - begin) * _U(x >> _UBITS)) + _U(low - begin))
        short = _U(x < _ULOW)
        states[lane] = _U(_U(x << _U(short << _U4)) | _U(words[pos] & _U(_U0 - short)))
        pos += short
        fresh[_U(_U(c << _U4) + k)] += _U1
        touched[c] = 1
        column[lane] = _I(k) - _I(_MIDDLE)
        escapes[escaped] = lane
        escaped += np.uint64(k == _UESCAPE)
    cursor[1] = np.int64(pos)
    return np.int64(escaped)


@nb.njit(cache=True, nogil=True)
def _take_zeros(count, mean, zeros, law, states, others, column):  # type: ignore[no-untyped-def]
    """From static tables, zeros that need no word; what has not is one of the others, and its state is left as it is."""
    for lane in range(count):
        law[lane] = zeros[_U(min(mean[lane], _LAST))]
    for lane in range(count):
        x, freq = states[lane], _U(law[lane] & _UMASK)
        low = _U(_U(x & _UMASK) - _U(law[lane] >> _U16))
        after = _U(_U(freq * _U(x >> _UBITS)) + low)
        other = (low >= freq) | (after < _ULOW)
        states[lane] = x if other else after
        others[lane] = other
        column[lane] = 0


@nb.njit(cache=True, nogil=True)
def _list(count, others, some):  # type: ignore[no-untyped-def]
    """The lanes that are left, ascending; how many they are."""
    number = np.uint64(0)
    for lane in range(count):
        some[number] = lane
        number += np.uint64(others[lane])
    return np.int64(number)


@nb.njit(cache=True, nogil=True)
def _look_up(number, some, mean, begins, lookup, states, words, cursor, column, escapes):  # type: ignore[no-untyped-def]
    """Tokens of some lanes from static tables; the lanes with escapes and how many they are. A lookup says where a piece of the
    range begins: nearly always the token is that of its beginning."""
    pos, escaped = np.uint64(cursor[1]), np.uint64(0)
    for i in range(number):
        lane = some[_U(i)]
        x = states[lane]
        c = _LEVEL[_U(min(mean[lane], _LAST))]
        low = _U(x & _UMASK)
        row = _U(c * _UROW)
        at = _U(row + lookup[_U(_U(c << _ULOOKUP) + _U(low >> _UREST))])
        end = begins[_U(at + _U1)]
        while end <= low:
            at = _U(at + _U1)
            end = begins[_U(at + _U1)]
        begin = begins[at]
        x = _U(_U(_U(end - begin) * _U(x >> _UBITS)) + _U(low - begin))
        short = _U(x < _ULOW)
        states[lane] = _U(_U(x << _U(short << _U4)) | _U(words[pos] & _U(_U0 - short)))
        pos += short
        column[lane] = _I(at - row) - _I(_MIDDLE)
        escapes[escaped] = lane
        escaped += np.uint64(_U(at - row) == _UESCAPE)
    cursor[1] = np.int64(pos)
    return np.int64(escaped)


@nb.njit(cache=True, nogil=True)
def _follow(count, column, fast, slow):  # type: ignore[no-untyped-def]
    """Averages of the rows after a column, and the sum of its magnitudes."""
    total = np.int64(0)
    for lane in range(count):
        size = _I(abs(column[lane]))
        total += size
        scaled = _I(size << 8)
        fast[lane] = _I(fast[lane] + _I(_I(scaled - fast[lane]) >> 2))
        slow[lane] = _I(slow[lane] + _I(_I(scaled - slow[lane]) >> 5))
    return total


@nb.njit(cache=True, nogil=True)
def _sign_states(count, column, feedback, forward, path, signs, j):  # type: ignore[no-untyped-def]
    """Signs of what the symbols stand for, and the next states of the trellises."""
    for lane in range(count):
        v = column[lane]
        odd = np.int8(path[lane] & 1)
        sign = np.int8(np.int8(v > 0) - np.int8(v < 0))
        signs[j, lane] = np.int8((sign ^ -odd) + odd)
        path[lane] = np.int8((path[lane] >> 1) ^ (feedback & -odd) ^ (forward & -np.int8(v & 1)))


@nb.njit(cache=True, nogil=True)
def _learn(counts, fresh, touched, begins):  # type: ignore[no-untyped-def]
    """The tables after the tokens since the last time."""
    for c in range(tables.NUM_CONTEXTS):
        if not touched[c]:
            continue
        touched[c] = 0
        fast, slow = 0, 0
        for k in range(_TOKENS):
            counts[0, c, k] += tables.ONE_TOKEN * fresh[c * _TOKENS + k]
            counts[1, c, k] += tables.ONE_TOKEN * fresh[c * _TOKENS + k]
            fresh[c * _TOKENS + k] = 0
            fast += counts[0, c, k]
            slow += counts[1, c, k]
        while fast > tables.FAST_TOTAL:
            fast = 0
            for k in range(_TOKENS):
                counts[0, c, k] = (counts[0, c, k] + 1) >> 1
                fast += counts[0, c, k]
        while slow > tables.SLOW_TOTAL:
            slow = 0
            for k in range(_TOKENS):
                counts[1, c, k] = (counts[1, c, k] + 1) >> 1
                slow += counts[1, c, k]
        per_fast, per_slow = ((_ONE - _TOKENS) << 16) // fast, ((_ONE - _TOKENS) << 16) // slow
        fast, slow = 0, 0
        for k in range(_TOKENS):
            begins[c * (_TOKENS + 1) + k] = k + ((fast * per_fast + slow * per_slow) >> 17)
            fast += counts[0, c, k]
            slow += counts[1, c, k]
