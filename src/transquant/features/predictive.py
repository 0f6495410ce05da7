"""The project's own coder of feature maps: end-to-end steps, rounding with feedback, symbols predicted from their neighbours.

    after the activation:   values ─────────────── feedback ─ symbols ─ contexts ─ bytes
    before it:              values ─ ELT (K ≤ C) ─ feedback ─ symbols ─ contexts ─ bytes

Feedback (feedback.py) makes errors where the network does not look, contexts (contexts.py) use what lies around a symbol. The
transform diagonalises the map's covariance and the gradient's moments together (Young et al. 2020, there for weights) and leaves
out components that are less than the step: most of them where a 1x1 convolution has made many channels of few.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transquant.errors import CorruptFile
from transquant.features.checks import map_of, stored_array, stored_integer
from transquant.features.contexts import AROUND, BINS, CLASSES, REFERENCES, TAPS, TOKENS, Predictor, Tables, count, decode, encode
from transquant.features.feedback import rounded
from transquant.features.records import Components, FloatMap, IntMap, Settings

MAX_COMPONENTS = 1 << 16


@dataclass(frozen=True, slots=True)
class Transform:
    """`analysis` float32 (K, C), `synthesis` float32 (C, K), of values that float16 has; `mean` float32 (C,), taken off before."""

    analysis: FloatMap
    synthesis: FloatMap
    mean: FloatMap

    def analyze(self, values: FloatMap) -> FloatMap:
        """float32 (C, H, W) → (K, H, W)."""
        result: FloatMap = np.tensordot(self.analysis, values - self.mean[:, None, None], 1)
        return result


@dataclass(frozen=True, slots=True)
class Rounding:
    """`steps` float32 (K,); feedback, which only quantizing needs: `around` float32 (K, 4), weights of residuals left, above, above
    left, above right; `across` int8 (K·(K − 1)/2,), of earlier components' errors, row after row, in units of `unit` float32 (K,),
    or (0,) for none."""

    steps: FloatMap
    around: FloatMap
    across: NDArray[np.int8]
    unit: FloatMap
    nonnegative: bool

    @property
    def dense(self) -> FloatMap:
        """The weights of earlier components' errors, float32 (K, K)."""
        result = np.zeros((len(self.steps), len(self.steps)), np.float32)
        if len(self.across):
            result[np.tril_indices(len(result), -1)] = self.across
        return result * self.unit[:, None]

    def quantize(self, values: FloatMap) -> IntMap:
        """float32 (K, H, W) → symbols int32 (K, H, W)."""
        return rounded(values, self.steps, self.dense, self.around, self.nonnegative)


