"""What is decided about a compression before its one scalar c: the method asked for, and what data decide."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transquant.allocation.steps import Grouping
from transquant.quantizers.feedback import Rounding
from transquant.quantizers.metric import Damping
from transquant.records import Coder

Kind = Literal["i", "d", "k", "e"]
Axis = Literal["", "r", "c", "k", "j"]
KINDS: dict[str, Kind] = {"identity": "i", "dct": "d", "klt": "k", "elt": "e"}
CODERS: dict[str, Coder] = {"adaptive": "m", "static": "l"}
KIND_NAMES = {kind: name for name, kind in KINDS.items()}


@dataclass(frozen=True, slots=True)
class Method:
    """What the caller forces. `transform`: "auto", "identity", "dct", "klt", "elt"; `axis`: "input", "output", "kernel",
    "joint" or None; `coding`: "entropy" or "fixed"; `feedback`: closed loop or open; `state_bits`: log2 of the number of
    states of the trellis of entropy-coded weights, 0 for a scalar quantizer; `coder`: the kind of symbol sections."""

    transform: str = "auto"
    axis: str | None = None
    coding: str = "entropy"
    feedback: bool = True
    state_bits: int = 0
    coder: Coder = "m"


@dataclass(frozen=True, slots=True)
class LayerTransform:
    """The transform of one layer: `kind` and `axis` as FORMAT.md names them, entries of a basis with unit-norm columns in
    multiples of 2^−bits (closed loop). `kept`: the number of bands, where multiply–adds are to be saved; 0: all."""

    kind: Kind = "i"
    axis: Axis = ""
    bits: int = 4
    kept: int = 0


IDENTITY = LayerTransform()
PACKED = LayerTransform("i", "c")


@dataclass(frozen=True, slots=True)
class Choice:
    """What the held-back samples decide: the regularisation of the metric, the step groups, and how rounding leans to zero:
    by a dead zone or, in a trellis, by the weight of a bit, in units of λ, and how far values shrink to their centroids.
    `level`: the scalar c whose water level the regularisation and the offsets suppose; 0 for each draft's own."""

    damping: Damping = field(default_factory=Damping)
    grouping: Grouping = field(default_factory=Grouping)
    dead_zone: float = 0.6
    rate: float = 0.5
    shrink: float = 0.5
    level: float = 0.0

    def rounding(self) -> Rounding:
        """Without a trellis: magnitudes are rebuilt in the middle of their bins, [k − 1 + dead zone, k + dead zone). Centroids,
        which the mean square asks for, shrink every layer a little, and that hurts the network more than it saves."""
        offset = -round(64 * (self.dead_zone - 0.5))
        return Rounding(self.dead_zone, (offset, offset))
