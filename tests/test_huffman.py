"""Huffman codes of feature maps: as short as they can be, canonical, exact."""

from __future__ import annotations

import heapq
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transquant.errors import CorruptFile, InputError
from transquant.features import huffman
from transquant.features.huffman import HuffmanTables, code_lengths, frequencies_of


def huffman_cost(frequencies):
    """Total length of an unlimited Huffman code: the sum of all inner nodes."""
    heap = [int(f) for f in frequencies]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        node = heapq.heappop(heap) + heapq.heappop(heap)
        total += node
        heapq.heappush(heap, node)
    return total


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 65_535), min_size=2, max_size=300))
def test_lengths_are_a_huffman_code_within_a_bit_of_the_entropy(frequencies):
    frequencies = np.array(frequencies, np.uint16)
    lengths = code_lengths(frequencies).astype(int)
    assert (0.5**lengths).sum() == 1
    p = frequencies / frequencies.sum(dtype=np.int64)
    entropy, mean = -(p * np.log2(p)).sum(), (p * lengths).sum()
    assert entropy - 1e-9 <= mean < entropy + 1
    if lengths.max() < huffman.MAX_LENGTH:
        assert (frequencies * lengths).sum() == huffman_cost(frequencies)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 2000), min_size=2, max_size=5), st.integers(3, 4))
def test_limited_lengths_are_the_best_there_are(frequencies, limit):
    lengths = code_lengths(np.array(frequencies, np.uint16), limit).astype(int)
    possible = [ls for ls in product(range(1, limit + 1), repeat=len(frequencies)) if sum(0.5**n for n in ls) <= 1]
    assert np.dot(frequencies, lengths) == min(np.dot(frequencies, ls) for ls in possible)


def test_lengths_are_limited_where_huffman_alone_would_not():
    fibonacci = [1, 1]
    while len(fibonacci) < 24:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = code_lengths(np.array(fibonacci, np.uint16))
    assert lengths.max() == huffman.MAX_LENGTH
    assert (0.5 ** lengths.astype(int)).sum() == 1
    with pytest.raises(InputError, match="5 symbols"):
        code_lengths(np.ones(5, np.uint16), 2)


def test_codes_are_canonical_and_bits_come_highest_first():
    tables = HuffmanTables(np.array([[2, 1, 3, 3]], np.uint8))  # 10 0 110 111
    row = np.zeros(1, np.int64)
    assert tables.encode(np.array([[0, 1, 2, 3, 1]], np.int32), row) == bytes([0b10011011, 0b10000000])
    assert tables.decode(bytes([0b10011011, 0b10000000]), row, 5).tolist() == [[0, 1, 2, 3, 1]]
    for broken in (bytes([0b10011011]), bytes([0b10011011, 0b10000001]), bytes([0b10011011, 0b10000000, 0]), b""):
        with pytest.raises(CorruptFile):
            tables.decode(broken, row, 5)


def random_tables(rng, count, size, steepness):
    return HuffmanTables.of(np.stack([frequencies_of(np.exp(-steepness * rng.permutation(size))) for _ in range(count)]))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 60), st.integers(1, 70), st.sampled_from([0.0, 0.2, 0.7, 3.0])
)  # fmt: skip
def test_symbols_come_back_whatever_their_code(seed, rows, columns, size, steepness):
    rng = np.random.default_rng(seed)
    tables = random_tables(rng, 3, size, steepness)
    table_of = rng.integers(0, 3, rows)
    symbols = rng.integers(0, size, (rows, columns)).astype(np.int32)  # those with long codes as often as others
    data = tables.encode(symbols, table_of)
    np.testing.assert_array_equal(tables.decode(data, table_of, columns), symbols)
    assert len(data) == -(-int(tables.lengths[table_of[:, None], symbols].sum()) // 8)
    words = np.zeros(symbols.size // 2 + 2, np.uint32)
    bits = huffman._encode.py_func(symbols, tables._codes, table_of, words)
    assert words.astype(">u4").tobytes()[: -(-bits // 8)] == data
    plain = np.empty_like(symbols)
    padded = np.frombuffer(data + bytes(-len(data) % 4 + 4), ">u4").astype(np.uint32)
    assert huffman._decode.py_func(padded, table_of, *tables._lookup, plain) == bits
    np.testing.assert_array_equal(plain, symbols)


@pytest.mark.parametrize("symbol", [-1, 4, 2**31 - 1])
def test_symbols_without_a_code_are_said(symbol):
    tables = HuffmanTables(np.full((1, 4), 2, np.uint8))
    with pytest.raises(InputError, match="0 to 3"):
        tables.encode(np.array([[0, symbol]], np.int32), np.zeros(1, np.int64))


@pytest.mark.parametrize("lengths", [[1, 2], [1, 1, 1], [0, 1], [17, 1], [2, 2, 2]])
def test_tables_that_are_no_complete_code(lengths):
    with pytest.raises(CorruptFile):
        HuffmanTables(np.array([lengths], np.uint8))
