"""Calibration: second moments of inputs and of output gradients, streamed; and what the output measure is."""

from transquant.stats.collect import collect, copy_model, weight_statistics
from transquant.stats.measure import Reference

__all__ = ["Reference", "collect", "copy_model", "weight_statistics"]
