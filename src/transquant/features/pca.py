"""Feature map transform coding (Chmiel, Baskin et al., arXiv 1905.10830, and its public code): PCA, one step, Huffman codes.

    x − mean ─ Uᵀ ─ (· − low) / step, rounded ─ symbols ─ one Huffman table ─ payload        before the ReLU; the mirror after it

A column is a pixel of all channels. One step serves the whole map, (max − min) / (2^b − 2), so
that b is the bits of the main component and components of little variance take few levels by themselves. Decoding takes off the
mean error of what was decoded (the paper's bias correction).

Where this differs from the published code: means, range and mean errors are those of the calibration samples and are stored, so
that a map does not depend on the batch that it came in; values beyond the range are clipped to it; every symbol of the range has
a code, none above 16 bits. Micro-blocks of pixels are left out: the paper's own default is one pixel, and a map may be of any
height and width here. `tables="component"` is ours, an option: the paper has one table for a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from transquant.errors import CorruptFile, InputError
from transquant.features.checks import (
    LEAST_STEP,
    map_of,
    samples_of,
    stored_array,
    stored_choice,
    stored_integer,
    stored_number,
    stored_step,
)
from transquant.features.huffman import MAX_LENGTH, HuffmanTables, frequencies_of
from transquant.features.records import Components, Fit, FloatMap, IntMap, Point, Sensitivity
from transquant.transforms.fit import klt

Transform = Literal["none", "pca", "pca-q", "pca-t"]
Tables = Literal["layer", "component"]
LEAST_C, MOST_C = 2.0**-14, 16.0  # finer, there are more symbols than codes; coarser, one
CODEWORDS = 256
_ROUNDS = 30  # of k-means
_COUNTS_A_SYMBOL = 16  # of a component, for a table of its own
_MOST = 1 << 20  # components, channels


@dataclass(frozen=True, slots=True)
class PcaOptions:
    """What of the paper is used. Raises InputError for what it does not know.

    `transform`: "none" (a component is a channel), "pca", "pca-q" (U of 256 values by k-means, a byte an entry), "pca-t" (the
    fewest components that hold the `share` of the variance). `tables`: "layer", or "component" where there are enough symbols to
    learn one from."""

    transform: Transform = "pca"
    share: float = 0.99
    tables: Tables = "layer"

    def __post_init__(self) -> None:
        for name, allowed in (("transform", get_args(Transform)), ("tables", get_args(Tables))):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}, allowed are {', '.join(allowed)}")
        if not 0 < self.share <= 1:
            raise InputError(f"share is {self.share}, allowed are numbers above 0, up to 1")


@dataclass(frozen=True, eq=False)
class PcaCoder:
    """A fitted coder; K components, S symbols, T tables. See `MapCoder`.

    `mean` float32 (C,), `basis` float32 (C, K) or None for the identity, `codebook` float32 (256,) of whose values the basis is,
    `low` and `step` of the symbols, `errors` float32 (K,) that decoding takes off, `frequencies` uint16 (T, S) and `table_of`
    uint16 (K,)."""

    point_name: str
    before: bool
    transform: Transform
    channels: int
    mean: NDArray[np.float32]
    basis: NDArray[np.float32] | None
    codebook: NDArray[np.float32] | None
    low: float
    step: float
    errors: NDArray[np.float32]
    frequencies: NDArray[np.uint16]
    table_of: NDArray[np.uint16]

    @property
    def kind(self) -> str:
        """Name of the method."""
        return "pca"

    @property
    def mode(self) -> str:
        """The transform."""
        return self.transform

    @property
    def components(self) -> Components | None:
        """Those of the basis."""
        return None if self.basis is None else Components(np.ascontiguousarray(self.basis.T), self.mean, self._rounded)

    def quantize(self, values: FloatMap) -> IntMap:
        """float32 (C, H, W) → symbols int32 (K, H, W) from 0 to S−1. Raises InputError for values that are not finite."""
        x = map_of(values, self.channels, self.point_name)
        return self._rounded(_analysed(x, self.mean, self.basis)).reshape(-1, *x.shape[1:])

    def _rounded(self, components: FloatMap) -> IntMap:
        coeffs = components - np.float32(self.low)
        coeffs *= np.float32(1 / self.step)
        np.rint(coeffs, out=coeffs)
        np.clip(coeffs, 0, self.frequencies.shape[1] - 1, out=coeffs)
        return coeffs.astype(np.int32)

    def dequantize(self, symbols: IntMap) -> FloatMap:
        """int32 (K, H, W) → float32 (C, H, W)."""
        coeffs = symbols.reshape(len(symbols), -1).astype(np.float32)
        coeffs *= np.float32(self.step)
        coeffs += (self.low - self.errors)[:, None]
        x = coeffs if self.basis is None else self.basis @ coeffs
        x += self.mean[:, None]
        return x.reshape(self.channels, *symbols.shape[1:])

    def encode(self, symbols: IntMap) -> bytes:
        """Huffman codes, component by component."""
        return self._codes.encode(symbols.reshape(len(symbols), -1), self.table_of.astype(np.int64))

    def decode(self, data: bytes, height: int, width: int) -> IntMap:
        """The symbols of a payload, int32 (K, height, width). Raises CorruptFile."""
        return self._codes.decode(data, self.table_of.astype(np.int64), height * width).reshape(-1, height, width)

    def ideal_bits(self, symbols: IntMap) -> float:
        """Information content under the tables' histograms, in bits."""
        information = -np.log2(self.frequencies / self.frequencies.sum(1, dtype=np.int64)[:, None])
        return float((_counts(symbols, self.frequencies.shape[1]) * information[self.table_of]).sum())

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Settings and arrays; the basis as bytes and a codebook for "pca-q"."""
        settings = {
            "point": self.point_name, "before": self.before, "transform": self.transform, "channels": self.channels,
            "low": self.low, "step": self.step,
        }  # fmt: skip
        arrays: dict[str, np.ndarray] = {
            "mean": self.mean, "errors": self.errors, "frequencies": self.frequencies, "table_of": self.table_of,
        }  # fmt: skip
        if self.codebook is not None and self.basis is not None:
            arrays |= {"codebook": self.codebook, "indices": np.searchsorted(self.codebook, self.basis).astype(np.uint8)}
        elif self.basis is not None:
            arrays["basis"] = self.basis
        return settings, arrays

    @cached_property
    def _codes(self) -> HuffmanTables:
        return HuffmanTables.of(self.frequencies)


def from_state(settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> PcaCoder:
    """The coder of a state. Raises CorruptFile."""
    transform = stored_choice(settings, "transform", get_args(Transform))
    channels = stored_integer(settings, "channels", 1, _MOST)
    errors = stored_array(arrays, "errors", np.float32, (None,))
    basis = codebook = None
    if transform == "pca-q":
        codebook = stored_array(arrays, "codebook", np.float32, (CODEWORDS,))
        if np.any(codebook[1:] < codebook[:-1]):
            raise CorruptFile("the codebook of a coder of feature maps is not in rising order")
        basis = codebook[stored_array(arrays, "indices", np.uint8, (channels, len(errors)))]
    elif transform != "none":
        basis = stored_array(arrays, "basis", np.float32, (channels, len(errors)))
    elif len(errors) != channels:
        raise CorruptFile(f"a coder of feature maps has {len(errors)} components, expected are {channels}")
    frequencies = stored_array(arrays, "frequencies", np.uint16, (None, None))
    table_of = stored_array(arrays, "table_of", np.uint16, (len(errors),))
    if not frequencies.size or frequencies.min() < 1 or frequencies.shape[1] > 1 << MAX_LENGTH:
        raise CorruptFile("a Huffman table of feature maps has no code for a symbol, or too many symbols")
    if table_of.max(initial=0) >= len(frequencies) or len(frequencies) > len(errors) + 1:
        raise CorruptFile(f"a coder of feature maps has {len(frequencies)} Huffman tables, others than its components name")
    return PcaCoder(
        str(settings.get("point")), stored_choice(settings, "before", (True, False)), transform, channels,
        stored_array(arrays, "mean", np.float32, (channels,)), basis, codebook, stored_number(settings, "low"),
        stored_step(settings), errors, frequencies, table_of,
    )  # fmt: skip


def bits_of(c: float) -> float:
    """The paper's b, bits of the main component, of the network's scalar c: the step is c · (max − min)."""
    return math.log2(2 + 1 / max(c, LEAST_C))


def scalar_of(bits: float) -> float:
    """The scalar c of the paper's b, above 1."""
    return 1 / (math.exp2(bits) - 2)


