"""Interleaved rANS (FORMAT.md section 5): events of 14-bit probability from the lanes' states and back, compiled.

What is put into other functions here takes numbers only: to hand arrays on counts references, which costs more than an event.

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
def event(lane, start, freq):  # type: ignore[no-untyped-def]
    """What the log holds of an event of probability freq / 2^14 whose range begins at start."""
    return (lane << 32) | (start << 16) | freq


@nb.njit(cache=True, nogil=True, inline="always")
def plain_event(lane, value, length):  # type: ignore[no-untyped-def]
    """The same of `length` bits, 1 to 14, that are as likely 0 as 1."""
    return (lane << 32) | (value << (16 + _BITS - length)) | (1 << (_BITS - length))


@nb.njit(cache=True, nogil=True, inline="always")
def leave(x, start, freq):  # type: ignore[no-untyped-def]
    """A state, an int64, after an event, without the word it may need."""
    return freq * (x >> _BITS) + (x & (_ONE - 1)) - start


@nb.njit(cache=True, nogil=True, inline="always")
def leave_plain(x, length):  # type: ignore[no-untyped-def]
    """The same after plain bits."""
    rest = _BITS - length
    return ((x >> _BITS) << rest) + (x & ((1 << rest) - 1))


@nb.njit(cache=True, nogil=True)
def code_bit(decoding, bit, p, lane, states, words, log, cursor):  # type: ignore[no-untyped-def]
    """Code one decision whose probability of a 1 is p / 2^14: log it, or take it from the lane's state."""
    if not decoding:
        log[cursor[0]] = event(lane, 0 if bit else p, p if bit else _ONE - p)
        cursor[0] += 1
        return bit
    x = np.int64(states[lane])
    bit = 1 if (x & (_ONE - 1)) < p else 0
    x = leave(x, 0 if bit else p, p if bit else _ONE - p)
    if x < _LOW:
        if cursor[1] < len(words) - tables.SPARE_WORDS:
            x = (x << 16) | np.int64(words[cursor[1]])
            cursor[1] += 1
        else:
            cursor[2] = 1
            x = np.int64(_LOW)
    states[lane] = x
    return bit


@nb.njit(cache=True, nogil=True)
def rans_encode(log, states):  # type: ignore[no-untyped-def]
    """Code a log, uint64, from its end into the lanes' states, uint32 (lanes,), in place: a decoder has them before these events.

    Returns the words in reading order, uint16."""
    words = np.empty(len(log) + 1, np.uint16)  # at most one word an event
    pos = len(words)
    for k in range(len(log) - 1, -1, -1):
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
    return words[pos:]
