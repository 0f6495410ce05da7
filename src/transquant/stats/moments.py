"""Second moments of one weight for one micro-batch: of what meets its columns and of what meets its rows.

    z = W x:   x ─ (g, n, positions) ─ X Xᵀ     gradient of z ─ (g, o, positions) ─ Y Yᵀ

K-FAC's two factors (Martens & Grosse, arXiv 1503.05671; convolutions: Grosse & Martens, arXiv 1602.01407). Where a weight
is stored the other way round, z = Wᵀ x, inputs meet the rows and gradients the columns. Activations are dropped as soon as
their moment is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transquant.errors import InputError
from transquant.records import WeightSpec

POSITIONS = 256  # of a sample that enter the moment of the columns: neighbours tell little that is new
TOKENS = ("embedding", "embedding_bag")  # rows that never meet: their moment is diagonal


@dataclass(frozen=True, slots=True)
class Shape:
    """How the moments of a layer are kept: side lengths, and the number of diagonal blocks of the moment of the columns."""

    groups: int
    rows: int
    columns: int
    blocks: int  # 1: full, > 1: that many blocks, 0: diagonal
    full_output: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of both moments in float64."""
        inner = self.columns * self.columns // self.blocks if self.blocks else self.columns
        outer = self.rows * self.rows if self.full_output else self.rows
        return 8 * self.groups * (inner + outer)


class Moments:
    """Sums over one micro-batch, filled by a recorder: `columns` (g, n, n), (g, b, m, m) or (g, n); `rows` (g, o, o)
    or (g, o); `total` (g, n), the sum of the columns where they meet inputs; `positions` (g,), how many columns. float64, but
    for matrices that are one product of float32: those stay as they are until something is added."""

    def __init__(self, spec: WeightSpec, shape: Shape) -> None:
        self.spec, self.shape = spec, shape
        self.reset(0)

    def reset(self, offset: int) -> None:
        """Forget everything; `offset` moves the grid of positions that are used."""
        self.offset = offset
        self.columns: Tensor | None = None
        self.rows: Tensor | None = None
        self.total: Tensor | None = None
        self.positions = torch.zeros(self.shape.groups, dtype=torch.float64)

    def thin(self, positions: int) -> slice:
        """Which of so many positions of a sample are used."""
        stride = -(-positions // POSITIONS) | 1
        return slice(self.offset % stride if stride > 1 else 0, None, stride)

    def add_columns(self, x: Tensor, group: int | None = None, mean: bool = True) -> None:
        """x (g, n, P), of one group (1, n, P); `mean`: they are inputs, and their mean counts."""
        x = x.detach().float()
        if self.shape.blocks == 0:
            moment = x.square().sum(2, dtype=torch.float64)
        else:
            parts = x.reshape(len(x), self.shape.blocks, -1, x.shape[2]) if self.shape.blocks > 1 else x
            moment = parts @ parts.transpose(-1, -2)
        self.columns = self._plus(self.columns, moment, group)
        if mean:
            self.total = self._plus(self.total, x.sum(2, dtype=torch.float64), group)
        self.positions[slice(None) if group is None else group] += x.shape[2]

    def add_rows(self, y: Tensor, group: int | None = None) -> None:
        """y (g, o, P), of one group (1, o, P)."""
        y = y.detach().float()
        full = self.shape.full_output
        self.rows = self._plus(self.rows, y @ y.transpose(1, 2) if full else y.square().sum(2, dtype=torch.float64), group)

    def add_row_squares(self, squares: Tensor) -> None:
        """float64 (g, o): rows that are never used together."""
        self.rows = self._plus(self.rows, squares, None)

    def check(self) -> None:
        """Raises InputError where what was seen so far has NaN or infinite values."""
        for moment in (self.columns, self.rows):
            if moment is None:
                continue
            squares = moment if moment.ndim == 2 else moment.diagonal(dim1=-2, dim2=-1)  # no product is larger than both
            if not bool(torch.isfinite(squares).all()):
                raise InputError(f"layer {self.spec.module!r} has NaN or infinite inputs on a calibration batch")

    def _plus(self, total: Tensor | None, part: Tensor, group: int | None) -> Tensor:
        if group is not None:
            whole = part.new_zeros((self.shape.groups, *part.shape[1:]))
            whole[group] = part[0]
            part = whole
        return part if total is None else total.double() + part


def moment_shapes(specs: list[WeightSpec], max_side: int, memory_limit: int) -> dict[str, Shape]:
    """How each weight's moments are kept: full up to `max_side`, then diagonal blocks of at most that side, then the
    diagonal; and while all together exceed `memory_limit` bytes, the largest takes the next simpler form."""
    shapes = {s.name: _shape(s, max_side) for s in specs}
    while sum(s.num_bytes for s in shapes.values()) > memory_limit:
        name, largest = max(shapes.items(), key=lambda item: item[1].num_bytes)
        simpler = _simpler(largest)
        if simpler is None:
            break
        shapes[name] = simpler
    return shapes


def _shape(spec: WeightSpec, max_side: int) -> Shape:
    rows = spec.shape[0] // spec.groups
    columns = 1
    for d in spec.shape[1:]:
        columns *= d
    return Shape(spec.groups, rows, columns, _blocks(columns, max_side), rows <= max_side and spec.kind not in TOKENS)


def _blocks(columns: int, side: int) -> int:
    """Fewest equal blocks of at most `side` columns; 0 (the diagonal) where that takes blocks of under 16."""
    count = next(b for b in range(-(-columns // side), columns + 1) if columns % b == 0)
    return count if count == 1 or columns // count >= 16 else 0


def _simpler(shape: Shape) -> Shape | None:
    if shape.full_output and shape.rows > shape.columns:
        return Shape(shape.groups, shape.rows, shape.columns, shape.blocks, False)
    if shape.blocks == 1 and (blocks := _blocks(shape.columns, max(shape.columns // 8, 1))):
        return Shape(shape.groups, shape.rows, shape.columns, blocks, shape.full_output)
    if shape.blocks:
        return Shape(shape.groups, shape.rows, shape.columns, 0, shape.full_output)
    if shape.full_output:
        return Shape(shape.groups, shape.rows, shape.columns, 0, False)
    return None
