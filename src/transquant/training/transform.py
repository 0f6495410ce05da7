"""Transform-quantization retraining (Young et al., arXiv 2009.01174, section on retraining; `quantize` in steps fixed before).

Coefficients, and the basis where a layer has one, learn through straight-through rounding; steps are those that allocation gave.
Where we differ: codes are entropy-coded, so rounding has a dead zone and what learns pays for the bits it takes. And, as an option,
symbols settle little by little, drawn at random, while the others learn to make up for them: weights come to rest at borders,
where the loss and the price of a bit balance, and go on jumping to and fro, each in the noise of all others; settled all at once
they stay wherever they were. (Parts that are fixed while the rest learns: Zhou et al., arXiv 1702.03044; weights that oscillate,
and are frozen one by one: Nagel et al., arXiv 2203.11086. There those that are large or oscillate most go first; here both nearest
and farthest from a border first were worse than at random, see docs/training.md.)
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from transquant.records import CodedTensor
from transquant.training.code_length import CodeLengths
from transquant.training.rounding import rebuilt, symbols_of, through
from transquant.training.soft import SoftWeight, integers
from transquant.transforms.exact import dct_basis
from transquant.transforms.layout import Layout

# Steps from a border that parameters begin. The closed loop's errors make up for each other, which one step of Adam would undo
# if all that the loop has rounded the other way lay at a border.
INSIDE = 0.3


class TransformWeight(SoftWeight):
    """Parameters: coefficients in steps, in the weight's shape; and the basis, (r, r) in its integers, where one is sent."""

    basis: Tensor
    follows = True
    held: Tensor | None  # symbols (O, n), float, of which some stay

    def __init__(self, tensor: CodedTensor, step: tuple[int, int]) -> None:
        super().__init__(tensor, step)
        self.register_buffer("held", None)
        self.stays: Tensor | None = None  # bool (O, n), which
        self.dead_zone = 0.5 - tensor.entry.recon_offsets[0] / 64  # magnitudes are rebuilt in the middle of their bins
        if tensor.entry.transform == "d":
            self.register_buffer("basis", torch.from_numpy(dct_basis(tensor.entry.shape[2:])).float(), persistent=False)

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Parameters whose symbols are the template's, near to the float weight, but not near to a border."""
        symbols = torch.from_numpy(self.tensor.symbols).float().to(weight.device)
        coefficients = self.matrix(weight.detach().float())
        basis = None
        if self.tensor.basis is not None:
            basis = torch.from_numpy(self.tensor.basis).float().to(weight.device)
        if self.tensor.entry.transform != "i":
            coefficients = self._analysis(coefficients, basis)
        size, low, inside = symbols.abs(), 1 - self.dead_zone, min(INSIDE, self.dead_zone / 2)
        inner = torch.where(size > 0, size - low + inside, inside - self.dead_zone)
        scaled = coefficients / self.unit * torch.where(symbols < 0, -1.0, 1.0)
        near = torch.minimum(torch.maximum(scaled, inner), size + self.dead_zone - inside)
        start = (near * torch.where(symbols < 0, -1.0, 1.0)).reshape(self.shape).to(weight.dtype)
        return start if basis is None else (start, basis.to(weight.dtype))

    def forward(self, *originals: Tensor) -> Tensor:
        """Rounded coefficients, synthesized; gradients as if nothing were rounded."""
        scaled = self.matrix(originals[0])
        hard = rebuilt(self._symbols(scaled, 0.0), self.tensor.entry.recon_offsets)
        soft = hard if self.fixed is not None else through(hard, scaled)
        decoded = (soft if self.stays is None else torch.where(self.stays, hard, soft)) * self.unit
        if self.tensor.entry.transform != "i":
            basis = None if len(originals) < 2 else through(originals[1].round(), originals[1])
            decoded = self._synthesis(decoded, basis)
        return decoded.reshape(self.shape).to(originals[0].dtype)

    def bits(self, lengths: CodeLengths, *originals: Tensor) -> Tensor:
        """Of the coefficients; a basis keeps its length, nearly."""
        scaled = self.matrix(originals[0])
        if self.stays is not None:
            scaled = torch.where(self.stays, scaled.detach(), scaled)
        return lengths.bits(self.name, (scaled.abs() - (self.dead_zone - 0.5)).clamp(min=0))

    def code(self, shift: float, *originals: Tensor) -> CodedTensor:
        """`shift`: by how many steps the dead zone is wider."""
        symbols = integers(self._symbols(self.matrix(originals[0]), shift))
        basis = None if len(originals) < 2 else integers(originals[1].round())
        if basis is not None:  # columns whose band is zero throughout are not needed
            used = np.abs(Layout.of(self.tensor.entry).coded_bands(symbols)).max(1) > 0
            basis = np.where(used[None, :], basis, 0).astype(np.int32)
        return replace(self.tensor, symbols=symbols, basis=basis)

    def hold(self, share: float, *originals: Tensor) -> None:
        """Coefficients' symbols; a basis goes on learning."""
        scaled = self.matrix(originals[0].detach())
        self.held = self._symbols(scaled, 0.0)
        self.stays = (torch.rand(scaled.shape, generator=self.generator("held")) < share).to(scaled.device)

    def settle(self, shift: float, *originals: Tensor) -> None:
        """Coefficients stay; a basis goes on learning."""
        self.fixed = self._symbols(self.matrix(originals[0].detach()), shift)
        self.held = self.stays = None

    def _symbols(self, scaled: Tensor, shift: float) -> Tensor:
        """Of coefficients in steps. Where the bin of zero is wider or narrower by `shift`, that goes for those that stay, too."""
        border = self.dead_zone + shift
        if self.fixed is not None:
            return self.fixed if shift == 0 else torch.where(scaled.abs() < border, 0.0, self.fixed)
        free = symbols_of(scaled, border)
        if self.held is None or self.stays is None:
            return free
        stays = self.stays if shift == 0 else self.stays & ((self.held != 0) if shift < 0 else (scaled.abs() >= border))
        return torch.where(stays, self.held, free)

    def _matrix_of(self, basis: Tensor | None) -> Tensor:
        """Synthesis (r, r), in the integers of the file: their scales are part of the steps."""
        return self.basis if basis is None else basis

    def _synthesis(self, coded: Tensor, basis: Tensor | None) -> Tensor:
        layout = Layout.of(self.tensor.entry)
        return from_bands(layout, self._matrix_of(basis) @ coded_bands(layout, coded))

    def _analysis(self, weight: Tensor, basis: Tensor | None) -> Tensor:
        layout = Layout.of(self.tensor.entry)
        inverse = torch.linalg.pinv(self._matrix_of(basis).double())
        bands = inverse @ torch.from_numpy(layout.bands(weight.cpu().numpy())).double().to(weight.device)
        return torch.from_numpy(layout.coded(bands.cpu().numpy())).to(weight)


def coded_bands(layout: Layout, coded: Tensor) -> Tensor:
    """`Layout.coded_bands` of a tensor, with gradients."""
    if layout.axis == "r":
        return coded
    if layout.axis == "j":
        return coded.T
    first, second = (layout.taps, layout.channels) if layout.axis == "k" else (layout.channels, layout.taps)
    return coded.reshape(layout.rows, first, second).transpose(0, 1).reshape(first, layout.rows * second)


def from_bands(layout: Layout, bands: Tensor) -> Tensor:
    """`Layout.weight` of a tensor, with gradients."""
    if layout.axis == "r":
        return bands
    if layout.axis in ("j", "k"):
        return bands.T.reshape(layout.rows, layout.channels * layout.taps)
    return bands.reshape(layout.channels, layout.rows, layout.taps).transpose(0, 1).reshape(layout.rows, -1)
