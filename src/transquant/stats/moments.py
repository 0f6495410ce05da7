"""Second moments of one layer for one micro-batch, as hooks on its module.

    x ─ patches ─ (g, n, positions) ─ X Xᵀ     y ─ gradient ─ (g, o, positions) ─ Y Yᵀ

K-FAC's two factors (Martens & Grosse, arXiv 1503.05671; convolutions: Grosse & Martens, arXiv 1602.01407). Activations
are dropped as soon as their moment is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from transquant.errors import InputError
from transquant.records import WeightSpec

POSITIONS = 256  # of a sample that enter the input moment: neighbours tell little that is new

Form = Literal["full", "blocks", "diagonal"]


@dataclass(frozen=True, slots=True)
class Shape:
    """How the moments of a layer are kept: side lengths, and the number of diagonal blocks of the input moment."""

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


class LayerMoments:
    """Collects the moments of one weight, over all modules that share it, while a micro-batch runs forward and backward."""

    def __init__(self, spec: WeightSpec, modules: Sequence[nn.Module], shape: Shape) -> None:
        self.spec, self.modules, self.shape = spec, modules, shape
        self.offset = 0
        self.reset(0)

    def attach(self) -> list[RemovableHandle]:
        """Hook the modules; the caller removes the handles."""
        return [module.register_forward_hook(self._forward) for module in self.modules]

    def reset(self, offset: int) -> None:
        """Forget everything; `offset` moves the grid of positions that are used."""
        self.offset = offset
        self.input: Tensor | None = None
        self.output: Tensor | None = None
        self.total: Tensor | None = None
        self.positions = 0

    def _forward(self, module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        if not args or not isinstance(result, Tensor) or not result.requires_grad or result.numel() == 0:
            return
        x = args[0].detach()
        if self.spec.kind == "embedding":
            counts = torch.bincount(x.reshape(-1), minlength=self.spec.shape[0]).double()
            self.output = counts[None] if self.output is None else self.output + counts[None]
            result.register_hook(self._embedding_gradient)  # type: ignore[no-untyped-call]
            return
        patches = _patches(module, x)  # (N, g, n, T)
        stride = -(-patches.shape[3] // POSITIONS) | 1
        if stride > 1:
            patches = patches[..., self.offset % stride :: stride]
        columns = patches.permute(1, 2, 0, 3).flatten(2).float()
        moment = self._input_moment(columns)
        if not bool(torch.isfinite(moment).all()):
            raise InputError(f"layer {self.spec.module!r} has NaN or infinite inputs on a calibration batch")
        self.input = moment if self.input is None else self.input + moment
        total = columns.sum(2, dtype=torch.float64)
        self.total = total if self.total is None else self.total + total
        self.positions += columns.shape[2]
        result.register_hook(self._gradient)  # type: ignore[no-untyped-call]

    def _input_moment(self, columns: Tensor) -> Tensor:
        if self.shape.blocks == 0:
            return columns.square().sum(2, dtype=torch.float64)
        if self.shape.blocks > 1:
            columns = columns.reshape(len(columns), self.shape.blocks, -1, columns.shape[2])
        return (columns @ columns.transpose(-1, -2)).double()

    def _gradient(self, gradient: Tensor) -> None:
        g = gradient.detach().float()
        if self.spec.kind == "conv2d":
            g = g[None] if g.ndim == 3 else g
            g = g.flatten(2).view(len(g), self.shape.groups, self.shape.rows, -1).permute(1, 2, 0, 3).flatten(2)
        else:
            g = g.reshape(1, -1, g.shape[-1]).transpose(1, 2)
        moment = (g @ g.transpose(1, 2)).double() if self.shape.full_output else g.square().sum(2, dtype=torch.float64)
        self.output = moment if self.output is None else self.output + moment

    def _embedding_gradient(self, gradient: Tensor) -> None:
        g = gradient.detach().float().reshape(-1, gradient.shape[-1])
        moment = (g.T @ g).double()[None] if self.shape.blocks else g.square().sum(0, dtype=torch.float64)[None]
        self.input = moment if self.input is None else self.input + moment
        self.positions += len(g)


def _patches(module: nn.Module, x: Tensor) -> Tensor:
    """What each output position sees, (N, g, n, T)."""
    if not isinstance(module, nn.Conv2d):
        return x.reshape(len(x) if x.ndim > 1 else 1, -1, x.shape[-1]).transpose(1, 2)[:, None]
    if x.ndim == 3:
        x = x[None]
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        # PyTorch keeps the padding of each side in this order for exactly this call
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        padding: tuple[int, ...] = (0, 0)
    else:
        padding = module.padding
    unfolded = functional.unfold(x, module.kernel_size, module.dilation, padding, module.stride)
    return unfolded.view(len(x), module.groups, -1, unfolded.shape[-1])


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
    if spec.kind == "embedding":
        return Shape(1, rows, columns, 1 if columns <= max_side else 0, False)
    blocks = _blocks(columns, max_side)
    return Shape(spec.groups, rows, columns, blocks, rows <= max_side)


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
