"""Constants of the entropy models (FORMAT.md section 5), shared by the compiled and the numpy coder. numpy only."""

from __future__ import annotations

from functools import cache

import numpy as np

from transquant.records import MAX_FOLD

NUM_CLASSES = 5
WEIGHTS = 0  # the class whose planes are tokens
LAWS = 4  # that of corrections of static tables
NUM_LEVELS = 20
NUM_UNARY = 18  # stage 1 decisions, k = 0 ... 17
NUM_GAMMA = 21  # stage 2 prefix decisions, k = 0 ... 20; more ones than 20 are corrupt
MAX_SYMBOL = (1 << 20) - 1
MAX_LANES = 1024

COUNT_LIMIT = 510
P_BITS = 14
P_ONE, P_HALF = 1 << P_BITS, 1 << (P_BITS - 1)
P_MIN, P_MAX = 16, P_ONE - 16
STATE_LOW = 1 << 16
FIRST_START = 128
MAX_EVENTS = 5  # of a symbol in a column of tokens
SPARE_WORDS = MAX_EVENTS * MAX_LANES + 1  # after the last one, so that a column of lanes is read without asking for each

THRESHOLDS = (5, 10, 17, 25, 36, 49, 66, 88, 117, 154, 203, 268, 354, 467, 616, 813, 1073, 1416, 1869)
LEVEL_MEANS = (3, 7, 13, 21, 30, 42, 57, 77, 102, 135, 178, 235, 311, 410, 541, 714, 943, 1244, 1642, 2400)

