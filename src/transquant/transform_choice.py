"""Which transform each layer gets: the one of least rate–distortion cost D + λ R at scalar c, its basis included.

A candidate is coded for real (in the loop that will be used, on at most `SAMPLE` values of the layer) and its bits counted;
but first its coding gain at this rate, from the energies of its bands alone, must be worth more than its basis. λ is what
the whole model pays near c, measured: D is that of the plain metric, feedback works under the regularised one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from transquant import packing
from transquant.bitstream import planes_of
from transquant.choices import IDENTITY, KINDS, Axis, Choice, Kind, LayerTransform, Method
from transquant.encoder import Encoder
from transquant.entropy.lanes import encode_planes
from transquant.grid import global_step
from transquant.quantizers.metric import mean_diagonal
from transquant.records import MAX_BANDS, CodedTensor, FloatArray, LayerStats, WeightSpec
from transquant.transforms.algebra import product
from transquant.transforms.fit import klt
from transquant.transforms.layout import Layout
from transquant.weights import code_weight, lagrangian

NEARBY = 1.125  # λ is measured between c over this and c times this
SAMPLE = 1 << 18  # values of a layer on which candidates are compared
LARGE = 3e9  # multiply–adds of a feedback pass above which only the likeliest candidates are tried
BASIS_BITS = (3, 4, 6)  # precisions of a basis that are tried in the closed loop
LIKELY: tuple[Kind, ...] = ("d", "k")
LEAST_BITS = 2.0  # an entry of a basis takes at least about as much
ROWS_FIRST = (
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "embedding",
    "embedding_bag",
    "conv1d_hf",
)  # rows are the inputs


@dataclass(frozen=True, slots=True)
class ChosenTransform:
    """A layer's transform and what it is predicted to save: `gain` in bits a value at equal predicted distortion."""

    transform: LayerTransform
    gain: float


def choose_transforms(encoder: Encoder, c: float, choice: Choice, sample: Encoder) -> dict[str, ChosenTransform]:
    """The transform of every layer that gets one, at scalar c; of layers that keep few bands it is given. `sample`: the encoder's,
    on which λ is measured."""
    given = {name: ChosenTransform(t, 0.0) for name, t in encoder.transforms.items() if t.kept}
    specs = [s for s in encoder.plan.specs if isinstance(s, WeightSpec) and _measured(encoder.layers[s.name])]
    specs = [s for s in specs if s.name not in given]
    specs.sort(key=lambda s: -np.prod(s.shape[:1]) * np.prod(s.shape))
    values, layers, method = encoder.source.values, encoder.layers, encoder.method
    candidates = {s.name: _candidates(s, layers[s.name], method) for s in specs}
    open_ones = [s for s in specs if len(candidates[s.name]) > 1]
    price = exchange_rate(sample, c, choice) if open_ones else 0.0
    found = encoder.pool.map(
        lambda s: _choose(s, values[s.name], layers[s.name], candidates[s.name], c, price, choice, method), open_ones,
        "transform", lambda s: (encoder.known[s.name], candidates[s.name], c, price, choice, method),
    )  # fmt: skip
    chosen = given | {s.name: ChosenTransform(candidates[s.name][0], 0.0) for s in specs}
    chosen |= {s.name: t for s, t in zip(open_ones, found, strict=True)}
    return {name: t for name, t in chosen.items() if t.transform != IDENTITY}


def exchange_rate(encoder: Encoder, c: float, choice: Choice) -> float:
    """λ, predicted distortion a bit, as the whole file pays it around scalar c; the theory's where nothing changes there."""
    fine, coarse = encoder.draft(c / NEARBY, choice), encoder.draft(c * NEARBY, choice)
    saved = 8.0 * (len(encoder.encode(fine).data) - len(encoder.encode(coarse).data))
    more = coarse.predicted - fine.predicted
    return more / saved if saved > 0 and more > 0 else lagrangian(c)


def _choose(
    spec: WeightSpec, weight: FloatArray, stats: LayerStats, candidates: Sequence[LayerTransform], c: float, price: float,
    choice: Choice, method: Method,
) -> ChosenTransform:  # fmt: skip
    forced = method.transform != "auto"
    part, values, moments = _sample(spec, weight, stats, any(t.axis == "r" for t in candidates))
    promising = {t.axis: forced or _promising(part, values, moments, t.axis, c) for t in candidates if t.kind in ("k", "e")}
    tried = [t for t in candidates if promising.get(t.axis, True) or t.kind not in ("k", "e")]
    if len(tried) == 1:
        return ChosenTransform(tried[0], 0.0)
    costs = {t: _bits(part, values, moments, c, price, choice, t, method) / values.size for t in tried}
    best = min(costs, key=lambda t: costs[t])
    if best.kind in ("k", "e") and not _large(spec) and method.coding == "entropy" and method.feedback:
        for bits in BASIS_BITS:
            finer = replace(best, bits=bits)
            if finer not in costs:
                costs[finer] = _bits(part, values, moments, c, price, choice, finer, method) / values.size
        best = min(costs, key=lambda t: costs[t])
    return ChosenTransform(best, costs[candidates[0]] - costs[best] if candidates[0].kind == "i" else 0.0)


