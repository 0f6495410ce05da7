"""What tokens leave open (FORMAT.md section 5, stages 2 to 5): values of escapes, and low bits of large symbols, compiled."""

from __future__ import annotations

import numba as nb
import numpy as np

from transquant.entropy import tables
from transquant.entropy.rans import event, leave, leave_plain, plain_event

_MAX, _MIDDLE, _LONGEST = tables.MAX_SYMBOL, tables.MIDDLE, tables.LONGEST
_FIRST, _FIRST_BEGIN = tables.LENGTHS * tables.TOKENS, tables.LENGTHS * (tables.TOKENS + 1)  # where lengths are counted, and begin
_MASK, _BITS, _LOW = tables.P_ONE - 1, tables.P_BITS, tables.STATE_LOW
_TEN = 10  # bits of a long value that come last


@nb.njit(cache=True, nogil=True)
def read_rest(  # type: ignore[no-untyped-def]
    number, escapes, shifted, wide, shift, fresh, touched, begins, column, states, words, cursor
):
    """Values of the lanes whose tokens are escapes, then the low bits of those that have such.

    May read a column's events beyond the last word, which callers see from the cursor."""
    pos = cursor[1]
    length, high = np.zeros(number, np.int64), np.zeros(number, np.int64)
    for i in range(number):
        lane = escapes[i]
        x = np.int64(states[lane])
        low = x & _MASK
        k = 0
        while np.int64(begins[_FIRST_BEGIN + k + 1]) <= low:
            k += 1
        begin = np.int64(begins[_FIRST_BEGIN + k])
        x = leave(x, begin, np.int64(begins[_FIRST_BEGIN + k + 1]) - begin)
        if x < _LOW:
            x = (x << 16) | np.int64(words[pos])
            pos += 1
        states[lane] = x
        length[i] = min(k, _LONGEST)
        fresh[_FIRST + k] += np.uint32(1)
        touched[tables.LENGTHS] = 1
    for i in range(number):
        lane = escapes[i]
        below = _TEN if length[i] == _LONGEST else length[i]
        x = np.int64(states[lane])
        value = (x & _MASK) >> (_BITS - below - 1)
        x = leave_plain(x, below + 1)
        if x < _LOW:
            x = (x << 16) | np.int64(words[pos])
            pos += 1
        states[lane] = x
        above = value & ((1 << below) - 1)
        above = above << _TEN if length[i] == _LONGEST else above + (1 << below) - 1
        high[i] = above + _MIDDLE + 1
        column[lane] = -1 if value >> below else 1
    for i in range(number):
        lane = escapes[i]
        if length[i] == _LONGEST:
            x = np.int64(states[lane])
            high[i] += (x & _MASK) >> (_BITS - _TEN)
            x = leave_plain(x, _TEN)
            if x < _LOW:
                x = (x << 16) | np.int64(words[pos])
                pos += 1
            states[lane] = x
            if high[i] > _MAX:
                cursor[2] = 1
        column[lane] *= high[i]
    for i in range(shifted):
        lane = wide[i]
        x = np.int64(states[lane])
        low = (x & _MASK) >> (_BITS - shift[lane])
        x = leave_plain(x, shift[lane])
        if x < _LOW:
            x = (x << 16) | np.int64(words[pos])
            pos += 1
        states[lane] = x
        value = (np.int64(column[lane]) << shift[lane]) + low
        if abs(value) > _MAX:
            cursor[2] = 1
        column[lane] = value
    cursor[1] = pos


@nb.njit(cache=True, nogil=True)
def write_rest(number, escapes, shifted, wide, shift, fresh, touched, begins, column, log, cursor):  # type: ignore[no-untyped-def]
    """The same to the log."""
    pos = cursor[0]
    length, high = np.zeros(number, np.int64), np.zeros(number, np.int64)
    for i in range(number):
        lane = np.int64(escapes[i])
        high[i] = np.int64(column[lane]) >> shift[lane] if shifted else np.int64(column[lane])
        while length[i] < _LONGEST and (abs(high[i]) - _MIDDLE) >> (length[i] + 1) > 0:
            length[i] += 1
        begin = np.int64(begins[_FIRST_BEGIN + length[i]])
        log[pos] = event(lane, begin, np.int64(begins[_FIRST_BEGIN + length[i] + 1]) - begin)
        pos += 1
        fresh[_FIRST + length[i]] += np.uint32(1)
        touched[tables.LENGTHS] = 1
    for i in range(number):
        above, below = abs(high[i]) - _MIDDLE - 1, length[i]
        value = above + 1 - (1 << below)
        if length[i] == _LONGEST:
            value, below = above >> _TEN, _TEN
        log[pos] = plain_event(np.int64(escapes[i]), value + ((1 << below) if high[i] < 0 else 0), below + 1)
        pos += 1
    for i in range(number):
        if length[i] == _LONGEST:
            log[pos] = plain_event(np.int64(escapes[i]), (abs(high[i]) - _MIDDLE - 1) & ((1 << _TEN) - 1), _TEN)
            pos += 1
    for i in range(shifted):
        lane = np.int64(wide[i])
        log[pos] = plain_event(lane, np.int64(column[lane]) & ((1 << shift[lane]) - 1), shift[lane])
        pos += 1
    cursor[0] = pos
