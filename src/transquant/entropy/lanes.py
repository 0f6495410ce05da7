"""The compiled coder: one model function for both directions, so that decode mirrors encode by construction.

    planes ─ binary (side information, vectors, bases) or tokens (weights) ─ log ─ rANS ─ bytes, and back

Encoding runs the models forward and logs every event; rANS then codes the log from its end, because it is a stack. Decoding runs
the same functions and takes the events from the states instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from transquant.entropy import tables
from transquant.entropy.binary import code_decisions
from transquant.entropy.laws import corrections_for
from transquant.entropy.rans import rans_encode
from transquant.entropy.tokens import code_tokens
from transquant.errors import CorruptFile
from transquant.records import Coder, IntArray, Plane
from transquant.trellis_code import TRELLIS_CODES

_NO_LOOKUPS: tuple[np.ndarray, np.ndarray] = (np.zeros(1, np.uint8), np.zeros(1, np.uint32))  # for tables that do not stay


class _Tokens:
    """Tables of the tokens of planes with or without a trellis: adaptive counts, or laws that stay, corrected or not."""

    def __init__(self, trellis: bool, adaptive: bool, corrections: IntArray | None = None) -> None:
        self.counts = tables.first_token_counts(trellis)
        self.fresh, self.progress = np.zeros(self.counts[0].size, np.uint32), np.zeros(2, np.int64)
        if corrections is not None:
            begins = tables.corrected_tables(trellis, corrections)
        else:
            begins = tables.adapted(self.counts) if adaptive else tables.law_tables(trellis)
        self.lookup, self.zeros = _NO_LOOKUPS if adaptive else tables.lookups(begins)
        self.begins = begins.reshape(-1)


class _Coder:
    """State of one stream while its planes pass through: contexts, rANS states, the log."""

    def __init__(self, lanes: int, coder: Coder, data: bytes | None = None) -> None:
        self.lanes, self.coder = lanes, coder
        self.magnitude = np.stack([tables.first_magnitude_counts() for _ in range(tables.NUM_CLASSES)])
        self.paths, self.path_signs = tables.first_magnitude_counts(), tables.first_path_signs()  # of trellises
        self.gamma = np.full((tables.NUM_CLASSES, tables.NUM_GAMMA, 2), 2, np.int64)
        self.start = np.full(tables.NUM_CLASSES, tables.FIRST_START, np.int64)
        self.tokens: dict[bool, _Tokens] = {}  # by whether there is a trellis
        # cursor: log position, word position, error flag
        self.cursor = np.zeros(3, np.int64)
        self.decoding = data is not None
        self.log = np.empty(0 if self.decoding else 1 << 16, np.uint64)
        self.states, self.words = np.zeros(lanes, np.uint32), np.zeros(tables.SPARE_WORDS, np.uint16)
        if data is not None:
            if len(data) < 4 * lanes or (len(data) - 4 * lanes) % 2:
                raise CorruptFile(f"a symbol section of {len(data)} bytes is too short for its {lanes} lanes")
            self.states = np.frombuffer(data, "<u4", lanes).astype(np.uint32)
            self.words = np.concatenate([np.frombuffer(data, "<u2", offset=4 * lanes).astype(np.uint16), self.words])
            if lanes and self.states.min() < tables.STATE_LOW:
                raise CorruptFile("an initial state of a symbol section is out of range")

    def plane(self, symbols: IntArray, kind: int, width: int, taps: int, state_bits: int) -> None:
        """Code one plane; `symbols` int32 (rows, columns) is read when encoding and filled when decoding."""
        if symbols.size == 0:
            return
        shape = symbols, width, taps, self.lanes, tables.column_shift(self.lanes), self.decoding
        ends = self.start[kind : kind + 1], self.states, self.words, self.log, self.cursor
        if kind == tables.WEIGHTS and self.coder != "s":
            trellis, adaptive = state_bits > 0, self.coder == "m"
            if trellis not in self.tokens:
                self.tokens[trellis] = _Tokens(trellis, adaptive)
            t = self.tokens[trellis]
            self.log = code_tokens(
                *shape, adaptive, *TRELLIS_CODES[state_bits], t.counts, t.fresh, t.begins, t.lookup, t.zeros, t.progress, *ends
            )
        else:
            magnitude = self.paths if state_bits else self.magnitude[kind]
            signs = self.path_signs if state_bits else np.full((27, 2), 3, np.int64)
            self.log = code_decisions(*shape, *TRELLIS_CODES[state_bits], magnitude, self.gamma[kind], signs, *ends)
        if self.cursor[2]:
            raise CorruptFile("a symbol section ends early or holds a symbol that is too large")

    def corrections(self, trellis: bool, given: IntArray | None = None) -> None:
        """Code the corrections of a set of tables, int32 (levels + 1, tokens), and follow them."""
        corrections = np.zeros((len(tables.LAW_ROWS), tables.TOKENS), np.int32) if given is None else given
        self.plane(corrections, tables.LAWS, 1, 1, 0)
        if np.abs(corrections).max() > tables.MAX_CORRECTION:
            raise CorruptFile(f"a correction of a table is out of range, allowed is ±{tables.MAX_CORRECTION}")
        self.tokens[trellis] = _Tokens(trellis, False, corrections)


def _content(states: NDArray[np.uint32]) -> float:
    """What the lanes' states hold, in bits."""
    return float(np.log2(states).sum())


