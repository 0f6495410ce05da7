"""The same decoder with numpy alone, vectorised over lanes; gives the same integers as `lanes`.

FORMAT.md section 5 is written so that this is possible: the lanes of a block decide stage by stage, with probabilities
fixed during a stage, so each stage is a handful of array operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transquant.entropy import tables
from transquant.entropy.portable_rans import Int64, Reader
from transquant.entropy.portable_tokens import Tokens, token_plane
from transquant.errors import CorruptFile
from transquant.records import Coder, IntArray
from transquant.trellis_code import TRELLIS_CODES

_R, _LEVEL = tables.RECIPROCAL, tables.LEVEL_OF
_BIT_LENGTH = np.array([max(int(t).bit_length() - 3, 0) for t in range(1 << 12)], np.int64)


def _probabilities(c0: Int64, c1: Int64) -> Int64:
    p = (c1 * _R[c0 + c1]) >> (32 - tables.P_BITS)
    bounded: Int64 = np.minimum(np.maximum(p, tables.P_MIN), tables.P_MAX)  # np.clip, without its overhead
    return bounded


def _learn(counts: Int64, context: Int64, bit: NDArray[np.bool_]) -> None:
    """Add a stage's decisions to counts (contexts, 2) and bound them, in place."""
    seen = np.bincount(context + len(counts) * bit, minlength=2 * len(counts))
    counts += 2 * seen.reshape(2, -1).T
    while (over := counts[:, 0] + counts[:, 1] > tables.COUNT_LIMIT).any():
        counts[over] = (counts[over] + 1) >> 1


def decode_planes(
    data: bytes,
    planes: Sequence[tuple[int, int, int, int, int, int]],
    lanes: int,
    coder: Coder,
    into: Sequence[IntArray] | None = None,
) -> list[IntArray]:
    """Symbols of the planes (rows, columns, kind, width, taps, state bits), int32 (rows, columns) each. `into`: zeros that become
    the symbols; None: of its own.

    Raises CorruptFile unless every byte is used and every state ends where the encoder began."""
    reader = Reader(data, lanes)
    magnitude = [tables.first_magnitude_counts().transpose(1, 0, 2).copy() for _ in range(tables.NUM_CLASSES)]
    paths, path_signs = tables.first_magnitude_counts().transpose(1, 0, 2).copy(), tables.first_path_signs()
    gamma = [np.full((tables.NUM_GAMMA, 2), 2, np.int64) for _ in range(tables.NUM_CLASSES)]
    start = [tables.FIRST_START] * tables.NUM_CLASSES
    tokens: dict[bool, Tokens] = {}  # by whether there is a trellis

    def decisions(plane: IntArray, kind: int, width: int, taps: int, state_bits: int) -> None:
        sizes, signs = (paths, path_signs) if state_bits else (magnitude[kind], np.full((27, 2), 3, np.int64))
        code = TRELLIS_CODES[state_bits]
        start[kind] = _plane(reader, plane, width, taps, code, lanes, sizes, signs, gamma[kind], start[kind])

    if coder == "l":
        for trellis in sorted({s[5] > 0 for s in planes if s[2] == tables.WEIGHTS and s[0] * s[1]}):
            corrections = np.zeros((len(tables.LAW_ROWS), tables.TOKENS), np.int32)
            decisions(corrections, tables.LAWS, 1, 1, 0)
            if np.abs(corrections).max() > tables.MAX_CORRECTION:
                raise CorruptFile(f"a correction of a table is out of range, allowed is ±{tables.MAX_CORRECTION}")
            tokens[trellis] = Tokens(trellis, False, corrections)
    result = [np.zeros(shape[:2], np.int32) for shape in planes] if into is None else list(into)
    for plane, (_, _, kind, width, taps, state_bits) in zip(result, planes, strict=True):
        if plane.size and kind == tables.WEIGHTS and coder != "s":
            if (state_bits > 0) not in tokens:
                tokens[state_bits > 0] = Tokens(state_bits > 0, coder == "m")
            table = tokens[state_bits > 0]
            start[kind] = token_plane(reader, plane, width, taps, TRELLIS_CODES[state_bits], lanes, table, start[kind])
        elif plane.size:
            decisions(plane, kind, width, taps, state_bits)
    if reader.position != len(reader.words) or (reader.states != tables.STATE_LOW).any():
        raise CorruptFile("a symbol section does not end where its symbols end")
    return result


