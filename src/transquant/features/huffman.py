"""Canonical Huffman codes of limited length, several at once: one for every row of a plane of symbols.

Lengths by package-merge (Larmore and Hirschberg, J. ACM 37, 1990), which is optimal under the limit. Codes are canonical: in
order of length, then of symbol, so that lengths alone say everything. Bits are written highest first, rows after one another;
zero bits fill the last byte. An alphabet of one symbol takes no bits. Decoding looks 11 bits up and compares the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numba as nb
import numpy as np
from numpy.typing import NDArray

from transquant.errors import CorruptFile, InputError

MAX_LENGTH = 16
_LOOKED_UP = 11
_LONG = -1  # in the lookup: the code is longer
_REST = MAX_LENGTH - _LOOKED_UP


def code_lengths(frequencies: NDArray[np.uint16], limit: int = MAX_LENGTH) -> NDArray[np.uint8]:
    """Lengths uint8 (S,) of the best prefix code for frequencies (S,), none above `limit`. Raises InputError where S > 2^limit."""
    size = len(frequencies)
    if size > 1 << limit:
        raise InputError(f"a code of {size:,} symbols was asked for, codes of at most {limit} bits can have {1 << limit:,}")
    lengths = np.zeros(size, np.uint8)
    order = np.argsort(frequencies, kind="stable")
    leaves = frequencies[order].astype(np.int64)
    packages = np.empty(0, np.int64)
    of_leaves = []
    for _ in range(limit):
        items = np.concatenate([leaves, packages])
        sorting = np.argsort(items, kind="stable")
        of_leaves.append(sorting < size)
        items = items[sorting]
        packages = items[: len(items) // 2 * 2].reshape(-1, 2).sum(1)
    taken = 2 * size - 2
    for is_leaf in reversed(of_leaves):
        used = int(np.count_nonzero(is_leaf[:taken]))
        lengths[order[:used]] += 1
        taken = 2 * (taken - used)
    return lengths


def frequencies_of(counts: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Counts (S,) as frequencies from 1 to 65,535, so that every symbol has a code."""
    largest = float(counts.max())
    scaled = np.rint(counts * (65_535 / largest)) if largest > 0 else np.ones(len(counts))
    return np.clip(scaled, 1, 65_535).astype(np.uint16)


