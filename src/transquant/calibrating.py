"""Calibration samples to what compression learns from them: statistics from most, measurements on those held back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor, nn

from transquant import modules
from transquant.distillation import Teacher
from transquant.encoder import Source
from transquant.inference import Calls, count_calls
from transquant.records import Plan, Statistics
from transquant.stats import PairedNetworks, Reference, collect, copy_model, weight_statistics
from transquant.tuning import LARGE
from transquant.workers import Workers

_log = logging.getLogger("transquant")

HELD_BACK = 512  # samples, at most, and at most one in five


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What calibration gives: the statistics, and what measures and teaches drafts; None where there are no samples."""

    stats: Statistics
    reference: Reference | None = None
    paired: PairedNetworks | None = None
    teacher: Teacher | None = None
    calls: dict[str, Calls] | None = None


def calibrate(
    module: nn.Module | None, calibration: Iterable[Any] | None, plan: Plan, source: Source, metric: str,
    forward: Any, output: Any, seed: int, pool: Workers, say: Callable[[str, int, int], None], in_order: int, most_live: int | None,
    learns: bool, counts: bool, inputs: bool,
) -> Calibrated:  # fmt: skip
    """Statistics from most of the samples, and a reference on the others; every sample is run once for each. Pairs of networks, for
    layers in execution order, on at most `in_order` of those with statistics and with at most `most_live` bytes of activations;
    what vectors learn from, on all of those."""
    if calibration is None or module is None or metric == "weights":
        return Calibrated(weight_statistics(plan, source.values))
    batches = list(modules.micro_batches(modules.batches_of(calibration, whole=forward is not None), 4 if plan.work > LARGE else 1))
    pool.processes.agree("calibration samples", batches)
    if len(batches) == 1:
        _log.warning("there is one calibration sample: the distortion is measured on it too, nothing could be held back")
    sizes = [modules.num_samples(b) for b in batches]
    stride = max(5, -(-sum(sizes) // HELD_BACK))
    held = batches[stride - 1 :: stride] if len(batches) >= stride else batches[-1:]
    used = [b for k, b in enumerate(batches) if k % stride != stride - 1] if len(batches) >= stride else batches[:-1] or batches

    def run(model: nn.Module, batch: Any) -> Tensor:
        return modules.run_batch(model, batch, forward, output)

    def run_any(model: nn.Module, batch: Any) -> Tensor:
        return modules.run_batch(model, batch, forward, output, finite=False)

    stats = collect(
        module, used, plan, run, pool, metric, seed, progress=lambda done, total: say("statistics", done, total), inputs=inputs
    )
    reference = Reference(module, held, run_any, pool, stats.metric)
    seen = accumulate(map(modules.num_samples, used), initial=0)
    few = [b for b, before in zip(used, seen, strict=False) if before < in_order]
    paired = PairedNetworks(module, few, plan, run_any, pool, most_live) if few else None
    calls = count_calls(copy_model(module), batches[0], run) if counts else None
    teacher = Teacher(module, used, run_any, pool, stats.metric) if learns else None
    return Calibrated(stats, reference, paired, teacher, calls)
