"""DCT-CM, channel DCT with masks (Shi et al., arXiv 2106.12850), reconstructed from the abstract: no code or text was at hand.

    S:  x ─ / step, rounded, 8 bits ─ q ─ a bit a value: zero or not; the others in 8 bits
    T:  x ─ DCT-II of every N channels ─ / step, rounded, 8 bits ─ q ─ the same        and, optionally, a bit: whether x is 0

After the activation. N-bit masks of blocks of N channels, last block filled up with zeros. Each layer has what calibration
samples cost least in: J = bits + λ · squared error, λ = 6 / (ln 2 · step²), the slope of uniform quantization at high rate. S and
T are tried at the same step; where T's coefficients would saturate at it, T with a step large enough is tried as well. With the
mask of zeros those are restored exactly; what lies beyond where the activation clips is clipped.
`values="huffman"`, an option of ours: the others' size classes (how many bits a magnitude has) by a Huffman code, then sign and
remaining bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import log
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
from transquant.features.huffman import HuffmanTables, code_lengths, frequencies_of
from transquant.features.masks import pack, population, unpack
from transquant.features.records import Fit, FloatMap, IntMap, Point, Sensitivity

Values = Literal["bytes", "huffman"]
Order = Literal["given", "clustered"]
BLOCKS = (4, 8, 16, 32)
MOST_C = 4096.0  # above it nothing is left of any map
_SIGNED, _UNSIGNED = 127, 255  # largest magnitudes
_CLASSES = {True: 7, False: 8}
_MOST = 1 << 20


@dataclass(frozen=True, slots=True)
class DctMaskOptions:
    """`block`: N, of 4, 8, 16, 32. `values` that are not 0: "bytes" or "huffman". `order` of the channels: "given", or "clustered",
    each block's by similarity on calibration samples. Raises InputError for what it does not know."""

    block: int = 8
    values: Values = "bytes"
    order: Order = "given"

    def __post_init__(self) -> None:
        for name, allowed in (("block", BLOCKS), ("values", get_args(Values)), ("order", get_args(Order))):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}, allowed are {', '.join(map(str, allowed))}")