@dataclass(frozen=True, slots=True)
class PredictiveCoder:
    """A fitted coder of C channels; see `MapCoder`. `transform` None: the map after the activation."""

    point_name: str
    channels: int
    rounding: Rounding
    transform: Transform | None
    predictor: Predictor
    tables: Tables

    @property
    def kind(self) -> str:
        """In codec files."""
        return "predictive"

    @property
    def before(self) -> bool:
        """Whether it codes what goes into the activation."""
        return self.transform is not None

    @property
    def mode(self) -> str:
        """For the ledger."""
        return "channels" if self.transform is None else f"ELT {len(self.rounding.steps)}"

    @property
    def components(self) -> Components | None:
        """Those of the ELT."""
        return Components(self.transform.analysis, self.transform.mean, self.rounding.quantize) if self.transform else None

    def quantize(self, values: FloatMap) -> IntMap:
        """float32 (C, H, W) → int32 (K, H, W). Raises InputError for values that are not finite, or other shapes."""
        values = map_of(values, self.channels, self.point_name)
        return self.rounding.quantize(values if self.transform is None else self.transform.analyze(values))

    def dequantize(self, symbols: IntMap) -> FloatMap:
        """int32 (K, H, W) → float32 (C, H, W)."""
        values = symbols.astype(np.float32) * self.rounding.steps[:, None, None]
        if self.transform is None:
            return values
        result: FloatMap = np.tensordot(self.transform.synthesis, values, 1) + self.transform.mean[:, None, None]
        return result

    def encode(self, symbols: IntMap) -> bytes:
        """The payload."""
        return encode(symbols, self.predictor, self.tables)

    def decode(self, data: bytes, height: int, width: int) -> IntMap:
        """The symbols of a payload. Raises CorruptFile."""
        return decode(data, (len(self.rounding.steps), height, width), self.predictor, self.tables)

    def ideal_bits(self, symbols: IntMap) -> float:
        """Information content under the tables."""
        return self.tables.content(count(symbols, self.predictor))

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """(settings, arrays)."""
        arrays: dict[str, np.ndarray] = {
            "steps": self.rounding.steps, "around": self.rounding.around,
            "across": self.rounding.across, "across_unit": self.rounding.unit,
            "mean_weights": self.predictor.mean, "scale_weights": self.predictor.scale, "references": self.predictor.references,
            "tables": self.tables.begins,
        }  # fmt: skip
        if self.transform is not None:
            t = self.transform
            arrays |= {"analysis": t.analysis.astype(np.float16), "synthesis": t.synthesis.astype(np.float16), "mean": t.mean}
        return {"name": self.point_name, "channels": self.channels, "nonnegative": int(self.rounding.nonnegative)}, arrays


def from_state(settings: Settings, arrays: Mapping[str, np.ndarray]) -> PredictiveCoder:
    """The coder that gave this state. Raises CorruptFile."""
    channels = stored_integer(settings, "channels", 1, MAX_COMPONENTS)
    nonnegative = bool(stored_integer(settings, "nonnegative", 0, 1))
    steps = stored_array(arrays, "steps", np.float32, (None,))
    planes = len(steps)
    if not 1 <= planes <= channels or not (steps > 0).all():
        raise CorruptFile(f"a coder of feature maps has {planes} steps for {channels} channels, or steps that are not above 0")
    across = stored_array(arrays, "across", np.int8, (None,))
    if len(across) not in (0, planes * (planes - 1) // 2):
        raise CorruptFile(
            f"the feedback of a coder of feature maps has {len(across)} weights, expected {planes * (planes - 1) // 2} or 0"
        )
    unit = stored_array(arrays, "across_unit", np.float32, (planes,))
    around = stored_array(arrays, "around", np.float32, (planes, 4))
    references = stored_array(arrays, "references", np.int16, (planes, REFERENCES))
    if (references < -1).any() or (references >= np.arange(planes)[:, None]).any():
        raise CorruptFile("a plane of a coder of feature maps is predicted from itself or a later one")
    predictor = Predictor(
        stored_array(arrays, "mean_weights", np.int16, (planes, 1 + AROUND + REFERENCES * TAPS)),
        stored_array(arrays, "scale_weights", np.int16, (planes, 1 + 4 + REFERENCES)), references, nonnegative,
    )  # fmt: skip
    tables = Tables.of(stored_array(arrays, "tables", np.uint16, (CLASSES * BINS, TOKENS + 1)))
    transform = None
    if "analysis" in arrays:
        transform = Transform(
            stored_array(arrays, "analysis", np.float16, (planes, channels)).astype(np.float32),
            stored_array(arrays, "synthesis", np.float16, (channels, planes)).astype(np.float32),
            stored_array(arrays, "mean", np.float32, (channels,)),
        )
    elif planes != channels:
        raise CorruptFile(f"a coder of feature maps has {planes} planes for {channels} channels and no transform")
    name = settings.get("name")
    if not isinstance(name, str):
        raise CorruptFile("a coder of feature maps does not say its point's name")
    return PredictiveCoder(name, channels, Rounding(steps, around, across, unit, nonnegative), transform, predictor, tables)