@dataclass(frozen=True, eq=False)
class HuffmanTables:
    """T codes of the same S symbols: lengths uint8 (T, S). Raises CorruptFile where they are not those of complete codes."""

    lengths: NDArray[np.uint8]

    def __post_init__(self) -> None:
        if self.lengths.ndim != 2 or not self.lengths.size or self.lengths.max() > MAX_LENGTH:
            raise CorruptFile("a Huffman table is empty or has codes that are too long")
        kraft = np.sum(np.int64(1) << (MAX_LENGTH - self.lengths.astype(np.int64)), 1)
        if np.any(kraft != 1 << MAX_LENGTH):
            raise CorruptFile("a Huffman table is not one of a complete prefix code")

    @classmethod
    def of(cls, frequencies: NDArray[np.uint16]) -> HuffmanTables:
        """The best codes for frequencies (T, S)."""
        return cls(np.stack([code_lengths(row) for row in frequencies]))

    def encode(self, symbols: NDArray[np.int32], tables: NDArray[np.int64]) -> bytes:
        """Symbols 0 to S−1, int32 (rows, columns), each row by one of the tables, (rows,). Raises InputError for other symbols."""
        words = np.empty(symbols.size // 2 + 2, np.uint32)
        bits = _encode(np.ascontiguousarray(symbols, np.int32), self._codes, tables, words)
        if bits < 0:
            raise InputError(f"a symbol to code is out of range, allowed are 0 to {self.lengths.shape[1] - 1}")
        return words[: -(-bits // 32)].astype(">u4").tobytes()[: -(-bits // 8)]

    def decode(self, data: bytes, tables: NDArray[np.int64], columns: int) -> NDArray[np.int32]:
        """The mirror, int32 (rows, columns). Raises CorruptFile where data is shorter, longer, or filled with other than zeros."""
        if columns * int(self.lengths.min(1)[tables].sum(dtype=np.int64)) > 8 * len(data):
            raise CorruptFile(f"Huffman codes of {len(data)} bytes are too short for {len(tables)} x {columns} symbols")
        symbols = np.empty((len(tables), columns), np.int32)
        words = np.frombuffer(data + bytes(-len(data) % 4 + 4), ">u4").astype(np.uint32)
        bits = _decode(words, tables, *self._lookup, symbols)
        if bits < 0 or -(-bits // 8) != len(data):
            raise CorruptFile(f"Huffman codes of {len(data)} bytes do not end where their symbols do")
        if bits % 8 and data[-1] & ((1 << (8 - bits % 8)) - 1):
            raise CorruptFile("Huffman codes are not followed by zero bits")
        return symbols

    @cached_property
    def _sorted(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Symbols in the codes' order, their lengths, and their codes followed by zeros up to MAX_LENGTH bits: (T, S) each."""
        symbols = np.argsort(self.lengths, 1, kind="stable")
        lengths = np.take_along_axis(self.lengths, symbols, 1).astype(np.int64)
        ends = np.cumsum(np.int64(1) << (MAX_LENGTH - lengths), 1)
        return symbols, lengths, ends - (np.int64(1) << (MAX_LENGTH - lengths))

    @cached_property
    def _codes(self) -> NDArray[np.int32]:
        """Code · 32 + length, int32 (T, S)."""
        symbols, lengths, starts = self._sorted
        codes = np.empty(symbols.shape, np.int32)
        np.put_along_axis(codes, symbols, ((starts >> (MAX_LENGTH - lengths)) << 5 | lengths).astype(np.int32), 1)
        return codes

    @cached_property
    def _lookup(self) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
        """By the first bits: symbol · 32 + length, (T, 2048); by length: where codes end, filled up, and what to add to a code
        for its place in the order, (T, 17) each; the order, (T, S)."""
        symbols, lengths, starts = self._sorted
        lookup = np.full((len(symbols), 1 << _LOOKED_UP), _LONG, np.int32)
        ends = np.zeros((len(symbols), MAX_LENGTH + 1), np.int64)
        shifts = np.zeros((len(symbols), MAX_LENGTH + 1), np.int64)
        for t in range(len(symbols)):
            short = int(np.searchsorted(lengths[t], _LOOKED_UP, "right"))
            entries = np.repeat(symbols[t, :short] << 5 | lengths[t, :short], 1 << (_LOOKED_UP - lengths[t, :short]))
            lookup[t, : len(entries)] = entries
            for length in range(_LOOKED_UP + 1, MAX_LENGTH + 1):
                first = int(np.searchsorted(lengths[t], length))
                after = int(np.searchsorted(lengths[t], length, "right"))
                end = 1 << MAX_LENGTH if after == symbols.shape[1] else int(starts[t, after])
                ends[t, length] = end
                if after > first:
                    shifts[t, length] = first - (starts[t, first] >> (MAX_LENGTH - length))
        return lookup, ends, shifts, symbols.astype(np.int32)


@nb.njit(cache=True, nogil=True)
def _encode(symbols, codes, tables, words):  # type: ignore[no-untyped-def]
    """Write codes to words; how many bits they took, or -1 where a symbol has none."""
    rows, columns = symbols.shape
    size = codes.shape[1]
    held, bits, pos = np.int64(0), np.int64(0), 0  # bits that wait to be written
    for i in range(rows):
        code = codes[tables[i]]
        for j in range(columns):
            symbol = symbols[i, j]
            if symbol < 0 or symbol >= size:
                return -1
            entry = np.int64(code[symbol])
            length = entry & 31
            held = (held << length) | (entry >> 5)
            bits += length
            if bits >= 32:
                bits -= 32
                words[pos] = held >> bits
                held &= (1 << bits) - 1
                pos += 1
    if bits > 0:
        words[pos] = held << (32 - bits)
    return 32 * pos + bits


@nb.njit(cache=True, nogil=True)
def _decode(words, tables, lookup, ends, shifts, order, symbols):  # type: ignore[no-untyped-def]
    """Read symbols; how many bits they took, or -1 where the words end before."""
    rows, columns = symbols.shape
    held, bits, pos = np.int64(0), np.int64(0), 0
    for i in range(rows):
        t = tables[i]
        by_bits = lookup[t]
        for j in range(columns):
            if bits < MAX_LENGTH:
                if pos < len(words):
                    held = (held << 32) | np.int64(words[pos])
                    bits += 32
                    pos += 1
                else:
                    return -1
            ahead = held >> (bits - MAX_LENGTH)
            entry = np.int64(by_bits[ahead >> _REST])
            length = entry & 31
            if entry >= 0:
                symbols[i, j] = entry >> 5
            else:
                length = np.int64(_LOOKED_UP + 1)
                while ahead >= ends[t, length]:
                    length += 1
                symbols[i, j] = order[t, shifts[t, length] + (ahead >> (MAX_LENGTH - length))]
            bits -= length
            held &= (1 << bits) - 1
    return 32 * pos - bits
