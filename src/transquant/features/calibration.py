"""Calibrating a codec of feature maps.

moments over samples → search on a scalar c: [points in execution order, each fitted on maps that were coded before it] → codec
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from math import exp2, isfinite, log2, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from transquant import modules
from transquant.errors import InputError, TargetError
from transquant.features.codec import UNCODED, FeatureCodec
from transquant.features.maps import from_maps, to_maps
from transquant.features.methods import METHODS, Method
from transquant.features.points import replacing
from transquant.features.records import Point, Sensitivity
from transquant.features.sensitivity import collect
from transquant.guard import unchanged

_log = logging.getLogger("transquant")

Progress = Callable[[str, int, int], None]
VALUES = 1 << 23  # of the largest map, over all samples that coders are fitted on
LEAST_SAMPLES, MOST_SAMPLES = 8, 64
TRIES = 9
CLOSE = 0.01  # of the asked bits a value, below it
FEWEST, MOST = 0.01, 16.0  # bits a value that can be asked for


def calibrate(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    bits_per_value: float | None = None,
    max_drop: tuple[Callable[[nn.Module], float], float] | None = None,
    method: str = "auto",
    metric: str = "auto",
    forward: Callable[[nn.Module, Any], Any] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> FeatureCodec:
    """A codec for all feature maps of a network: results of its activation functions, wherever it calls them.

    `calibration`: any iterable of batches, as for `compress`; labels are not used. Exactly one target: `bits_per_value`, bytes of
    all packets · 8 / values of all maps, on calibration samples, met from below within a per cent; or
    `max_drop=(evaluate, points)`, the coarsest codec with which `evaluate(model) -> float`, higher is better, loses no more.
    `method`: "auto", the project's own (features/predictive.py); "pca", "pca-quantized", "pca-truncated", "none": feature map
    transform coding as published (Chmiel et al., arXiv 1905.10830) and its modes; "dct-cm": DCT over channels with masks (Shi et
    al., arXiv 2106.12850, reconstructed from its abstract), "dct-cm-4", "dct-cm-16", "dct-cm-32" with other block lengths than 8,
    "dct-cm-huffman" with coded values instead of bytes.
    `metric`, `forward`, `output`, `seed`, `progress(stage, done, total)` are as for `compress`. The model is never changed.

    Points that no gradient reaches are not coded. The same input, options and seed give the same codec on one machine; between
    machines its floating-point arrays may differ in their last digits, and a codec file is what device and server must share.

    Raises InputError; TargetError where no codec meets the target."""
    chosen = _check(bits_per_value, max_drop, method, metric, seed)
    say = progress or (lambda stage, done, total: None)
    batches = list(modules.micro_batches(modules.batches_of(calibration, whole=forward is not None)))

    def run(network: nn.Module, batch: Any) -> Tensor:
        return modules.run_batch(network, batch, forward, output)

    with torch.inference_mode(False), unchanged(model):
        model.eval()
        found = collect(model, batches, run, metric, seed, lambda done, total: say("sensitivities", done, total))
        samples = _fitting_samples(model, batches, run)
        search = _Search(model, samples, run, found, METHODS[chosen], {"method": chosen, "seed": seed}, say)
        if bits_per_value is not None:
            return search.by_bits(bits_per_value)
        assert max_drop is not None
        return search.by_drop(*max_drop)


class _Search:
    """One-dimensional searches on c, and the codec at each."""

    def __init__(
        self, model: nn.Module, samples: Any, run: Callable[[nn.Module, Any], Tensor], found: dict[Point, Sensitivity],
        method: Method, settings: dict[str, Any], say: Progress,
    ) -> None:  # fmt: skip
        self.model, self.samples, self.run, self.found, self.method = model, samples, run, found, method
        self.settings, self.say, self.tries = settings, say, 0
        self.start = method.start or sqrt(0.6 / self._values())

    def codec(self, c: float) -> FeatureCodec:
        """Every point in turn is fitted on what the coded points before it leave of the samples."""
        fitted: dict[Point, Any] = {}
        left: set[str] = set()

        def fit(point: Point, tensor: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
            if point not in self.found or point in fitted:
                left.add(point.name)
                return activation(tensor)
            result = activation(tensor)
            maps, lengths = to_maps(tensor if point.clips else result, point.axis)
            fitted[point] = self.method.fit(maps, point, self.found[point], c)
            coder = self.method.coder(fitted[point])
            sources = maps if coder.before or not point.clips else point.activated(maps)
            decoded = np.stack([coder.dequantize(coder.quantize(m)) for m in sources])
            decoded = point.activated(decoded) if coder.before else decoded
            self.say("fitting", self.tries * len(self.found) + len(fitted), TRIES * len(self.found))
            return from_maps(decoded, lengths, point.axis).to(result.device, result.dtype)

        with torch.no_grad(), replacing(self.model, fit):
            self.run(self.model, self.samples)
        self.tries += 1
        coders = self.method.finish(list(fitted.values()))
        return FeatureCodec(list(zip(fitted, coders, strict=True)), {**self.settings, "c": c, UNCODED: sorted(left)})

    def bits(self, codec: FeatureCodec) -> float:
        """Bits a value of real packets, of the samples."""
        with torch.no_grad(), codec.attach(self.model) as ledger:
            self.run(self.model, self.samples)
        return float(ledger.bits_per_value)

    def by_bits(self, target: float) -> FeatureCodec:
        """The codec that meets `target` from below."""
        known: list[tuple[float, float]] = []  # log2 c, log2 of bits a value
        best: tuple[float, FeatureCodec] | None = None
        aim, at = log2(target * (1 - CLOSE / 2)), log2(self.start)
        for _ in range(TRIES):
            codec = self.codec(exp2(at))
            bits = self.bits(codec)
            _log.info("feature maps: c = %.4g, %.4f bits a value", exp2(at), bits)
            if bits <= target and (best is None or bits > best[0]):
                best = bits, codec
            if target * (1 - CLOSE) <= bits <= target:
                break
            known.append((at, log2(bits)))
            at = _next(known, aim)
        if best is None or best[0] < 0.97 * target:
            reached = [exp2(b) for _, b in known]
            raise TargetError(
                f"no codec of method {self.settings['method']!r} has {target:g} bits a value, packets' heads included; "
                f"those tried have {min(reached):.3g} to {max(reached):.3g}"
            )
        return best[1]

    def by_drop(self, evaluate: Callable[[nn.Module], float], points: float) -> FeatureCodec:
        """The coarsest codec found by bisection that loses at most `points`."""
        floor = _score(evaluate, self.model) - points
        low, high, best = log2(self.start) - 6, log2(self.start) + 4, None
        for _ in range(TRIES):
            at = (low + high) / 2
            codec = self.codec(exp2(at))
            with torch.no_grad(), codec.attach(self.model):
                score = _score(evaluate, self.model)
            _log.info("feature maps: c = %.4g, score %.5g, at least %.5g", exp2(at), score, floor)
            low, high, best = (at, high, codec) if score >= floor else (low, at, best)
        if best is None:
            raise TargetError(f"no codec keeps the score above {floor:g}: at the finest one tried it is {score:g}")
        return best

    def _values(self) -> float:
        """Values of all maps of a sample."""
        total = 0

        def add(point: Point, tensor: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
            nonlocal total
            total += tensor[0].numel() if point in self.found else 0
            return activation(tensor)

        with torch.no_grad(), replacing(self.model, add):
            self.run(self.model, self.samples)
        return total


def _next(known: Sequence[tuple[float, float]], aim: float) -> float:
    """Where log2 of the bits may be `aim`: between the nearest points around it, or along the nearest two."""
    ordered = sorted(known, key=lambda k: abs(k[1] - aim))
    if len(known) == 1:
        at, bits = known[0]
        return at + min(max(1.5 * (bits - aim), -3), 3)
    above = [k for k in ordered if k[1] > aim]
    below = [k for k in ordered if k[1] <= aim]
    (a, x), (b, y) = (above[0], below[0]) if above and below else ordered[:2]
    if above and below and len(known) % 3 == 0:  # a curve that bends lets the other way creep
        return (a + b) / 2
    slope = (b - a) / (y - x) if abs(y - x) > 1e-9 else -1.0
    return a + min(max(slope * (aim - x), -4), 4) if slope < 0 else a + (1 if x > aim else -1)


def _score(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    score = evaluate(model)
    if not isinstance(score, int | float) or not isfinite(score):
        raise InputError(f"max_drop's evaluate returned {score!r}, expected is a finite number, higher is better")
    return float(score)


def _fitting_samples(model: nn.Module, batches: Sequence[Any], run: Callable[[nn.Module, Any], Tensor]) -> Any:
    """One batch of samples that all have one shape, as many as the largest map allows."""
    first = batches[0]
    if not isinstance(first, Tensor):
        return first
    largest = 1

    def measure(point: Point, tensor: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor[0].numel())
        return activation(tensor)

    with torch.no_grad(), replacing(model, measure):
        run(model, first)
    wanted = min(max(VALUES // largest, LEAST_SAMPLES), MOST_SAMPLES)
    same = [b for b in batches if isinstance(b, Tensor) and b.shape[1:] == first.shape[1:]]
    together = torch.cat(same)
    return together[:: max(len(together) // wanted, 1)][:wanted]


def _check(bits: Any, max_drop: Any, method: Any, metric: Any, seed: Any) -> str:
    if (bits is None) == (max_drop is None):
        raise InputError("give exactly one target: bits_per_value= or max_drop=(evaluate, points)")
    number = isinstance(bits, int | float) and not isinstance(bits, bool)
    if bits is not None and not (number and FEWEST <= bits <= MOST):
        raise InputError(f"bits_per_value is {bits!r}, allowed are {FEWEST:g} to {MOST:g}")
    pair = isinstance(max_drop, tuple) and len(max_drop) == 2 and callable(max_drop[0])
    if max_drop is not None and not (pair and isinstance(max_drop[1], int | float) and max_drop[1] >= 0):
        raise InputError("max_drop must be a pair of a function evaluate(model) -> float and the points it may lose, from 0")
    if method not in METHODS:
        raise InputError(f"method is {method!r}, allowed are {', '.join(map(repr, METHODS))}")
    if metric not in ("auto", "kl", "mse"):
        raise InputError(f"metric is {metric!r}, allowed are 'auto', 'kl', 'mse'")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed is {seed!r}, allowed are integers from 0")
    return str(method)