# tokens (all kinds but "s"): −7 … 7 as 0 … 14, and 15 for all else
TOKENS, ESCAPE, MIDDLE = 16, 15, 7
SIGNS = 5  # what two neighbours' signs add up to, −2 … 2
NUM_CONTEXTS = SIGNS * NUM_LEVELS + 1  # (level, signs) and the lengths of what is escaped
LENGTHS = NUM_CONTEXTS - 1
LONGEST = 13  # the length that stands for 20 bits
SHIFT_LEVEL = 17  # the first level whose low bits are plain
MAX_SHIFT = 14
RATIOS = (3, 6, 11, 18, 27, 39, 54, 72, 88, 104, 128, 150, 166, 185, 199, 211, 224, 212, 224, 221)
LENGTH_LAW = (24, 20, 14, 10, 7, 4, 3, 2, 2, 2, 1, 1, 1, 1, 1, 1)
LAW_ROWS = np.append(SIGNS * np.arange(NUM_LEVELS) + SIGNS // 2, LENGTHS)  # contexts without signs, and the lengths
MAX_CORRECTION = 63  # of a table that comes with the tokens, in eighths of an octave
EIGHTHS = np.array((1024, 1117, 1218, 1328, 1448, 1579, 1722, 1878), np.int64)
FIRST_TOTAL = 1536  # of the first counts of a context, in units of 1/32 token
ONE_TOKEN, FAST_TOTAL, SLOW_TOTAL = 32, 12288, 65536
REBUILD, REBUILD_SHIFT = 64, 6  # tables follow after 64 tokens, at first after 1/64 of those so far
LOOKUP_BITS = 10

# R[t] = floor(2^32 / t): turns a pair of counts into a probability without a division
RECIPROCAL = np.array([0] + [(1 << 32) // t for t in range(1, 4 * MAX_LANES + COUNT_LIMIT + 2)], dtype=np.int64)

# level of a magnitude average m, for m clipped to the last index
LEVEL_OF = np.searchsorted(np.array(THRESHOLDS), np.arange(2048), side="right").astype(np.int64)


def first_magnitude_counts() -> np.ndarray:
    """Initial counts of the stage 1 contexts, int64 (levels, unary, 2): a geometric law of the level's mean."""
    counts = np.empty((NUM_LEVELS, NUM_UNARY, 2), np.int64)
    for level, mean in enumerate(LEVEL_MEANS):
        ones = min(max(16 * mean // (256 + mean), 1), 15)
        counts[level, :, 0], counts[level, :, 1] = 16 - ones, ones
    return counts


def first_path_signs() -> np.ndarray:
    """Initial counts of a trellis' sign contexts, int64 (27, 2): −1 is likelier than 1, which is rebuilt further from zero."""
    return np.tile(np.array([5, 3], np.int64), (27, 1))


@cache
def token_laws(trellis: bool) -> np.ndarray:
    """Weights of the tokens in each context, int64 (contexts, tokens): in a trellis 0, −1, 1, −2, 2, … are ever further from
    zero by half a step, so they follow a geometric law; without one both signs have their mean."""
    laws = np.zeros((NUM_CONTEXTS, TOKENS), np.int64)
    for level, ratio in enumerate(RATIOS):
        weight, law = 1 << 20, np.zeros(TOKENS, np.int64)
        for k in range(TOKENS - 1):
            law[MIDDLE + (k // 2 if k % 2 == 0 else -(k + 1) // 2)] = weight
            weight = (weight * ratio) >> 8
        law[ESCAPE] = 256 * weight // (256 - ratio)
        if not trellis:
            law[:ESCAPE] = (law[:ESCAPE] + law[ESCAPE - 1 :: -1]) >> 1
        laws[SIGNS * level : SIGNS * (level + 1)] = law
    laws[LENGTHS] = LENGTH_LAW
    return laws


def first_token_counts(trellis: bool) -> np.ndarray:
    """First counts of the adaptive tables, int32 (2, contexts, tokens): fast and slow."""
    laws = token_laws(trellis)
    counts = np.maximum(FIRST_TOTAL * laws // laws.sum(1, keepdims=True), 1)
    return np.stack([counts, counts]).astype(np.int32)


@cache
def law_tables(trellis: bool) -> np.ndarray:
    """Where the ranges of the tokens begin in the static tables, and 2^14: uint32 (contexts, tokens + 1)."""
    return _shared_out(token_laws(trellis))


def corrected_tables(trellis: bool, corrections: np.ndarray) -> np.ndarray:
    """The same with the corrections of a stream, int32 (levels + 1, tokens), at most MAX_CORRECTION in magnitude."""
    k = corrections.astype(np.int64)
    laws = np.diff(law_tables(trellis)[LAW_ROWS].astype(np.int64)) * EIGHTHS[k & 7] << (8 + (k >> 3))
    begins = _shared_out(laws)
    return np.concatenate([np.repeat(begins[:-1], SIGNS, axis=0), begins[-1:]])


def _shared_out(weights: np.ndarray) -> np.ndarray:
    """Tables of weights int64 (contexts, tokens): uint32 (contexts, tokens + 1)."""
    begins = np.concatenate([np.zeros((len(weights), 1), np.int64), weights.cumsum(1)], axis=1)
    begins = np.arange(TOKENS + 1) + (P_ONE - TOKENS) * begins // weights.sum(1, keepdims=True)
    return np.asarray(begins, np.uint32)


def adapted(counts: np.ndarray) -> np.ndarray:
    """Tables of counts int32 (2, contexts, tokens), as `law_tables`."""
    begins = np.zeros((len(counts[0]), TOKENS + 1), np.int64)
    for part in counts.astype(np.int64):
        total = part.sum(1, keepdims=True)
        begins[:, 1:] += part.cumsum(1) * (((P_ONE - TOKENS) << 16) // total)
    begins = np.arange(TOKENS + 1) + (begins >> 17)
    begins[:, TOKENS] = P_ONE
    return np.asarray(begins, np.uint32)


def lookups(begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of tables as `law_tables`: the token at every sixteenth place, uint8 (contexts · 1024,), and the range of zero where the
    magnitude average is m, its begin · 2^16 + its length, uint32 (2048,)."""
    places = -(-begins.astype(np.int64) >> (P_BITS - LOOKUP_BITS))
    lookup = np.repeat(np.tile(np.arange(TOKENS, dtype=np.uint8), len(begins)), np.diff(places).reshape(-1))
    zeros = begins[SIGNS * LEVEL_OF + SIGNS // 2, MIDDLE : MIDDLE + 2]
    return lookup, (zeros[:, 0] << 16) + zeros[:, 1] - zeros[:, 0]


def magnitude_laws(sizes: int) -> np.ndarray:
    """What the levels' means let expect: probabilities of magnitudes 0, 1, …, float64 (levels, sizes), geometric laws."""
    ratio = np.array(LEVEL_MEANS)[:, None] / (256 + np.array(LEVEL_MEANS)[:, None])
    return np.asarray((1 - ratio) * ratio ** np.arange(sizes) + 1e-4, np.float64)


def expected_levels(scaled: np.ndarray) -> np.ndarray:
    """Levels of the contexts in which entries of a matrix, `scaled` in steps float64 (O, n), will be coded: uint8 (O, n)."""
    sizes = np.abs(scaled)  # and the rest in place: matrices are large
    np.floor(np.add(np.minimum(sizes, 1e6, out=sizes), 0.4, out=sizes), out=sizes)
    mean = np.add(sizes.mean(1, keepdims=True), sizes.mean(0, keepdims=True), out=sizes)
    mean *= 128
    levels: np.ndarray = LEVEL_OF.astype(np.uint8)[np.minimum(mean, 2047, out=mean).astype(np.int16)]
    return levels


FULL_ROWS = 512  # rows that keep a vectorised reader busy


def column_shift(lanes: int) -> int:
    """How slowly a column's average follows: u of FORMAT.md, smaller where a block of rows is already an average."""
    return 3 if lanes < 4 else 2 if lanes < 16 else 1


def lanes_for(num_values: int, largest: int, rows: int, magnitude: float) -> int:
    """Lanes for a section of `num_values` whose largest plane has `largest` in `rows` rows, of mean magnitude `magnitude`:
    8 at 270,000 in small planes; where a plane has a million 256, twice and four times as many at high rates, where a
    symbol takes more stages; at most the rows, and 1,024.

    A lane costs about two bytes and some context, and lets a vectorised reader decode one more symbol at a time; the
    choice is the encoder's."""
    by_section = max(num_values, 1).bit_length() - 16
    by_plane = 3 * (max(largest * 1049 // 1000, 1).bit_length() - 1) - 52  # from 10⁶ on as from 2²⁰
    if by_plane >= 8:
        by_plane = min(by_plane, 8) + (magnitude >= 1.5) + (magnitude >= 8)
        by_plane = min(by_plane, (rows - 1).bit_length())
    return 1 << min(max(by_section, by_plane, 0), 10)


def fold_for(rows: int, column_groups: int, taps: int) -> int:
    """Into how many each row is folded: 1, but for a plane of a million values and under 512 rows the smallest divisor of
    its column groups that makes 512 rows of it, or else the largest."""
    if rows >= FULL_ROWS or rows * column_groups * taps < 1_000_000:
        return 1
    divisors = [d for d in range(1, MAX_FOLD + 1) if column_groups % d == 0]
    return next((d for d in divisors if rows * d >= FULL_ROWS), divisors[-1])
