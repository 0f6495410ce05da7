"""The rANS states of `rans` with numpy alone: one event for many lanes at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from transquant.entropy import tables
from transquant.errors import CorruptFile

Int64 = NDArray[np.int64]


class Reader:
    """States of the lanes and the words still to be read."""

    def __init__(self, data: bytes, lanes: int) -> None:
        if len(data) < 4 * lanes or (len(data) - 4 * lanes) % 2:
            raise CorruptFile(f"a symbol section of {len(data)} bytes is too short for its {lanes} lanes")
        self.states = np.frombuffer(data, "<u4", lanes).astype(np.int64)
        self.words = np.frombuffer(data, "<u2", offset=4 * lanes).astype(np.int64)
        self.position = 0
        if self.states.min() < tables.STATE_LOW:
            raise CorruptFile("an initial state of a symbol section is out of range")

    def bits(self, members: Int64, p: Int64 | int) -> NDArray[np.bool_]:
        """One decision for each lane in `members` (ascending), probability p each: bool (len(members),)."""
        x = self.states[members]
        low = x & (tables.P_ONE - 1)
        bit = low < p
        above = p * ~bit  # of a 0: low minus the 1's share
        x = np.where(bit, p, tables.P_ONE - p) * (x >> tables.P_BITS) + (low - above)
        self._refill(members, x)
        return bit

    def tokens(self, members: Int64, begins: Int64) -> Int64:
        """A token for each lane in `members`, from tables int64 (len(members), tokens + 1): int64 (len(members),)."""
        low = self.states[members] & (tables.P_ONE - 1)
        token: Int64 = (begins[:, 1 : tables.TOKENS] <= low[:, None]).sum(1)
        each = np.arange(len(members))
        begin = begins[each, token]
        self._refill(members, (begins[each, token + 1] - begin) * (self.states[members] >> tables.P_BITS) + low - begin)
        return token

    def chunks(self, members: Int64, lengths: Int64) -> Int64:
        """1 to 14 bits of probability one half at once, for each lane in `members`: int64 (len(members),)."""
        x, rest = self.states[members], tables.P_BITS - lengths
        value = (x & (tables.P_ONE - 1)) >> rest
        self._refill(members, ((x >> tables.P_BITS) << rest) + (x & ((1 << rest) - 1)))
        return value

    def _refill(self, members: Int64, x: Int64) -> None:
        short = (x < tables.STATE_LOW).nonzero()[0]
        if short.size:
            end = self.position + short.size
            if end > len(self.words):
                raise CorruptFile("a symbol section ends early or holds a symbol that is too large")
            x[short] = (x[short] << 16) | self.words[self.position : end]
            self.position = end
        self.states[members] = x

    def plain(self, lengths: Int64, values: Int64) -> None:
        """Append `lengths[lane]` bits of probability one half to `values[lane]`, highest first, in place."""
        for position in range(1, int(lengths.max(initial=0)) + 1):
            members = np.flatnonzero(lengths >= position)
            values[members] = (values[members] << 1) | self.bits(members, tables.P_HALF)
