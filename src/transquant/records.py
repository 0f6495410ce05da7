"""The few frozen records that travel between the rooms.

Shape letters, used everywhere:

    N  samples              C  channels or classes       T  positions a sample (pixels of an output map, tokens)
    O  rows of a weight matrix (output channels)         n  columns (input channels of a group x taps)
    g  groups               o  rows of a group, O = g·o   L  lanes of the entropy coder

A weight tensor of shape (O, ...) is a matrix of O rows and n = prod(shape[1:]) columns; row r belongs to group r // o.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from transquant.channels import KeptChannels

MAX_FOLD = 1024  # see CodedEntry.fold
MAX_BANDS = 1024  # of a transform: what its exact synthesis can sum up
MAX_BASIS = 1 << 15  # magnitude of an entry of a basis
MAX_DEPTH = 16  # bits of a fixed-length code
GRAPH_PREFIX = "onnx:"  # of entries that are no tensors of the network
GRAPH = "onnx:graph"  # FORMAT.md section 8

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float64]

# --------------------------------------------------------------------------------------- what the container holds


@dataclass(frozen=True, slots=True)
class Activation:
    """How the input of a layer is quantized: x has the code round(x / scale) + zero, clipped to 0 … 2^bits − 1."""

    bits: int
    zero: int
    mantissa: int
    exponent: int

    @property
    def scale(self) -> float:
        """Step between two codes, exact in float32."""
        return float(self.mantissa) * 2.0**self.exponent


@dataclass(frozen=True, slots=True)
class CodedEntry:
    """Header record of one lossily coded tensor (FORMAT.md, kind "c"): everything but its symbols.

    `fold`: each row is coded as that many rows, so that a matrix of few long rows fills the lanes of a vectorised reader.
    `transform`: "i" identity, "d" DCT, "k" KLT, "e" ELT. `axis`: what the bands run over, "r" rows, "c" channels,
    "k" kernel, "j" joint. `coding`: "u" entropy-coded symbols, "t" those of a trellis of 2^`state_bits` states, "f"
    fixed-length codes. `activation`: of the layer's input, where it is quantized too."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    qp: int = 0
    recon_offsets: tuple[int, int] = (0, 0)
    groups: Literal["", "r", "c", "rc", "s"] = ""
    fold: int = 1
    transform: Literal["i", "d", "k", "e"] = "i"
    axis: Literal["", "r", "c", "k", "j"] = ""
    coding: Literal["u", "t", "f"] = "u"
    state_bits: int = 0
    activation: Activation | None = None
    span: int = 0  # columns of a row that share a step, where `groups` is "s"

    @property
    def rows(self) -> int:
        """O; 1 for vectors and scalars."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        """n of the matrix that is coded."""
        return prod(self.shape[1:]) if len(self.shape) > 1 else prod(self.shape)

    @property
    def taps(self) -> int:
        """The kernel's positions, 1 outside kernels."""
        return prod(self.shape[2:])

    @property
    def group_columns(self) -> int:
        """Consecutive columns of the coded matrix that share a column exponent."""
        return {"k": self.shape[1] if len(self.shape) > 1 else 1, "j": 1}.get(self.axis, self.taps)

    @property
    def spans(self) -> int:
        """Spans of a row, 0 where its groups are none."""
        return -(-self.columns // self.span) if self.span else 0

    @property
    def bands(self) -> int:
        """r: bands along the axis; 0 without one."""
        if not self.axis:
            return 0
        return {"r": self.rows, "c": self.shape[1], "k": self.taps, "j": self.columns}[self.axis]

    @property
    def basis_side(self) -> int:
        """Side length of the basis that is sent, 0 where none is."""
        return self.bands if self.transform in ("k", "e") else 0

    @property
    def bands_a_group(self) -> int:
        """Bands that share a bit depth and a step (FORMAT.md section 7)."""
        values = self.rows * self.columns // max(self.bands, 1)
        return max(1, min(-(-self.bands // 8), -(-values // 8)))


@dataclass(frozen=True, slots=True)
class BatchNormEntry:
    """Header record of a BatchNorm's equivalent set (kind "b"): two vectors of C values, scale and shift."""

    name: str
    channels: int
    dtype: str
    qps: tuple[int, int]
    eps: float
    batches_tracked: int | None

    def key(self, attribute: str) -> str:
        """State-dict key of one attribute ("weight", "running_mean", ...)."""
        return f"{self.name}.{attribute}" if self.name else attribute


@dataclass(frozen=True, slots=True)
class RawEntry:
    """Header record of a tensor stored exactly (kind "r")."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class AliasEntry:
    """A second name of an earlier tensor (kind "a")."""

    name: str
    of: str


Entry = CodedEntry | BatchNormEntry | RawEntry | AliasEntry


def is_packed(entry: Entry) -> bool:
    """Whether an entry's symbols are fixed-length codes."""
    return isinstance(entry, CodedEntry) and entry.coding == "f"


# kinds of symbol sections: binary decisions; tokens from tables that adapt, that are fixed, or that come with them
Coder = Literal["s", "m", "t", "l"]
SectionKind = Literal[Coder, "p", "r"]


@dataclass(frozen=True, slots=True)
class Section:
    """One row of the header's section table and, once read or encoded, its bytes."""

    kind: SectionKind
    count: int
    lanes: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Container:
    """A whole file, parsed: nothing is decoded yet, everything is validated against FORMAT.md section 2."""

    step: tuple[int, int]
    entries: tuple[Entry, ...]
    sections: tuple[Section, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    kept: tuple[KeptChannels, ...] = ()  # steps in which channels had been removed from the network


@dataclass(frozen=True, slots=True)
class Limits:
    """What a file may ask for. Raise them for large models from a source you trust."""

    max_decoded_bytes: int = 4 << 30
    max_expansion: int = 4096
    free_expansion_bytes: int = 16 << 20


# --------------------------------------------------------------------------------------- what the coder sees


@dataclass(frozen=True, slots=True)
class Plane:
    """A matrix of integers to be entropy coded (FORMAT.md section 4).

    `symbols` int32 (rows, columns), C order. `kind` picks the contexts: 0 weights, 1 side, 2 vectors, 3 basis. `width` and
    `taps` place a column inside its kernel; 1 and 1 outside kernels. `state_bits` of its trellis, 0 without one."""

    symbols: IntArray
    kind: int
    width: int = 1
    taps: int = 1
    state_bits: int = 0


@dataclass(frozen=True, slots=True)
class BandCodes:
    """Fixed-length codes of an entry: int32 by band group, bit depths and step indices t of the coefficients, and bit
    depths of the basis columns (None where there is no basis)."""

    depths: IntArray
    indices: IntArray
    basis_depths: IntArray | None = None


@dataclass(frozen=True, slots=True)
class CodedTensor:
    """An entry with its symbols: what `encode` takes and `decode` gives.

    `symbols` int32 (rows, columns), of weights or of their coefficients; `row_exponents` int32 (rows,), `column_exponents` int32
    (columns / group_columns,), `span_exponents` int32 (rows, spans), half octaves, None where the entry's `groups` leaves them
    out. `basis` int32 (bands, bands) where the entry's transform sends one; `codes` where its coding is fixed-length."""

    entry: CodedEntry
    symbols: IntArray
    row_exponents: IntArray | None = None
    column_exponents: IntArray | None = None
    basis: IntArray | None = None
    codes: BandCodes | None = None
    span_exponents: IntArray | None = None


@dataclass(frozen=True, slots=True)
class CodedBatchNorm:
    """A BatchNorm entry with its symbols: int32 (C,) each."""

    entry: BatchNormEntry
    scale: IntArray
    shift: IntArray


Coded = CodedTensor | CodedBatchNorm


@dataclass(frozen=True, slots=True)
class TensorBits:
    """Where the bits of one coded tensor went: its symbols, its side information, and the basis' part of that."""

    payload: float
    side: float
    basis: float = 0.0


# --------------------------------------------------------------------------------------- what compress works on


@dataclass(frozen=True, slots=True)
class Use:
    """Another place where a weight is used: by which module, as which of its attributes; `kind` as for weights."""

    module: str
    kind: str
    attribute: str


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """A weight that will be coded as a matrix. `kind`: "linear", "conv2d", ... (modules/kinds.py), or "matrix": nothing is known
    of how it is used but its gradient. `module` is the path of the module that uses it ("" for the root, None where there is but a
    state dict); `attribute`: what it is called there; `rescaled`: its rows are (weight and spectral norm). `tied`: other users."""

    name: str
    module: str | None
    kind: str
    shape: tuple[int, ...]
    dtype: str
    groups: int = 1
    attribute: str = "weight"
    rescaled: bool = False
    tied: tuple[Use, ...] = ()


@dataclass(frozen=True, slots=True)
class VectorSpec:
    """A bias or normalisation vector that is coded with one step."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class BatchNormSpec:
    """A BatchNorm with running statistics and affine parameters; `name` is the module path."""

    name: str
    channels: int
    dtype: str
    eps: float
    batches_tracked: int | None

    def key(self, attribute: str) -> str:
        """State-dict key of one attribute."""
        return f"{self.name}.{attribute}" if self.name else attribute


@dataclass(frozen=True, slots=True)
class RawSpec:
    """A tensor that is stored exactly, and why."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    reason: str


@dataclass(frozen=True, slots=True)
class AliasSpec:
    """A tied tensor: another name of `of`."""

    name: str
    of: str


Spec = WeightSpec | VectorSpec | BatchNormSpec | RawSpec | AliasSpec


@dataclass(frozen=True, slots=True)
class Plan:
    """Which tensors are coded, and how, in state-dict order; `num_parameters` counts tied values once. `original_bytes`: all
    tensors in their own dtype, buffers included, tied ones once. `kept`: steps that made the module smaller before."""

    specs: tuple[Spec, ...]
    num_parameters: int
    original_bytes: int
    kept: tuple[KeptChannels, ...] = ()

    @property
    def num_weights(self) -> int:
        """Values that are coded as matrices."""
        return sum(prod(s.shape) for s in self.specs if isinstance(s, WeightSpec))

    @property
    def work(self) -> float:
        """Multiply–adds of one quantization pass with feedback: rows · columns · (rows + columns) of each weight."""
        return float(sum(prod(s.shape) * (s.shape[0] + prod(s.shape[1:])) for s in self.specs if isinstance(s, WeightSpec)))


@dataclass(frozen=True, slots=True)
class LayerStats:
    """Calibration statistics of one weight: D ≈ Σ tr(output_moment[k] E input_moment[k] Eᵀ) over groups k, in units of `metric`.

    For most layers columns meet inputs and rows give outputs. Where rows meet the inputs (transposed convolutions, embeddings,
    HF's Conv1D) `input_moment` is still that of the columns, and holds gradients. `input_moment` float64 (g, n, n), mean over
    samples and positions of x xᵀ; (g, b, m, m) where only b diagonal blocks of side m = n / b are kept; or (g, n) where only the
    diagonal is. `output_moment` float64 (g, o, o), *scaled* so that D is as above; or (g, o) diagonal. `input_mean` float64 (g,
    n), the mean of x over samples and positions; None where columns meet no inputs. `samples`: how many samples the moments saw.
    `gradient_energy`: E‖∇W‖² per sample, with its relative standard error."""

    input_moment: FloatArray
    output_moment: FloatArray
    samples: int
    gradient_energy: float
    gradient_energy_error: float
    input_mean: FloatArray | None = None


@dataclass(frozen=True, slots=True)
class InputStats:
    """What quantizing the input of a layer costs: a histogram of its values, weighted with their squared gradients.
    `sums` float64 (3, bins): of h, h·x and h·x² by bin, h scaled so that an error e of all values in a bin costs h·e² in units of
    the metric; bin k holds values from (k − bins / 2)·2^exponent on. `low`, `high`: smallest and largest value that was seen.
    `values`: of the input, a sample."""

    sums: FloatArray
    exponent: int
    low: float
    high: float
    values: float


@dataclass(frozen=True, slots=True)
class Statistics:
    """All that calibration learns. `vectors[key]`: float64, elementwise sensitivity (same shape as the tensor; for a
    BatchNorm keys "<module>.weight" and "<module>.bias" in terms of the equivalent scale and shift) such that the
    predicted distortion of an error e is sum(sensitivity · e²). `metric` is what was used: "kl", "mse" or "weights". `absorbers`:
    by weight, the BatchNorm whose shift can take the mean error of the layer's output. `inputs`: by weight, where asked for."""

    layers: Mapping[str, LayerStats]
    vectors: Mapping[str, FloatArray]
    metric: str
    samples: int
    absorbers: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, InputStats] = field(default_factory=dict)
