"""Symbols of a map to bytes and back: each is predicted from its neighbours in the plane and from two planes before it.

    neighbours, reference planes ─ μ: weighted sum of symbols ──────── integer part p; where μ lies beside it: class
                                 └ s: weighted sum of |symbol − p| ─── bin
    symbol − p ─ table of (class, bin) ─ rANS (entropy/rans.py)

All in integers, weights in units of 1/256, so that every machine has the same tables and the same p. Tables are learned in
calibration and stay as they are: a packet decodes without any other. One kernel encodes and decodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba as nb
import numpy as np
from numpy.typing import NDArray

from transquant.entropy import tables as rans_tables
from transquant.entropy.rans import event, leave, leave_plain, plain_event, rans_encode
from transquant.errors import CorruptFile
from transquant.features.records import IntMap

TOKENS, ESCAPE, MIDDLE = 32, 31, 15  # symbol − p from −15 to 15, and all else
BINS = 24  # of s, each a third wider than the last
CLASSES = 12  # of μ: four within p = 0, p = 1, and p > 1 each (maps of any sign: the last four)
AROUND, TAPS, REFERENCES = 6, 3, 2
LUT, LUT_SHIFT = 2048, 1  # entries of the table from s to its bin, and how much of s an entry spans
LANES, SMALL = 4, 4096  # lanes of rANS; below so many symbols one
LONGEST = 23  # bits below the leading one of an escaped symbol's distance and sign
FURTHEST = 32767  # of p, and of what is seen of a symbol
COARSE = 6  # a table's first guess at a token: by the upper 8 of 14 bits
_ONE, _LOW = rans_tables.P_ONE, rans_tables.STATE_LOW
# borders in s, in units of 1/256 symbol
CUTS = (2, 4, 7, 11, 16, 23, 32, 43, 57, 75, 98, 128, 167, 218, 285, 372, 485, 632, 824, 1074, 1400, 1825, 2379)
BIN_OF = np.searchsorted(np.array(CUTS), np.arange(LUT) << LUT_SHIFT, side="right").astype(np.uint8)

Int16 = NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class Predictor:
    """Weights in units of 1/256. `mean` int16 (K, 1 + 6 + 2·3): constant; left, above, above left, above right, left of left,
    above above; of each reference plane at the pixel, left and above. `scale` int16 (K, 1 + 4 + 2): constant; left, above,
    above left, above right; reference planes at the pixel. `references` int16 (K, 2), earlier planes, -1 where there is none."""

    mean: Int16
    scale: Int16
    references: Int16
    nonnegative: bool


@dataclass(frozen=True, slots=True)
class Tables:
    """`begins` uint16 (CLASSES · BINS, TOKENS + 1), cumulative in units of 2^-14."""

    begins: NDArray[np.uint16]
    first: NDArray[np.uint8]  # (CLASSES · BINS, 256): the token in which such a state's upper bits begin

    @classmethod
    def of(cls, begins: NDArray[np.uint16]) -> Tables:
        """With the lookup that decoding uses. Raises CorruptFile where they are no tables."""
        wide = begins.astype(np.int64)
        shape = (CLASSES * BINS, TOKENS + 1)
        if begins.shape != shape or wide[:, 0].any() or (wide[:, -1] != _ONE).any() or (np.diff(wide) < 1).any():
            raise CorruptFile("a feature codec's tables are not cumulative frequencies")
        starts = np.arange(256) << COARSE
        first = np.array([np.searchsorted(row, starts, side="right") - 1 for row in wide], np.uint8)
        return cls(begins, first)

    def content(self, seen: NDArray[np.int64]) -> float:
        """Information content in bits of what `count` has seen."""
        bits = rans_tables.P_BITS - np.log2(np.diff(self.begins.astype(np.int64), axis=1))
        return float((seen[:, :TOKENS] * bits).sum() + seen[:, TOKENS].sum())


@nb.njit(cache=True, nogil=True, inline="always")
def _bits_of(value):  # type: ignore[no-untyped-def]
    length = 0
    while value:
        value >>= 1
        length += 1
    return length


@nb.njit(cache=True, nogil=True)
def _log_escape(folded, lane, log, cursor):  # type: ignore[no-untyped-def]
    """Five bits of the length of `folded`, and what is below its leading bit."""
    left = _bits_of(folded) - 1
    log[cursor[0]] = plain_event(lane, left + 1, 5)
    cursor[0] += 1
    while left > 0:
        part = min(left, 14)
        log[cursor[0]] = plain_event(lane, (folded >> (left - part)) & ((1 << part) - 1), part)
        cursor[0] += 1
        left -= part


@nb.njit(cache=True, nogil=True)
def _take_plain(length, lane, states, words, cursor):  # type: ignore[no-untyped-def]
    state = np.int64(states[lane])
    value = (state & (_ONE - 1)) >> (rans_tables.P_BITS - length)
    state = leave_plain(state, length)
    if state < _LOW:
        if cursor[1] < len(words):
            state = (state << 16) | np.int64(words[cursor[1]])
            cursor[1] += 1
        else:
            cursor[2] = 1
            state = np.int64(_LOW)
    states[lane] = state
    return value


@nb.njit(cache=True, nogil=True)
def _take_escape(lane, states, words, cursor):  # type: ignore[no-untyped-def]
    left = _take_plain(5, lane, states, words, cursor) - 1
    if left < 0 or left > LONGEST:
        cursor[2] = 1
        return np.int64(1)
    folded = np.int64(1)
    while left > 0:
        part = min(left, 14)
        folded = (folded << part) | _take_plain(part, lane, states, words, cursor)
        left -= part
    return folded


@nb.njit(cache=True, nogil=True)
def code_map(  # type: ignore[no-untyped-def]
    decoding, symbols, mean, scale, references, nonnegative, begins, bins, first, lanes, states, words, log, cursor, seen, counting
):
    """Code int32 (K, H, W) `symbols`: log the events of what is there, or fill it from `states` and `words`. Counting: only add up
    in `seen` int64 (CLASSES · BINS, TOKENS + 1) what each table meets, at last the bits of escapes."""
    channels, height, width = symbols.shape
    plane = np.zeros((channels, height + 2, width + 3), np.int32)  # symbols, zeros around: two rows above, two left, one right
    left_over = np.zeros((channels, height + 2, width + 3), np.int32)  # |symbol − p|
    for k in range(channels):
        m, s = mean[k], scale[k]
        first_reference, second_reference = references[k, 0], references[k, 1]
        own, own_rest = plane[k], left_over[k]
        for y in range(height):
            row, above, above2 = own[y + 2], own[y + 1], own[y]
            rest, rest_above = own_rest[y + 2], own_rest[y + 1]
            for x in range(width):
                i = x + 2
                mu = np.int64(m[0]) + m[1] * row[i - 1] + m[2] * above[i] + m[3] * above[i - 1] + m[4] * above[i + 1]
                mu += m[5] * row[i - 2] + m[6] * above2[i]
                sigma = (
                    np.int64(s[0]) + s[1] * rest[i - 1] + s[2] * rest_above[i] + s[3] * rest_above[i - 1] + s[4] * rest_above[i + 1]
                )
                if first_reference >= 0:
                    other = plane[first_reference]
                    mu += m[7] * other[y + 2, i] + m[8] * other[y + 2, i - 1] + m[9] * other[y + 1, i]
                    sigma += s[5] * left_over[first_reference, y + 2, i]
                if second_reference >= 0:
                    other = plane[second_reference]
                    mu += m[10] * other[y + 2, i] + m[11] * other[y + 2, i - 1] + m[12] * other[y + 1, i]
                    sigma += s[6] * left_over[second_reference, y + 2, i]
                p = min(max((mu + 128) >> 8, -FURTHEST), FURTHEST)
                if nonnegative and p <= 0:
                    p = 0
                    kind = (mu >= 12) + (mu >= 32) + (mu >= 72)
                else:
                    kind = ((mu + 128) >> 6) & 3
                    kind += 4 if nonnegative and p == 1 else 8
                entry = sigma >> LUT_SHIFT
                entry = 0 if entry < 0 else (LUT - 1 if entry >= LUT else entry)
                table = kind * BINS + bins[entry]
                symbol = np.int64(symbols[k, y, x])
                lane = x & (lanes - 1)
                token = symbol - p + MIDDLE
                if token < 0 or token >= ESCAPE:
                    token = np.int64(ESCAPE)
                if counting:
                    seen[table, token] += 1
                elif decoding:
                    state = np.int64(states[lane])
                    low = state & (_ONE - 1)
                    token = np.int64(first[table, low >> COARSE])
                    while begins[table, token + 1] <= low:
                        token += 1
                    start = np.int64(begins[table, token])
                    state = leave(state, start, np.int64(begins[table, token + 1]) - start)
                    if state < _LOW:
                        if cursor[1] >= len(words):
                            cursor[2] = 1
                            return
                        state = (state << 16) | np.int64(words[cursor[1]])
                        cursor[1] += 1
                    states[lane] = state
                    symbol = p + token - MIDDLE
                else:
                    start = np.int64(begins[table, token])
                    log[cursor[0]] = event(lane, start, np.int64(begins[table, token + 1]) - start)
                    cursor[0] += 1
                if token == ESCAPE:
                    distance = symbol - p
                    folded = 2 * distance + 1 if distance >= 0 else -2 * distance  # from 1
                    if counting:
                        seen[table, TOKENS] += 4 + _bits_of(folded)
                    elif decoding:
                        folded = _take_escape(lane, states, words, cursor)
                        symbol = p + (folded >> 1 if folded & 1 else -(folded >> 1))
                    else:
                        _log_escape(folded, lane, log, cursor)
                if decoding:
                    if cursor[2]:
                        return
                    symbols[k, y, x] = symbol
                bounded = min(max(symbol, -FURTHEST), FURTHEST)
                row[i] = bounded
                rest[i] = min(abs(symbol - p), FURTHEST)


def _lanes(count: int) -> int:
    return LANES if count >= SMALL else 1


_NO_STATES, _NO_WORDS, _NO_LOG = np.zeros(1, np.uint32), np.zeros(1, np.uint16), np.zeros(1, np.uint64)
_NO_COUNTS = np.zeros((1, 1), np.int64)


def encode(symbols: IntMap, predictor: Predictor, tables: Tables) -> bytes:
    """The payload of symbols int32 (K, H, W)."""
    lanes = _lanes(symbols.size)
    log, cursor = np.empty(4 * symbols.size, np.uint64), np.zeros(3, np.int64)  # an escape is four events at most
    code_map(
        False, symbols, predictor.mean, predictor.scale, predictor.references, predictor.nonnegative, tables.begins, BIN_OF,
        tables.first, lanes, _NO_STATES, _NO_WORDS, log, cursor, _NO_COUNTS, False,
    )  # fmt: skip
    states = np.full(lanes, _LOW, np.uint32)
    words = rans_encode(log[: cursor[0]], states)
    return bytes(states.astype("<u4").tobytes() + words.astype("<u2").tobytes())


def decode(data: bytes, shape: tuple[int, int, int], predictor: Predictor, tables: Tables) -> IntMap:
    """Symbols int32 (K, H, W). Raises CorruptFile."""
    symbols = np.zeros(shape, np.int32)
    lanes = _lanes(symbols.size)
    if len(data) < 4 * lanes or len(data) % 2:
        raise CorruptFile(f"a feature map's payload of {len(data)} bytes is too short or odd")
    states = np.frombuffer(data, "<u4", lanes).astype(np.uint32)
    if int(states.min()) < _LOW:
        raise CorruptFile("an initial state of a feature map's payload is out of range")
    words = np.frombuffer(data, "<u2", offset=4 * lanes).astype(np.uint16)
    cursor = np.zeros(3, np.int64)
    code_map(
        True, symbols, predictor.mean, predictor.scale, predictor.references, predictor.nonnegative, tables.begins, BIN_OF,
        tables.first, lanes, states, words, _NO_LOG, cursor, _NO_COUNTS, False,
    )  # fmt: skip
    if cursor[2] or cursor[1] != len(words) or (states != _LOW).any():
        raise CorruptFile("a feature map's payload does not end where its symbols do")
    return symbols


def count(symbols: IntMap, predictor: Predictor) -> NDArray[np.int64]:
    """What each table meets in symbols int32 (K, H, W): int64 (CLASSES · BINS, TOKENS + 1), at last the bits of escapes."""
    seen, begins = np.zeros((CLASSES * BINS, TOKENS + 1), np.int64), np.zeros((1, 1), np.uint16)
    code_map(
        False, symbols, predictor.mean, predictor.scale, predictor.references, predictor.nonnegative, begins, BIN_OF,
        np.zeros((1, 1), np.uint8), 1, _NO_STATES, _NO_WORDS, _NO_LOG, np.zeros(3, np.int64), seen, True,
    )  # fmt: skip
    return seen


def learned(seen: NDArray[np.int64]) -> Tables:
    """Tables from counts (CLASSES · BINS, TOKENS + 1): tables that met little lean on all of their class."""
    counts = seen[:, :TOKENS].astype(np.float64).reshape(CLASSES, BINS, TOKENS)
    whole = counts.sum(1, keepdims=True) + 0.1
    prior = whole / whole.sum(2, keepdims=True)
    p = (counts + 24 * prior) / (counts.sum(2, keepdims=True) + 24)
    free = _ONE - TOKENS
    share = np.floor(p * free).astype(np.int64) + 1
    share = share.reshape(-1, TOKENS)
    share[np.arange(len(share)), share.argmax(1)] += _ONE - share.sum(1)
    begins = np.concatenate([np.zeros((len(share), 1), np.int64), np.cumsum(share, 1)], 1).astype(np.uint16)
    return Tables.of(begins)