def fit_pca(options: PcaOptions = PcaOptions()) -> Fit:
    """A fit of this method. The scalar c is the step in parts of the layer's range, c = 1 / (2^b − 2), within bounds; the
    sensitivity is not used, as the paper knows none. Maps of points that do not clip are coded as they are given."""

    def fit(samples: FloatMap, point: Point, sensitivity: Sensitivity, c: float) -> PcaCoder:
        """A coder of samples float32 (N, C, H, W). Raises InputError."""
        samples = samples_of(samples, point, c)
        mean, covariance = _moments(samples)
        basis = codebook = None
        if options.transform != "none":
            vectors = klt(covariance)
            if options.transform == "pca-t":
                vectors = vectors[:, : _held(np.einsum("ij,ij->j", vectors, covariance @ vectors), options.share)]
            basis = np.ascontiguousarray(vectors, np.float32)
            if options.transform == "pca-q":
                codebook = _codewords(basis.ravel())
                basis = codebook[_nearest(codebook, basis)]
        coeffs = [_analysed(x, mean, basis) for x in samples]
        low, high = float(min(p.min() for p in coeffs)), float(max(p.max() for p in coeffs))
        step = max(min(max(c, LEAST_C), MOST_C) * (high - low), LEAST_STEP)
        levels = int(np.rint((high - low) / step)) + 1
        zeros = np.zeros(coeffs[0].shape[0], np.float32)
        draft = PcaCoder(
            point.name, point.clips, options.transform, point.channels, mean, basis, codebook, low, step, zeros,
            np.ones((1, levels), np.uint16), zeros.astype(np.uint16),
        )  # fmt: skip
        counts = np.zeros((len(zeros), levels))
        errors = np.zeros(len(zeros))
        for x, p in zip(samples, coeffs, strict=True):
            symbols = draft.quantize(x).reshape(p.shape)
            counts += _counts(symbols, levels)
            errors += (symbols * step + low - p).sum(1, dtype=np.float64)
        frequencies, table_of = _tables(counts, options.tables)
        errors /= counts[0].sum()
        return PcaCoder(
            point.name, point.clips, options.transform, point.channels, mean, basis, codebook, low, step,
            errors.astype(np.float32), frequencies, table_of,
        )  # fmt: skip

    return fit