def encode_planes(planes: Sequence[Plane], lanes: int, coder: Coder) -> tuple[bytes, list[float]]:
    """Bytes of a stream of a symbol section, and each plane's information content in bits: words, and what the states grow by.

    Symbols may not exceed `tables.MAX_SYMBOL` in magnitude; callers check."""
    state = _Coder(lanes, coder)
    given = [(np.ascontiguousarray(p.symbols, np.int32), p.kind, p.width, p.taps, p.state_bits) for p in planes]
    if coder == "l":  # a first pass says which tokens come how often
        first = _Coder(lanes, "t")
        for plane in given:
            if plane[1] == tables.WEIGHTS:
                first.plane(*plane)
        for trellis in sorted(first.tokens):
            state.corrections(trellis, corrections_for(trellis, first.tokens[trellis].fresh))
    events = [int(state.cursor[0])]
    for plane in given:
        state.plane(*plane)
        events.append(int(state.cursor[0]))
    states = np.full(lanes, tables.STATE_LOW, np.uint32)
    words, bits = [], []
    for begin, end in reversed(list(pairwise([0, *events]))):
        held = _content(states)
        words.append(rans_encode(state.log[begin:end], states))
        bits.append(16 * len(words[-1]) + (_content(states) - held))
    return states.astype("<u4").tobytes() + b"".join(w.astype("<u2").tobytes() for w in reversed(words)), bits[-2::-1]


def decode_planes(
    data: bytes,
    planes: Sequence[tuple[int, int, int, int, int, int]],
    lanes: int,
    coder: Coder,
    into: Sequence[IntArray] | None = None,
) -> tuple[list[IntArray], list[float]]:
    """Symbols of the planes (rows, columns, kind, width, taps, state bits), int32 (rows, columns) each, and their
    information content. `into`: contiguous zeros that become the symbols; None: of its own.

    Raises CorruptFile unless every byte is used and every state ends where the encoder began."""
    state = _Coder(lanes, coder, data)
    if coder == "l":
        for trellis in sorted({s[5] > 0 for s in planes if s[2] == tables.WEIGHTS and s[0] * s[1]}):
            state.corrections(trellis)
    symbols = [np.zeros(shape[:2], np.int32) for shape in planes] if into is None else list(into)
    bits = []
    for plane, (_, _, *context) in zip(symbols, planes, strict=True):
        word, held = int(state.cursor[1]), _content(state.states)
        state.plane(plane, *context)
        bits.append(16 * (int(state.cursor[1]) - word) + (held - _content(state.states)))
    if state.cursor[1] != len(state.words) - tables.SPARE_WORDS or (state.states != tables.STATE_LOW).any():
        raise CorruptFile("a symbol section does not end where its symbols end")
    return symbols, bits
