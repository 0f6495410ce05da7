"""Interleaved rANS (FORMAT.md section 5): events of 14-bit probability from the lanes' states and back, compiled.

Encoding logs the lane, start and frequency of every event while the models run forward; `rans_encode` then codes the log from
its end, because the states are a stack (Duda, arXiv 1311.2540; lanes after Giesen, arXiv 1402.3392).
"""

from __future__ import annotations

import numba as nb
import numpy as np

from transquant.entropy import tables

LOG, WORD, FAILED = 0, 1, 2  # a coder's cursor: position in the log, in the words, and whether a section is corrupt
_LOW, _ONE, _BITS = tables.STATE_LOW, tables.P_ONE, tables.P_BITS


@nb.njit(cache=True, nogil=True, inline="always")
def log_event(lane, start, freq, log, cursor):  # type: ignore[no-untyped-def]
    """Log an event of probability freq / 2^14 whose range begins at start."""
    log[cursor[0]] = (lane << 32) | (start << 16) | freq
    cursor[0] += 1


@nb.njit(cache=True, nogil=True, inline="always")
def take_event(x, start, freq, lane, states, words, cursor):  # type: ignore[no-untyped-def]
    """Leave the range of an event in the lane's state x, an int64."""
    x = freq * (x >> _BITS) + (x & (_ONE - 1)) - start
    if x < _LOW:
        if cursor[1] < len(words) - tables.SPARE_WORDS:
            x = (x << 16) | np.int64(words[cursor[1]])
            cursor[1] += 1
        else:
            cursor[2] = 1
            x = _LOW
    states[lane] = x


@nb.njit(cache=True, nogil=True)
def code_bit(decoding, bit, p, lane, states, words, log, cursor):  # type: ignore[no-untyped-def]
    """Code one decision whose probability of a 1 is p / 2^14: log it, or take it from the lane's state."""
    if decoding:
        x = np.int64(states[lane])
        bit = 1 if (x & (_ONE - 1)) < p else 0
        take_event(x, 0 if bit else p, p if bit else _ONE - p, lane, states, words, cursor)
    else:
        log_event(lane, 0 if bit else p, p if bit else _ONE - p, log, cursor)
    return bit


@nb.njit(cache=True, nogil=True)
def code_plain(decoding, value, length, lane, states, words, log, cursor):  # type: ignore[no-untyped-def]
    """Code `length` bits, 1 to 14, that are as likely 0 as 1."""
    rest = _BITS - length
    if decoding:
        x = np.int64(states[lane])
        value = (x & (_ONE - 1)) >> rest
        take_event(x, value << rest, 1 << rest, lane, states, words, cursor)
    else:
        log_event(lane, value << rest, 1 << rest, log, cursor)
    return value


@nb.njit(cache=True, nogil=True)
def rans_encode(log, num, lanes):  # type: ignore[no-untyped-def]
    """Code the first `num` entries of a log, uint64, from their end: the lanes' final states (the decoder's first), uint32
    (lanes,), and the words in reading order, uint16."""
    states = np.full(lanes, _LOW, np.uint32)
    words = np.empty(num + 1, np.uint16)  # at most one word an event
    pos = len(words)
    for k in range(num - 1, -1, -1):
        entry = np.int64(log[k])
        lane = entry >> 32
        freq = np.uint32(entry & 65535)
        x = states[lane]
        if np.int64(x) >= np.int64(freq) << (32 - _BITS):
            pos -= 1
            words[pos] = x & np.uint32(65535)
            x = np.uint32(x >> np.uint32(16))
        d = np.uint32(x // freq)
        states[lane] = (np.int64(d) << _BITS) + np.int64(x) - np.int64(d) * np.int64(freq) + ((entry >> 16) & 65535)
    return states, words[pos:]
