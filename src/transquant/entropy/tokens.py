"""The token model of FORMAT.md section 5: a plane of weights as one event an entry, one function for both directions, compiled.

    contexts ─ tokens (written to the log, or read from the states) ─ escapes and low bits ─ learn ─ averages

Everything that happens for each entry is a loop over a column's lanes in narrow integers, without branches, so that compilers
turn it into vector instructions; only reading tokens is one lane after the other.
"""

from __future__ import annotations

import numba as nb
import numpy as np

from transquant.entropy import tables
from transquant.entropy.rans import code_plain, log_event, take_event

_LEVEL = (tables.SIGNS * tables.LEVEL_OF + tables.SIGNS // 2).astype(np.uint32)  # the context of a level where no sign is known
_LOG2 = tables.BITS_OF
_ONE, _MAX = tables.P_ONE, tables.MAX_SYMBOL
_TOKENS, _ESCAPE, _MIDDLE = tables.TOKENS, tables.ESCAPE, tables.MIDDLE
_LENGTHS, _LONGEST, _MAX_SHIFT = tables.LENGTHS, tables.LONGEST, tables.MAX_SHIFT
_SHIFT_FROM = tables.THRESHOLDS[tables.SHIFT_LEVEL - 1]
_TILE = 16  # columns that are kept with a column's lanes side by side
_MAX_EVENTS = 5  # of one symbol
_I = np.int32
_U = np.uint32
_U0, _U1, _U2, _U3, _U4, _U8 = _U(0), _U(1), _U(2), _U(3), _U(4), _U(8)
_UMASK, _UBITS, _ULOW, _UESCAPE = _U(_ONE - 1), _U(tables.P_BITS), _U(tables.STATE_LOW), _U(_ESCAPE)
_UROW, _ULOOKUP, _UREST = _U(_TOKENS + 1), _U(tables.LOOKUP_BITS), _U(tables.P_BITS - tables.LOOKUP_BITS)
_LAST = _I(len(tables.LEVEL_OF) - 1)


@nb.njit(cache=True, nogil=True)
def code_tokens(  # type: ignore[no-untyped-def]
    q, width, taps, lanes, col_shift, decoding, adaptive, feedback, forward, counts, fresh, begins, lookup, progress, start,
    states, words, log, cursor,
):  # fmt: skip
    """Code one plane int32 (rows, columns); see `lanes` for the rest. Returns the log and the information content in bits."""
    rows, columns = q.shape
    bits = 0.0
    side = min(lanes, rows)
    col = np.zeros(columns, np.int64)
    fast, slow, mean = np.zeros(side, np.int32), np.zeros(side, np.int32), np.zeros(side, np.int32)
    sign, token = np.zeros(side, np.int32), np.zeros(side, np.uint32)
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
            shifted = top >= _SHIFT_FROM
            if shifted:
                _shifts(count, mean, shift)

            if not decoding:
                escaped = _write(count, mean, sign, begins, tile, t, shifted, shift, token, fresh, touched, log, cursor)
            elif adaptive:
                escaped = _search(count, mean, sign, begins, states, words, cursor, token, fresh, touched, tile, t)
            else:
                escaped = _look_up(count, mean, begins, lookup, states, words, cursor, token, fresh, tile, t)
            if escaped or shifted:
                bits += _rest(decoding, count, token, shifted, shift, fresh, touched, begins, tile, t, states, words, log, cursor)
            if cursor[2] or cursor[1] > len(words) - tables.SPARE_WORDS:
                cursor[2] = 1
                return log, bits

            progress[0] += count
            progress[1] += count
            if adaptive and progress[0] >= min(tables.REBUILD, progress[1] >> tables.REBUILD_SHIFT):
                bits += _learn(counts, fresh, touched, begins)
                progress[0] = 0
            total = _follow(count, tile, t, fast, slow)
            if adaptive:
                _sign_states(count, tile, t, np.int8(feedback), np.int8(forward), path, signs, j)
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
        bits += _learn(counts, fresh, touched, begins)
        progress[0] = 0
    else:
        bits += _content(fresh, begins)
    return log, bits


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
def _shifts(count, mean, shift):  # type: ignore[no-untyped-def]
    """How many low bits are plain."""
    for lane in range(count):
        s = 0
        if mean[lane] >= _SHIFT_FROM:
            s, rest = -2, mean[lane] >> 8
            while rest > 0:
                rest >>= 1
                s += 1
        shift[lane] = min(s, _MAX_SHIFT)


@nb.njit(cache=True, nogil=True)
def _write(count, mean, sign, begins, tile, t, shifted, shift, token, fresh, touched, log, cursor):  # type: ignore[no-untyped-def]
    """Tokens of a column to the log; whether any is an escape."""
    escaped = False
    for lane in range(count):
        high = np.int64(tile[t, lane])
        if shifted:
            high >>= shift[lane]
        k = high + _MIDDLE if -_MIDDLE <= high <= _MIDDLE else _ESCAPE
        c = np.int64(_LEVEL[min(mean[lane], _LAST)]) + sign[lane]
        begin = np.int64(begins[c * (_TOKENS + 1) + k])
        log_event(lane, begin, np.int64(begins[c * (_TOKENS + 1) + k + 1]) - begin, log, cursor)
        token[lane] = k
        fresh[c * _TOKENS + k] += _U1
        touched[c] = 1
        escaped = escaped or k == _ESCAPE
    return escaped


@nb.njit(cache=True, nogil=True)
def _search(count, mean, sign, begins, states, words, cursor, token, fresh, touched, tile, t):  # type: ignore[no-untyped-def]
    """Tokens of a column from the states, by bisection; whether any is an escape."""
    pos, escaped = np.uint64(cursor[1]), _U0
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
        token[lane] = k
        fresh[_U(_U(c << _U4) + k)] += _U1
        touched[c] = 1
        tile[t, lane] = _I(k) - _I(_MIDDLE)
        escaped |= _U(k == _UESCAPE)
    cursor[1] = np.int64(pos)
    return escaped != _U0


@nb.njit(cache=True, nogil=True)
def _look_up(count, mean, begins, lookup, states, words, cursor, token, fresh, tile, t):  # type: ignore[no-untyped-def]
    """The same from static tables: a lookup says where a quarter of four places begins, at most three tokens further on."""
    pos, escaped = np.uint64(cursor[1]), _U0
    for lane in range(count):
        x = states[lane]
        c = _LEVEL[min(mean[lane], _LAST)]
        low = x & _UMASK
        row = _U(c * _UROW)
        k = _U(lookup[_U(_U(c << _ULOOKUP) + _U(low >> _UREST))])
        k = _U(k + _U(begins[row + k + _U1] <= low))
        k = _U(k + _U(begins[row + k + _U1] <= low))
        k = _U(k + _U(begins[row + k + _U1] <= low))
        begin = begins[row + k]
        x = _U(_U(_U(begins[row + k + _U1] - begin) * _U(x >> _UBITS)) + _U(low - begin))
        short = _U(x < _ULOW)
        states[lane] = _U(_U(x << _U(short << _U4)) | _U(words[pos] & _U(_U0 - short)))
        pos += short
        token[lane] = k
        fresh[_U(_U(c << _U4) + k)] += _U1
        tile[t, lane] = _I(k) - _I(_MIDDLE)
        escaped |= _U(k == _UESCAPE)
    cursor[1] = np.int64(pos)
    return escaped != _U0


@nb.njit(cache=True, nogil=True)
def _rest(  # type: ignore[no-untyped-def]
    decoding, count, token, shifted, shift, fresh, touched, begins, tile, t, states, words, log, cursor
):
    """What tokens leave open: escaped values, then low bits. Returns the number of plain bits."""
    plain = 0.0
    length, high = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for lane in range(count):
        high[lane] = np.int64(token[lane]) - _MIDDLE
        if token[lane] == _ESCAPE:
            above = 0  # of the magnitude
            if not decoding:
                high[lane] = np.int64(tile[t, lane]) >> shift[lane] if shifted else np.int64(tile[t, lane])
                above = abs(high[lane]) - _MIDDLE
            while length[lane] < _LONGEST and above >> (length[lane] + 1) > 0:
                length[lane] += 1
            length[lane] = _code_length(decoding, length[lane], begins, lane, states, words, log, cursor)
            fresh[_LENGTHS * _TOKENS + length[lane]] += _U1
            touched[_LENGTHS] = 1
    for lane in range(count):
        if token[lane] == _ESCAPE:
            long = length[lane] >= _LONGEST
            below = 10 if long else length[lane]
            value = 0
            if not decoding:
                above = abs(high[lane]) - _MIDDLE - 1
                value = above >> 10 if long else above + 1 - (1 << length[lane])
                value += (1 << below) if high[lane] < 0 else 0
            value = code_plain(decoding, value, below + 1, lane, states, words, log, cursor)
            plain += below + 1
            if decoding:  # for now without the last ten bits of long ones
                above = value & ((1 << below) - 1)
                above = above << 10 if long else above + (1 << below) - 1
                high[lane] = above + _MIDDLE + 1
                length[lane] += 32 if value >> below else 0  # the sign
    for lane in range(count):
        if token[lane] == _ESCAPE:
            if length[lane] & 31 >= _LONGEST:
                value = 0 if decoding else (abs(high[lane]) - _MIDDLE - 1) & 1023
                value = code_plain(decoding, value, 10, lane, states, words, log, cursor)
                plain += 10
                if decoding:
                    high[lane] += value
            if decoding and length[lane] >= 32:
                high[lane] = -high[lane]
    if shifted:
        for lane in range(count):
            if shift[lane] > 0:
                value = 0 if decoding else np.int64(tile[t, lane]) & ((1 << shift[lane]) - 1)
                value = code_plain(decoding, value, shift[lane], lane, states, words, log, cursor)
                plain += shift[lane]
                if decoding:
                    high[lane] = (high[lane] << shift[lane]) + value
    if decoding:
        for lane in range(count):
            if abs(high[lane]) > _MAX:
                cursor[2] = 1
            tile[t, lane] = min(max(high[lane], -_MAX), _MAX)
    return plain


@nb.njit(cache=True, nogil=True)
def _code_length(decoding, k, begins, lane, states, words, log, cursor):  # type: ignore[no-untyped-def]
    row = _LENGTHS * (_TOKENS + 1)
    x = np.int64(states[lane])
    if decoding:
        k = 0
        while np.int64(begins[row + k + 1]) <= x & (_ONE - 1):
            k += 1
    begin = np.int64(begins[row + k])
    freq = np.int64(begins[row + k + 1]) - begin
    if decoding:
        take_event(x, begin, freq, lane, states, words, cursor)
    else:
        log_event(lane, begin, freq, log, cursor)
    return k


@nb.njit(cache=True, nogil=True)
def _follow(count, tile, t, fast, slow):  # type: ignore[no-untyped-def]
    """Averages of the rows after a column, and the sum of its magnitudes."""
    total = np.int64(0)
    for lane in range(count):
        size = _I(abs(tile[t, lane]))
        total += size
        scaled = _I(size << 8)
        fast[lane] = _I(fast[lane] + _I(_I(scaled - fast[lane]) >> 2))
        slow[lane] = _I(slow[lane] + _I(_I(scaled - slow[lane]) >> 5))
    return total


@nb.njit(cache=True, nogil=True)
def _sign_states(count, tile, t, feedback, forward, path, signs, j):  # type: ignore[no-untyped-def]
    """Signs of what the symbols stand for, and the next states of the trellises."""
    for lane in range(count):
        v = tile[t, lane]
        odd = np.int8(path[lane] & 1)
        sign = np.int8(np.int8(v > 0) - np.int8(v < 0))
        signs[j, lane] = np.int8((sign ^ -odd) + odd)
        path[lane] = np.int8((path[lane] >> 1) ^ (feedback & -odd) ^ (forward & -np.int8(v & 1)))


@nb.njit(cache=True, nogil=True)
def _content(fresh, begins):  # type: ignore[no-untyped-def]
    """Information content in bits of the tokens since the last time, which are forgotten."""
    bits = 0.0
    for c in range(tables.NUM_CONTEXTS):
        for k in range(_TOKENS):
            row = c * (_TOKENS + 1) + k
            bits += fresh[c * _TOKENS + k] * _LOG2[begins[row + 1] - begins[row]]
            fresh[c * _TOKENS + k] = 0
    return bits


@nb.njit(cache=True, nogil=True)
def _learn(counts, fresh, touched, begins):  # type: ignore[no-untyped-def]
    """The tables after the tokens since the last time; returns their information content in bits."""
    bits = 0.0
    for c in range(tables.NUM_CONTEXTS):
        if not touched[c]:
            continue
        touched[c] = 0
        fast, slow = 0, 0
        for k in range(_TOKENS):
            row = c * (_TOKENS + 1) + k
            bits += fresh[c * _TOKENS + k] * _LOG2[begins[row + 1] - begins[row]]
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
    return bits
