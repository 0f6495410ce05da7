"""Rounding with feedback: what it must not depend on."""

from __future__ import annotations

import numpy as np

from transquant.features.feedback import rounded


def test_without_weights_no_channel_is_fed_another_s_error(rng):
    """(K, 0) weights are none at all, whatever lies behind them in memory."""
    values = rng.normal(0, 3, (20, 5, 6)).astype(np.float32)
    steps, around = np.ones(20, np.float32), np.zeros((20, 4), np.float32)
    behind = np.full((20, 20), 0.7, np.float32)
    none = rounded(values, steps, behind[:, :0], around, False)
    assert np.array_equal(none, np.rint(values))
    assert not np.array_equal(none, rounded(values, steps, behind, around, False))
