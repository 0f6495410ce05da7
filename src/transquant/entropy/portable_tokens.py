"""The token model of `tokens` with numpy alone, vectorised over lanes; gives the same integers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from transquant.entropy import tables
from transquant.entropy.portable_rans import Int64, Reader
from transquant.errors import CorruptFile
from transquant.records import IntArray

_LEVEL = tables.LEVEL_OF
_BITS_OF_MEAN = np.array([int(t).bit_length() for t in range(1 << 12)], np.int64)


class Tokens:
    """Tables of the tokens of planes with or without a trellis: adaptive counts, or laws that stay, corrected or not."""

    def __init__(self, trellis: bool, adaptive: bool, corrections: IntArray | None = None) -> None:
        self.adaptive, self.counts = adaptive, tables.first_token_counts(trellis).astype(np.int64)
        if corrections is not None:
            begins = tables.corrected_tables(trellis, corrections)
        else:
            begins = tables.adapted(self.counts) if adaptive else tables.law_tables(trellis)
        self.begins = begins.astype(np.int64)
        self.fresh = np.zeros(self.counts[0].size, np.int64)
        self.since = self.seen = 0

    def note(self, context: Int64, token: Int64) -> None:
        """Tokens that came, for the next `learn`."""
        if self.adaptive:
            self.fresh += np.bincount(context * tables.TOKENS + token, minlength=len(self.fresh))

    def column(self, count: int) -> None:
        """A column of `count` lanes is over."""
        self.since += count
        self.seen += count
        if self.since >= min(tables.REBUILD, self.seen >> tables.REBUILD_SHIFT):
            self.learn()

    def learn(self) -> None:
        """The tables after the tokens since the last time."""
        self.since = 0
        if not self.adaptive:
            return
        fresh = self.fresh.reshape(-1, tables.TOKENS)
        touched = np.flatnonzero(fresh.sum(1))
        if touched.size:
            counts = self.counts[:, touched] + tables.ONE_TOKEN * fresh[touched]
            for part, limit in zip(counts, (tables.FAST_TOTAL, tables.SLOW_TOTAL), strict=True):
                while (over := part.sum(1) > limit).any():
                    part[over] = (part[over] + 1) >> 1
            self.counts[:, touched] = counts
            self.begins[touched] = tables.adapted(counts)
            self.fresh[:] = 0


def token_plane(
    reader: Reader, q: IntArray, width: int, taps: int, code: tuple[int, int], lanes: int, tokens: Tokens, start: int
) -> int:
    """Fill one plane int32 (rows, columns); `start` is the average that rows begin with, and so is what it returns for the next
    plane. Raises CorruptFile."""
    rows, columns = q.shape
    col = np.zeros(columns, np.int64)
    shift_of_columns = tables.column_shift(lanes)
    for first in range(0, rows, lanes):
        count = min(lanes, rows - first)
        fast, slow = np.full(count, start, np.int64), np.full(count, start, np.int64)
        path = np.zeros(count, np.int64)
        signs = np.zeros((columns + 1, count), np.int8)  # the last row stays 0
        block = np.zeros((columns, count), np.int32)
        for j in range(columns):
            mean = (3 * fast + 5 * slow) >> 3
            if first:
                around = (2 * int(col[j]) + int(col[max(j - 1, 0)]) + int(col[min(j + 1, columns - 1)])) >> 2
                mean = (mean + around) >> 1
            odd = path & 1
            context = tables.SIGNS * _LEVEL[np.minimum(mean, len(_LEVEL) - 1)] + tables.SIGNS // 2
            if tokens.adaptive:
                left = j - 1 if j > 0 and (width == 1 or j % width) else columns
                above = j - width if j % taps >= width else columns
                context += _flipped(signs[left] + signs[above], odd)
            value = _values(reader, tokens, context, mean)
            if np.abs(value).max() > tables.MAX_SYMBOL:
                raise CorruptFile("a symbol section ends early or holds a symbol that is too large")
            tokens.column(count)
            size = np.abs(value)
            fast += ((size << 8) - fast) >> 2
            slow += ((size << 8) - slow) >> 5
            signs[j] = _flipped(np.sign(value), odd)
            path = (path >> 1) ^ (code[0] * odd) ^ (code[1] * (value & 1))
            block[j] = value
            average = (int(size.sum()) << 8) // count
            col[j] = average if not first else int(col[j]) + ((average - int(col[j])) >> shift_of_columns)
        q[first : first + count] = block.T
        start = int(col.sum()) // columns
    tokens.learn()
    return start


def _values(reader: Reader, tokens: Tokens, context: Int64, mean: Int64) -> Int64:
    """The symbols of one column: int64 (count,)."""
    everyone = np.arange(len(context))
    token = reader.tokens(everyone, tokens.begins[context])
    tokens.note(context, token)
    value = token - tables.MIDDLE
    escaped = (token == tables.ESCAPE).nonzero()[0]
    if escaped.size:
        lengths = np.full(len(escaped), tables.LENGTHS)
        length = reader.tokens(escaped, tokens.begins[lengths])
        tokens.note(lengths, length)
        long = length >= tables.LONGEST
        below = np.where(long, 10, length)
        chunk = reader.chunks(escaped, below + 1)
        above = chunk & ((1 << below) - 1)
        above = np.where(long, above << 10, above + (1 << below) - 1)
        if long.any():
            above[long] += reader.chunks(escaped[long], np.full(int(long.sum()), 10))
        size = above + tables.MIDDLE + 1
        value[escaped] = np.where(chunk >> below, -size, size)
    shifted = (mean >= tables.THRESHOLDS[tables.SHIFT_LEVEL - 1]).nonzero()[0]
    if shifted.size:
        m = mean[shifted] >> 8
        bits = _BITS_OF_MEAN[np.minimum(m, len(_BITS_OF_MEAN) - 1)]
        if m.max() >= len(_BITS_OF_MEAN):
            bits = np.array([int(t).bit_length() for t in m], np.int64)
        shift = np.minimum(bits - 2, tables.MAX_SHIFT)
        value[shifted] = (value[shifted] << shift) + reader.chunks(shifted, shift)
    return value


def _flipped(sign: NDArray[np.integer[Any]], odd: Int64) -> Int64:
    """Signs as an odd state sees them."""
    return np.where(odd, -sign, sign).astype(np.int64)