def _plane(
    reader: Reader,
    q: IntArray,
    width: int,
    taps: int,
    code: tuple[int, int],
    lanes: int,
    magnitude: Int64,
    signs: Int64,
    gamma: Int64,
    start: int,
) -> int:
    rows, columns = q.shape
    sign_class = np.zeros((columns + 1, min(lanes, rows)), np.int8)  # of this block, by column; the last row stays 0
    trellis = code[1] > 0
    col = np.zeros(columns, np.int64)
    shift_of_columns = tables.column_shift(lanes)
    for first in range(0, rows, lanes):
        count = min(lanes, rows - first)
        everyone = np.arange(count)
        row = np.full(count, start, np.int64)
        path = np.zeros(count, np.int64)
        earlier, sign_class = sign_class, np.zeros_like(sign_class)
        block = np.zeros((columns, count), np.int32)
        for j in range(columns):
            m = row
            if first:
                around = (2 * int(col[j]) + int(col[max(j - 1, 0)]) + int(col[min(j + 1, columns - 1)])) >> 2
                m = (row + around) >> 1
            size = _magnitudes(reader, everyone, m, magnitude, gamma)
            if size.max() > tables.MAX_SYMBOL:
                raise CorruptFile("a symbol section ends early or holds a symbol that is too large")
            row += ((size << 8) - row) >> 3
            odd = path & 1
            path = (path >> 1) ^ (code[0] * odd) ^ (code[1] * (size & 1))
            members = size.nonzero()[0]
            if members.size:
                left = j - 1 if j > 0 and (width == 1 or j % width) else -1
                above = j - width if j % taps >= width else -1
                if trellis:
                    near = [_mirrored(sign_class[k, members], odd[members]) for k in (left, above)]
                    context = (np.minimum(size[members], 3) - 1) * 9 + near[0] * 3 + near[1]
                else:
                    context = (sign_class[left] * 3 + sign_class[above]) * 3
                    context = (context[:count] + (earlier[j, :count] if first else 0))[members]
                bit = reader.bits(members, _probabilities(signs[context, 0], signs[context, 1]))
                _learn(signs, context, bit)
                sign_class[j, members] = _mirrored(2 - bit, odd[members]) if trellis else 2 - bit
                size[members[~bit]] *= -1
                block[j] = size
            mean = (int(np.abs(size).sum()) << 8) // count
            col[j] = mean if not first else int(col[j]) + ((mean - int(col[j])) >> shift_of_columns)
        q[first : first + count] = block.T
        start = int(col.sum()) // columns
    return start


def _mirrored(sign_class: NDArray[np.integer[Any]], odd: Int64) -> Int64:
    """Sign classes as an odd state sees them: 1 and 2 change places."""
    return np.where(odd & (sign_class > 0), 3 - sign_class, sign_class).astype(np.int64)


def _magnitudes(reader: Reader, everyone: Int64, m: Int64, magnitude: Int64, gamma: Int64) -> Int64:
    """Stages 1 to 3 for one column of a block: int64 (count,)."""
    level = _LEVEL[np.minimum(m, 2047)]
    size = np.zeros(len(everyone), np.int64)
    members = everyone
    for k in range(tables.NUM_UNARY):
        counts = magnitude[k]
        context = level[members]
        bit = reader.bits(members, _probabilities(counts[:, 0], counts[:, 1])[context])
        _learn(counts, context, bit)
        members = members[bit]
        if not members.size:
            break
        size[members] = k + 1
    if members.size:
        size[members] += _gamma(reader, members, gamma)
    if (m >= 2048).any():  # the first average with low bits
        shift = _BIT_LENGTH[np.minimum(m >> 8, len(_BIT_LENGTH) - 1)]
        big = m >> 20 > 0
        if big.any():
            shift[big] = [max(int(t).bit_length() - 3, 0) for t in m[big] >> 8]
        reader.plain(shift, size)
    return size


def _gamma(reader: Reader, over: Int64, gamma: Int64) -> Int64:
    lengths = np.zeros(len(over), np.int64)
    inside = np.arange(len(over))
    for k in range(tables.NUM_GAMMA):
        p = int(_probabilities(gamma[k : k + 1, 0], gamma[k : k + 1, 1])[0])
        bit = reader.bits(over[inside], p)
        _learn(gamma[k : k + 1], np.zeros(len(inside), np.int64), bit)
        inside = inside[bit]
        lengths[inside] = k + 1
        if not inside.size:
            break
    if inside.size:
        raise CorruptFile("a symbol section ends early or holds a symbol that is too large")
    # the bits go by position over all lanes, so spread the members over the lane axis
    wide_lengths, wide = np.zeros(over[-1] + 1, np.int64), np.ones(over[-1] + 1, np.int64)
    wide_lengths[over] = lengths
    reader.plain(wide_lengths, wide)
    return wide[over] - 1
