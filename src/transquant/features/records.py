"""What travels inside this room: where feature maps are, and what a coder of one kind of map can do.

Shapes: C channels, K components (of a transform; C without one), H x W pixels. A map of one sample is float32 (C, H, W);
vectors and sequences are maps of height 1 and 1 x T pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

FloatMap = NDArray[np.float32]
IntMap = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Point:
    """A place in a network where a feature map is: the result of an activation function.

    `name`: path of the module that calls it, "#", and which of its calls it is ("layer1.0#1"). `activation`: "relu", "gelu", …
    `axis`: of the channels in the tensor; `channels` C. `low`, `high`: where the activation clips, None where it does not: maps
    of ReLUs (0, None) and ReLU6 (0, 6) can be coded before the activation as well as after it, all others after it."""

    name: str
    activation: str
    axis: int
    channels: int
    low: float | None = None
    high: float | None = None

    @property
    def clips(self) -> bool:
        """Whether the activation only clips, so that its input can be coded instead of its result."""
        return self.low is not None

    def activated(self, values: FloatMap) -> FloatMap:
        """What the activation makes of values that were coded before it; exact zeros where it clips to 0."""
        return np.clip(values, self.low, self.high)


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How much an error in a map matters, in nats of KL divergence (or the metric's unit) a sample: second moments of the gradient.

    `channels` float64 (C, C): E[g gᵀ] summed over a sample's pixels / their number, so that an error e (C, H, W) that is white
    over pixels costs Σ_pixels eᵀ·channels·e. `neighbours` float64 (C, 5, 5): of each channel, E of products of the gradients at a
    pixel and at its neighbours right, below, below right, below left, in the same unit. `mean` float64 (C,) and `covariance`
    float64 (C, C): of what goes into the activation where it clips, else of its result, over pixels of the float network."""

    channels: NDArray[np.float64]
    neighbours: NDArray[np.float64]
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Components:
    """How a coder comes to its symbols where it rounds linear combinations of the channels: components are `analysis`, float32
    (K, C), times (a pixel of the map − `mean`, float32 (C,)), and `quantize` makes symbols int32 (K, H, W) of components float32
    (K, H, W)."""

    analysis: FloatMap
    mean: FloatMap
    quantize: Callable[[FloatMap], IntMap]


class MapCoder(Protocol):
    """Codes the maps of one point, one sample at a time.

    encode and decode are exact inverses on integers; quantize and dequantize are the only ones that see real numbers."""

    @property
    def kind(self) -> str:
        """Name of the method in codec files; registry.KINDS has what makes such a coder of its state again."""
        ...

    @property
    def before(self) -> bool:
        """Whether it codes what goes into the activation rather than its result."""
        ...

    @property
    def mode(self) -> str:
        """In a word or two, for the ledger."""
        ...

    @property
    def components(self) -> Components | None:
        """What the layer that makes the map can do of `quantize` (folding.py); None where symbols do not come so."""
        ...

    def quantize(self, values: FloatMap) -> IntMap:
        """float32 (C, H, W) → symbols int32 (K, H, W)."""
        ...

    def dequantize(self, symbols: IntMap) -> FloatMap:
        """int32 (K, H, W) → float32 (C, H, W)."""
        ...

    def encode(self, symbols: IntMap) -> bytes:
        """A payload without height and width, which the packet has."""
        ...

    def decode(self, data: bytes, height: int, width: int) -> IntMap:
        """The symbols of a payload. Raises CorruptFile."""
        ...

    def ideal_bits(self, symbols: IntMap) -> float:
        """Information content of symbols under the coder's model, in bits."""
        ...

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """(settings that JSON can hold, arrays): all that a codec file needs to make this coder again."""
        ...


Settings = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]
FromState = Callable[[Settings, Arrays], MapCoder]
Fit = Callable[[FloatMap, Point, Sensitivity, float], MapCoder]
"""(what goes into the activation of some samples, float32 (N, C, H, W); point; sensitivity; scalar c > 0) → a coder. Larger c is
coarser: one scalar for all points of a network, whatever the method."""

C = TypeVar("C")
