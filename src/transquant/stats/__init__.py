"""Calibration: second moments of inputs and of output gradients, streamed; and what the output measure is."""

from transquant.stats.collect import collect
from transquant.stats.copies import copy_model
from transquant.stats.measure import Reference
from transquant.stats.paired import PairedNetworks
from transquant.stats.uncalibrated import weight_statistics

__all__ = ["PairedNetworks", "Reference", "collect", "copy_model", "weight_statistics"]
