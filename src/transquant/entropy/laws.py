"""What an encoder corrects in the static tables of a stream: its choice alone, a reader takes any. numpy only."""

from __future__ import annotations

import numpy as np

from transquant.entropy import tables
from transquant.records import IntArray


def corrections_for(trellis: bool, seen: np.ndarray) -> IntArray:
    """Corrections int32 (levels + 1, tokens) of the tables for tokens that were seen so often, uint32 (contexts · tokens,)."""
    seen = seen.reshape(tables.NUM_CONTEXTS, tables.TOKENS)[tables.LAW_ROWS].astype(np.float64)
    law = np.diff(tables.law_tables(trellis)[tables.LAW_ROWS].astype(np.float64)) / tables.P_ONE
    expected = law * seen.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        saved = np.where(seen > 0, seen * np.log2(seen / expected), 0.0) - (seen - expected) / np.log(2)
        steps = np.where(expected > 0, np.rint(8 * np.log2(np.maximum(seen, 0.25) / expected)), 0.0)
    steps = np.clip(steps, -tables.MAX_CORRECTION, tables.MAX_CORRECTION)
    worth = saved > 4 + 2 * np.log2(1 + np.abs(steps))  # about what it takes in the file
    return np.where(worth, steps, 0.0).astype(np.int32)