def _candidates(spec: WeightSpec, stats: LayerStats, method: Method) -> list[LayerTransform]:
    """What may be tried on a layer; one where it is forced. Grouped layers share no rows, blocks of moments no columns."""
    packed = method.coding == "fixed"
    none = IDENTITY if not packed else LayerTransform("i", _axis(spec, method.axis or "input"))
    if method.transform == "identity" or stats.input_moment.ndim == 4 or min(spec.shape) == 0:
        return [none]
    if method.transform == "auto" and _large(spec):
        return [none, *(LayerTransform(kind, "k") for kind in LIKELY if _fits(spec, "k", stats))]
    kinds: Sequence[Kind] = ("d", "k", "e") if method.transform == "auto" else (KINDS[method.transform],)
    axes = [_axis(spec, name) for name in ("kernel", "input", "output", "joint") if method.axis in (None, name)]
    possible = [LayerTransform(k, a) for k in kinds for a in axes if (k != "d" or a == "k") and _fits(spec, a, stats)]
    if method.transform == "auto":
        return [none, *possible]
    return possible or [none]


def _axis(spec: WeightSpec, name: str) -> Axis:
    """The axis in the file's terms: where rows are the inputs, names change places."""
    swapped = spec.kind in ROWS_FIRST
    names: dict[str, Axis] = {"kernel": "k", "joint": "j", "input": "r" if swapped else "c", "output": "c" if swapped else "r"}
    return names[name]


def _fits(spec: WeightSpec, axis: str, stats: LayerStats) -> bool:
    channels, taps = spec.shape[1], int(np.prod(spec.shape[2:]))
    bands = {"r": spec.shape[0], "c": channels, "k": taps, "j": channels * taps}[axis]
    if axis == "r" and len(stats.input_moment) > 1:
        return False
    return 1 < bands <= MAX_BANDS and not (axis == "j" and taps == 1)


def _large(spec: WeightSpec) -> bool:
    rows, columns = spec.shape[0] // spec.groups, int(np.prod(spec.shape[1:]))
    return spec.shape[0] * columns * (rows + columns) > LARGE


def _measured(stats: LayerStats) -> bool:
    return bool(stats.input_moment.any() and stats.output_moment.any())


def _sample(spec: WeightSpec, weight: FloatArray, stats: LayerStats, whole: bool) -> tuple[WeightSpec, FloatArray, LayerStats]:
    """Evenly spaced rows of a large layer, with their part of the metric; a transform over the rows needs all of them."""
    rows = max(64, SAMPLE // max(weight.shape[1], 1))
    if len(stats.input_moment) > 1 or rows >= len(weight):
        return spec, weight, stats
    kept = np.unique(np.linspace(0, len(weight) - 1, rows).astype(int))
    g = stats.output_moment
    g = g[:, kept] if g.ndim == 2 else g[:, kept][:, :, kept]
    return replace(spec, shape=(len(kept), *spec.shape[1:])), weight[kept], replace(stats, output_moment=g)


def _promising(spec: WeightSpec, weight: FloatArray, stats: LayerStats, axis: Axis, c: float) -> bool:
    """Whether the spread of the bands' energies is worth more bits than a basis, by the rate of Gaussian bands."""
    layout = Layout(axis, spec.shape[0], spec.shape[1], int(np.prod(spec.shape[2:])))
    bands = layout.bands(weight)
    moments = zip(stats.input_moment, stats.output_moment, strict=True)
    sensitivity = np.mean([mean_diagonal(a) * mean_diagonal(g) for a, g in moments])
    gain = 17 * float(sensitivity) / (c * c)  # as in allocation.first_guess
    analysis = klt(product(bands, bands.T)).T
    before, after = np.mean(weight**2), (product(analysis, bands) ** 2).mean(1)
    saved = 0.5 * bands.shape[1] * float(np.sum(np.log2((1 + gain * before) / (1 + gain * after))))
    return bool(saved > LEAST_BITS * len(bands) ** 2)


def _bits(
    spec: WeightSpec, weight: FloatArray, stats: LayerStats, c: float, price: float, choice: Choice, transform: LayerTransform,
    method: Method,
) -> float:  # fmt: skip
    """(D + λ R) / λ of a layer: bits, those that its distortion is worth included."""
    coded = code_weight(spec, weight, stats, c, global_step(c), choice, transform, method)
    return count_bits(coded.tensor) + coded.distortion / price


def count_bits(tensor: CodedTensor) -> float:
    """Bits of a tensor on its own: with fresh contexts in one lane, or packed."""
    if tensor.codes is not None:
        bits = packing.tensor_bits(tensor)
        return bits.payload + bits.side
    return sum(encode_planes(planes_of(tensor), 1, "m")[1])


def transforms_of(chosen: Mapping[str, ChosenTransform]) -> dict[str, LayerTransform]:
    """The transforms alone."""
    return {name: c.transform for name, c in chosen.items()}
