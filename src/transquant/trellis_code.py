"""The trellis of FORMAT.md section 3: which of two quantizers rebuilds an entry. numpy only: the portable reader uses it.

    next state = (state >> 1) ^ (feedback where state is odd) ^ (forward where the symbol is odd)

Even states rebuild symbol k as k + 1/4 steps, odd ones as −k − 1/4 steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from transquant.records import IntArray

# (feedback, forward) by log2 of the number of states: parity checks of Ungerboeck's codes for amplitude modulation (IEEE
# Trans. Inf. Theory 28(1), 1982, table I), their lowest bit left out; none is a single state
TRELLIS_CODES = {0: (0, 0), 2: (0o5 >> 1, 0o2 >> 1), 3: (0o13 >> 1, 0o4 >> 1), 4: (0o23 >> 1, 0o4 >> 1), 5: (0o45 >> 1, 0o10 >> 1),
                 6: (0o103 >> 1, 0o24 >> 1)}  # fmt: skip


def odd_states(symbols: IntArray, state_bits: int) -> NDArray[np.bool_]:
    """Whether each symbol's state is odd; symbols int32 (rows, columns), every row a path from state 0.

    The state is linear over GF(2) in the parities so far, so that all columns double their reach together."""
    feedback, forward = TRELLIS_CODES[state_bits]
    every = np.arange(1 << state_bits, dtype=np.uint8)
    move = (every >> 1) ^ (feedback * (every & 1)).astype(np.uint8)  # one entry on, without its symbol
    states = np.zeros(symbols.shape, np.uint8)
    states[:, 1:] = forward * (symbols[:, :-1] & 1)
    reach = 1
    while reach < symbols.shape[1]:
        states[:, reach:] ^= move[states[:, :-reach]]  # the right side is complete before anything is stored
        move = move[move]
        reach *= 2
    odd: NDArray[np.bool_] = (states & 1).astype(bool)
    return odd
