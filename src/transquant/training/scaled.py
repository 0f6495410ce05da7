"""Weights of one scale a layer: whole numbers times α, as clusters and uniform quantizers have them.

    weight ─ ÷ unit ─ parameter      α = base · e^a, a the second parameter, snapped to what the file can write

The file has Δ on quarter octaves and rebuilds magnitude 1 as Δ·(1 − d₁/64), magnitudes k above as Δ·(k − d₂/64). With d₂ = 2·d₁
the magnitudes 0, 1, 2 are a uniform grid. So α is met within 0.7 per cent for magnitudes up to 1, within 1.2 up to 2; larger
grids take quarter octaves alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from transquant.entropy.tables import fold_for
from transquant.grid import MAX_QP, steps
from transquant.records import CodedTensor, FloatArray, IntArray
from transquant.training.rounding import through
from transquant.training.soft import SoftWeight, integers, step_sizes
from transquant.training.transform import coded_bands, from_bands
from transquant.transforms.exact import dct_basis
from transquant.transforms.layout import Layout

SCALE_RATE = 0.002  # e-folds of α a step of Adam
REFRESH = 25  # steps between two estimates of α
REACH = 64  # quarter octaves from the template's step that α may go
TRIED = 40  # scales of the first search, eight an octave


class ScaledWeight(SoftWeight):
    """Parameters: the weight in units, in its shape; and a, (), the logarithm of α over `base`. Symbols are `low` … `high`.

    `unit`: the template's steps; one for all, their root mean square in the weight, where the template has a transform."""

    rates = (None, SCALE_RATE)
    scales: Tensor  # float32 (N,), ascending: all α that the file can write near the template's step
    borders: Tensor  # float32 (N − 1,), between them

    def __init__(self, tensor: CodedTensor, step: tuple[int, int], low: int, high: int) -> None:
        super().__init__(tensor, step)
        self.low, self.high, entry = low, high, tensor.entry
        if entry.transform != "i":
            self.unit = torch.full((1, 1), _spread(tensor, step_sizes(tensor, step)))
        self.base = float(self.unit.double().mean())
        fold = fold_for(entry.rows, entry.columns // max(entry.taps, 1), entry.taps)
        plain = replace(entry, transform="i", axis="", groups="", span=0, fold=fold, recon_offsets=(0, 0))
        self.tensor = CodedTensor(plain, np.zeros((entry.rows, entry.columns), np.int32))
        values, self.codes = writable(step, entry.qp, max(-low, high))
        self.register_buffer("scales", torch.from_numpy(values).float(), persistent=False)
        self.register_buffer("borders", torch.from_numpy(np.sqrt(values[1:] * values[:-1])).float(), persistent=False)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weight in units, and a of the first α."""
        own = self.matrix(weight.detach()).float()
        scale = max(float(self.first_scale(own.double())), 1e-12)
        scaled = (own / self.unit).reshape(self.shape).to(weight.dtype)
        return scaled, torch.tensor(np.log(scale / self.base), dtype=torch.float32, device=weight.device)

    def forward(self, *originals: Tensor) -> Tensor:
        """While it learns what the method says, then symbols times α, which goes on learning."""
        if self.fixed is not None:
            found = self.fixed * self.scale(originals[1])
        else:
            found = self.soft(self.values(originals[0]), originals[1])
        return found.reshape(self.shape).to(originals[0].dtype)

    @abstractmethod
    def soft(self, weight: Tensor, a: Tensor) -> Tensor:
        """The weight (O, n) that the layer uses, of one that learns."""

    @abstractmethod
    def first_scale(self, weight: Tensor) -> Tensor:
        """The first α of a weight (O, n), float64."""

    @abstractmethod
    def symbols(self, relative: Tensor) -> Tensor:
        """Nearest symbols, float (O, n), of values in units of α."""

    def decided(self, weight: Tensor, scale: Tensor, shift: float = 0.0) -> Tensor:
        """Symbols, float (O, n), of a weight (O, n) at α; more are zero with a larger `shift`."""
        return self.symbols(weight / scale)

    def values(self, original: Tensor) -> Tensor:
        """The first parameter as a weight (O, n)."""
        return self.matrix(original).float() * self.unit

    def scale(self, a: Tensor) -> Tensor:
        """α, (), one that the file can write, with the gradient of base · e^a."""
        wanted = self.base * a.exp()
        return through(self.scales[self._index(wanted)], wanted)

    def code(self, shift: float, *originals: Tensor) -> CodedTensor:
        """Symbols times α. Where `shift` changes the symbols, α is the best for those."""
        symbols, scale = self._decided(shift, *originals)
        qp, first, second = (int(i) for i in self.codes[int(self._index(scale))])
        entry = replace(self.tensor.entry, qp=qp, recon_offsets=(first, second))
        return replace(self.tensor, entry=entry, symbols=integers(symbols))

    def settle(self, shift: float, *originals: Tensor) -> None:
        """Symbols stay, α goes on learning."""
        with torch.no_grad():
            self.fixed, scale = self._decided(shift, *originals)
            if shift:
                originals[1].copy_((scale / self.base).log())

    def refresh(self, *originals: Tensor) -> None:
        """α becomes the least-squares one of the symbols that it gives, every so many steps."""
        if self.owner.step % REFRESH == 0 and self.fixed is None:
            with torch.no_grad():
                weight = self.values(originals[0])
                scale = self.scale(originals[1])
                originals[1].copy_((least_squares(weight, self.decided(weight, scale), scale) / self.base).log())

    def reduced(self, weight: Tensor, shift: float) -> Tensor:
        """Settled symbols (O, n), of which a `shift` above 0 makes some zero: none where the depth is given."""
        assert self.fixed is not None
        return self.fixed

    def _decided(self, shift: float, *originals: Tensor) -> tuple[Tensor, Tensor]:
        """Symbols (O, n) and α of the file."""
        weight, scale = self.values(originals[0].detach()), self.scale(originals[1].detach())
        if self.fixed is not None:
            return self.reduced(weight, shift), scale
        symbols = self.decided(weight, scale, shift)
        if shift and not torch.equal(symbols, self.decided(weight, scale)):
            scale = least_squares(weight, symbols, scale)
        return symbols, scale

    def _index(self, scale: Tensor) -> Tensor:
        return torch.bucketize(scale.detach(), self.borders)


def least_squares(weight: Tensor, symbols: Tensor, scale: Tensor) -> Tensor:
    """The α, (), with the least Σ (w − α·k)² for symbols k; where all are zero, max |w|, so that not all are at the next; at least
    a thousandth of `scale`."""
    power = symbols.square().sum()
    found = (weight * symbols).sum() / power.clamp(min=1)
    return torch.where(power > 0, found, weight.abs().max()).clamp(min=scale * 1e-3)


def best_scale(weight: Tensor, symbols: Callable[[Tensor], Tensor], largest: int) -> Tensor:
    """The α, (), of least squared error for a weight, float64 (O, n), with such symbols: the best of those tried, refined."""
    top = 2 * weight.abs().max().clamp(min=1e-30) / largest
    tried = [top * 2.0 ** (-i / 8) for i in range(TRIED)]
    best: Tensor = min(tried, key=lambda s: float((weight - s * symbols(weight / s)).square().sum()))
    for _ in range(4):
        best = least_squares(weight, symbols(weight / best), best)
    return best


def writable(step: tuple[int, int], qp: int, largest: int) -> tuple[FloatArray, IntArray]:
    """All α near a step index with which magnitudes up to `largest` are k·α in the file: float64 (N,), ascending; and their step
    indices and offsets, int32 (N, 3)."""
    reach = {1: 31, 2: 15}.get(largest, 0)
    found = [
        (qp + quarter, d, 2 * d if largest == 2 else 0)
        for quarter in range(-REACH, REACH + 1)
        if abs(qp + quarter) <= MAX_QP
        for d in range(-reach, reach + 1)
    ]
    codes = np.array(found, np.int32)
    values = steps(step, codes[:, 0].astype(np.int64)) * (1 - codes[:, 1] / 64)
    order = np.argsort(values, kind="stable")
    return values[order], codes[order]


def _spread(tensor: CodedTensor, sizes: FloatArray) -> float:
    """What one step of all coefficients is in the weight, root mean square."""
    layout, entry = Layout.of(tensor.entry), tensor.entry
    basis = tensor.basis if tensor.basis is not None else dct_basis(entry.shape[2:])
    squares = torch.from_numpy(np.broadcast_to(sizes**2, (entry.rows, entry.columns)).copy())
    spread = from_bands(layout, torch.from_numpy(np.asarray(basis, np.float64) ** 2) @ coded_bands(layout, squares))
    return float(spread.mean().sqrt()) or float(sizes.mean())