@dataclass(frozen=True, eq=False)
class DctMaskCoder:
    """A fitted coder. See `MapCoder`; `before` is False.

    Symbols, K of a pixel: in mode S the C values; in T the coefficients, C filled up to a multiple of N, and with `zero_mask` C
    more, 1 where the value is not 0. `signed`: whether values of mode S go below 0. `low`, `high`: where the activation clips.
    `order` uint16 (C,): which channel comes where, None for all in their own place. `classes` uint16: frequencies of size classes 1
    to 7 of coefficients and signed values, 1 to 8 of others; None for values in bytes."""

    point_name: str
    channels: int
    dct: bool
    zero_mask: bool
    signed: bool
    block: int
    step: float
    low: float | None
    high: float | None
    order: NDArray[np.uint16] | None = None
    classes: NDArray[np.uint16] | None = None
    before: bool = False

    @property
    def kind(self) -> str:
        """Name of the method."""
        return "dct-masks"

    @property
    def mode(self) -> str:
        """ "S", "T", or "T0" with the mask of zeros."""
        return ("T0" if self.zero_mask else "T") if self.dct else "S"

    @property
    def components(self) -> None:
        """None: masks need the values."""
        return None

    def quantize(self, values: FloatMap) -> IntMap:
        """float32 (C, H, W) → symbols int32 (K, H, W)."""
        x = self._in_order(map_of(values, self.channels, self.point_name))
        scaled = (self.coefficients(values) if self.dct else x) * np.float32(1 / self.step)
        np.rint(scaled, out=scaled)
        np.clip(scaled, -_SIGNED if self._signed else 0, _SIGNED if self._signed else _UNSIGNED, out=scaled)
        symbols = scaled.astype(np.int32)
        return np.concatenate([symbols, (x != 0).astype(np.int32)]) if self.zero_mask else symbols

    def coefficients(self, values: FloatMap) -> FloatMap:
        """The DCT of a map (C, H, W): float32 (C filled up to a multiple of N, H, W)."""
        padded = np.zeros((self._filled, *values.shape[1:]), np.float32)
        padded[: self.channels] = self._in_order(values)
        return (_dct(self.block) @ padded.reshape(-1, self.block, padded[0].size)).reshape(padded.shape)

    def dequantize(self, symbols: IntMap) -> FloatMap:
        """int32 (K, H, W) → float32 (C, H, W)."""
        x = symbols[: self._coefficients].astype(np.float32)
        x *= np.float32(self.step)
        if self.dct:
            x = (_dct(self.block).T @ x.reshape(-1, self.block, x[0].size)).reshape(x.shape)[: self.channels]
        if self.low is not None or self.high is not None:
            x = np.clip(x, self.low, self.high)
        if self.zero_mask:
            x = x * symbols[self._coefficients :].astype(np.float32)
        if self.order is None:
            return x
        back = np.empty_like(x)
        back[self.order] = x
        return back

    def encode(self, symbols: IntMap) -> bytes:
        """The masks of all symbols, then what is not 0 of values or coefficients. Raises InputError for symbols out of range."""
        flat = np.ascontiguousarray(symbols, np.int32).ravel()
        masks = np.zeros(-(-len(flat) // 8), np.uint8)
        indices = np.empty(len(flat), np.int32)
        valued = self._coefficients * symbols[0].size
        count = pack(flat, valued, self._signed, _SIGNED if self._signed else _UNSIGNED, masks, indices)
        if count < 0:
            raise InputError("a symbol to code is out of range, allowed are those that take 8 bits, and 0 and 1 in masks of zeros")
        indices = indices[:count]
        if self._codes is not None:
            return masks.tobytes() + self._codes.encode(indices[None], _ONE_TABLE)
        return masks.tobytes() + indices.astype(np.uint8).tobytes()

    def decode(self, data: bytes, height: int, width: int) -> IntMap:
        """The symbols of a payload. Raises CorruptFile."""
        planes = self._coefficients + (self.channels if self.zero_mask else 0)
        size = planes * height * width
        if -(-size // 8) > len(data):
            raise CorruptFile(f"masks of {len(data)} bytes are too short for {planes} x {height} x {width} symbols")
        masks = np.frombuffer(data, np.uint8, -(-size // 8))
        if size % 8 and masks[-1] & ((1 << (8 - size % 8)) - 1):
            raise CorruptFile("masks are not followed by zero bits")
        valued = self._coefficients * height * width
        count = population(masks, valued)
        rest = data[len(masks) :]
        if self._codes is not None:
            indices = self._codes.decode(rest, _ONE_TABLE, count)[0]
        elif len(rest) == count:
            indices = np.frombuffer(rest, np.uint8).astype(np.int32)
        else:
            raise CorruptFile(f"masks are followed by {len(rest)} bytes of values, they tell of {count}")
        if count and indices.max() >= _alphabet(self._signed):
            raise CorruptFile("a value of a feature map is out of range")
        symbols = np.empty(size, np.int32)
        unpack(masks, indices, valued, self._signed, symbols)
        return symbols.reshape(planes, height, width)

    def ideal_bits(self, symbols: IntMap) -> float:
        """A bit a symbol, and 8 bits, or the information content of its size class and the bits that follow, each that is not 0."""
        counts = _class_counts(symbols[: self._coefficients])
        if self.classes is None:
            return symbols.size + 8.0 * float(counts.sum())
        information = -np.log2(self.classes / self.classes.sum(dtype=np.int64)) + np.arange(len(self.classes)) + self._signed
        return symbols.size + float((counts[: len(self.classes)] * information).sum())

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Settings and arrays."""
        settings = {
            "point": self.point_name, "channels": self.channels, "mode": self.mode, "signed": self.signed, "block": self.block,
            "step": self.step, "low": self.low, "high": self.high,
        }  # fmt: skip
        arrays = {"order": self.order, "classes": self.classes}
        return settings, {name: array for name, array in arrays.items() if array is not None}

    @property
    def _coefficients(self) -> int:
        """Planes of symbols that stand for values."""
        return self._filled if self.dct else self.channels

    @property
    def _filled(self) -> int:
        """Channels, filled up to a multiple of N."""
        return -(-self.channels // self.block) * self.block

    def _in_order(self, values: FloatMap) -> FloatMap:
        return values if self.order is None else values[self.order]

    @property
    def _signed(self) -> bool:
        return self.signed or self.dct

    @cached_property
    def _codes(self) -> HuffmanTables | None:
        """A code of what `pack` makes of values: its lengths are those of size class, sign and remaining bits."""
        if self.classes is None:
            return None
        of_classes = code_lengths(self.classes).astype(np.int64) + np.arange(len(self.classes)) + self._signed
        lengths = np.repeat(of_classes, 1 << np.arange(len(self.classes)))
        return HuffmanTables(np.tile(lengths, 1 + self._signed)[None].astype(np.uint8))


def from_state(settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> DctMaskCoder:
    """The coder of a state. Raises CorruptFile."""
    mode = stored_choice(settings, "mode", ("S", "T", "T0"))
    channels, signed = stored_integer(settings, "channels", 1, _MOST), stored_choice(settings, "signed", (True, False))
    step = stored_step(settings)
    low, high = (None if settings.get(k) is None else stored_number(settings, k) for k in ("low", "high"))
    order = classes = None
    if "order" in arrays:
        order = stored_array(arrays, "order", np.uint16, (channels,))
        if np.any(np.bincount(order, minlength=channels) != 1):
            raise CorruptFile("the order of channels of a coder of feature maps is not one of all channels")
    if "classes" in arrays:
        classes = stored_array(arrays, "classes", np.uint16, (_CLASSES[signed or mode != "S"],))
    if (low is not None and high is not None and low > high) or (classes is not None and classes.min() < 1):
        raise CorruptFile("a coder of feature maps has a range or frequencies that none can have")
    block = stored_choice(settings, "block", BLOCKS)
    return DctMaskCoder(
        str(settings.get("point")), channels, mode != "S", mode == "T0", signed, block, step, low, high, order, classes
    )


def fit_dct_masks(options: DctMaskOptions = DctMaskOptions()) -> Fit:
    """A fit of this method. The scalar c is the step in units of the layer's 8-bit step: max / 255 of maps that clip to 0,
    max |x| / 127 of others; it is 1 at least, as 8 bits are all there are. The sensitivity is not used."""

    def fit(samples: FloatMap, point: Point, sensitivity: Sensitivity, c: float) -> DctMaskCoder:
        """A coder of samples float32 (N, C, H, W). Raises InputError."""
        samples = samples_of(samples, point, c)
        values = point.activated(samples) if point.clips else samples
        signed = bool(values.min() < 0) or not point.clips
        largest = float(np.abs(values).max()) or 1.0
        step = max(min(max(c, 1), MOST_C) * largest / (_SIGNED if signed else _UNSIGNED), LEAST_STEP)
        order = _clustered(values, options.block) if options.order == "clustered" else None
        sparse = DctMaskCoder(point.name, point.channels, False, False, signed, options.block, step, point.low, point.high, order)
        dense = replace(sparse, dct=True)
        drafts = [sparse, dense]
        fitting = max(float(np.abs(dense.coefficients(x)).max()) for x in values) / _SIGNED
        if fitting > step:  # what 8 bits would saturate, coarser: the errors say which is better
            drafts.append(replace(dense, step=fitting))
        if point.low == 0:
            drafts += [replace(d, zero_mask=True) for d in drafts[1:]]
        slope = 6 / (log(2) * step**2)
        return min((_measured(d, values, slope, options.values) for d in drafts), key=lambda pair: pair[0])[1]

    return fit


_ONE_TABLE = np.zeros(1, np.int64)


def _measured(draft: DctMaskCoder, values: FloatMap, slope: float, kind: Values) -> tuple[float, DctMaskCoder]:
    """What a draft costs for values (N, C, H, W), bits + slope · squared error, and the draft with its frequencies."""
    maps = [draft.quantize(x) for x in values]
    if kind == "huffman":
        counts = sum(_class_counts(q[: draft._coefficients]) for q in maps)
        draft = replace(draft, classes=frequencies_of(np.asarray(counts)[: _CLASSES[draft._signed]] + 0.5))
    bits = sum(draft.ideal_bits(q) for q in maps)
    errors = sum(float(np.square(draft.dequantize(q) - x, dtype=np.float64).sum()) for q, x in zip(maps, values, strict=True))
    return bits + slope * errors, draft


def _dct(block: int) -> NDArray[np.float32]:
    """The orthonormal DCT-II of N values, float32 (N, N), a row a frequency."""
    n = np.arange(block)
    rows = np.sqrt(2 / block) * np.cos(np.pi * (n + 0.5) * n[:, None] / block)
    rows[0] = np.sqrt(1 / block)
    return np.asarray(rows, np.float32)


def _clustered(values: FloatMap, block: int) -> NDArray[np.uint16]:
    """An order of channels: a block begins with the one of most energy that is left and goes on with what is most like its last."""
    channels = values.shape[1]
    moments = np.zeros((channels, channels))
    for x in values:
        rows = x.reshape(channels, -1).astype(np.float64)
        moments += rows @ rows.T
    energy = np.diag(moments)
    norms = np.sqrt(np.maximum(energy, 1e-30))
    similarity = moments / norms / norms[:, None]
    left = np.ones(channels, bool)
    order: list[int] = []
    for k in range(channels):
        scores = energy if k % block == 0 else similarity[order[-1]]
        order.append(int(np.argmax(np.where(left, scores, -np.inf))))
        left[order[-1]] = False
    return np.array(order, np.uint16)


def _alphabet(signed: bool) -> int:
    return 2 * _SIGNED if signed else _UNSIGNED


def _class_counts(symbols: IntMap) -> NDArray[np.float64]:
    """How many magnitudes have 1 to 8 bits, (8,)."""
    by_magnitude = np.bincount(np.abs(symbols).ravel(), minlength=_UNSIGNED + 1)
    return np.add.reduceat(by_magnitude, 1 << np.arange(8)).astype(np.float64)