def _analysed(values: FloatMap, mean: NDArray[np.float32], basis: NDArray[np.float32] | None) -> FloatMap:
    """Components (K, H·W) of a map (C, H, W)."""
    centred = values.reshape(len(mean), -1) - mean[:, None]
    return centred if basis is None else basis.T @ centred


def _moments(samples: FloatMap) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Mean (C,) and covariance (C, C) of the samples' pixels."""
    mean = samples.mean((0, 2, 3), dtype=np.float64).astype(np.float32)
    covariance = np.zeros((len(mean), len(mean)))
    for x in samples:
        centred = _analysed(x, mean, None).astype(np.float64)
        covariance += centred @ centred.T
    return mean, covariance * len(mean) / samples.size


def _held(variances: NDArray[np.float64], share: float) -> int:
    """The fewest leading components that hold a share of the variance."""
    held = np.cumsum(np.maximum(variances, 0))
    return int(np.searchsorted(held, share * held[-1] * (1 - 1e-12))) + 1


def _codewords(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """256 values in rising order, by k-means (Lloyd) from quantiles on."""
    codebook = np.quantile(values, (np.arange(CODEWORDS) + 0.5) / CODEWORDS).astype(np.float32)
    for _ in range(_ROUNDS):
        nearest = _nearest(codebook, values)
        counts = np.bincount(nearest, minlength=CODEWORDS)
        sums = np.bincount(nearest, values, CODEWORDS)
        codebook = np.sort(np.where(counts, sums / np.maximum(counts, 1), codebook).astype(np.float32))
    return codebook


def _nearest(codebook: NDArray[np.float32], values: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.searchsorted((codebook[1:] + codebook[:-1]) / 2, values)


def _counts(symbols: IntMap, size: int) -> NDArray[np.float64]:
    """How often each symbol is in each component, (K, S)."""
    return np.stack([np.bincount(row.ravel(), minlength=size) for row in symbols]).astype(np.float64)


def _tables(counts: NDArray[np.float64], kind: Tables) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Frequencies (T, S) and which of them is each component's, (K,). The shared ones are those of all counts and half a count
    for each symbol; a component's own add S/2 counts distributed as the shared ones are."""
    components, size = counts.shape
    shared = counts.sum(0) + 0.5
    tables, table_of = [frequencies_of(shared)], np.zeros(components, np.uint16)
    if kind == "component":
        for k in range(components):
            if counts[k].sum() >= _COUNTS_A_SYMBOL * size:
                table_of[k] = len(tables)
                tables.append(frequencies_of(counts[k] + size / 2 * shared / shared.sum()))
    return np.stack(tables), table_of
