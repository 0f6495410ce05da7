"""DiffQ (Défossez, Adi, Synnaeve; arXiv 2104.09987): groups of weights learn how many bits they take, by ordinary gradients.

    weight ─ + step of its group · noise ─ layer          bits b of a group ─ step = range · 2^−b
                                                         price · Σ group · b ─ loss

Noise stands for what rounding will do, so the gradient reaches a group's bits without straight-through rounding. Where we differ:
bits go down to 0; the step is finite there (published: range / (2^b − 1)); the range is a robust one (published: max − min); steps
are on the file's grid and symbols are entropy-coded, so the size is that of the file, and the price of a bit follows it.
"""

from __future__ import annotations

from dataclasses import replace
from math import e, log2, pi

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from transquant.bitstream import tensor_values
from transquant.grid import MAX_EXPONENT, nearest_qp, steps
from transquant.records import CodedTensor, FloatArray, IntArray
from transquant.training.code_length import CodeLengths
from transquant.training.rounding import through
from transquant.training.soft import SoftWeight, integers, step_sizes
from transquant.transforms.exact import dct_basis
from transquant.transforms.layout import Layout

GROUPS = 1, 4, 8, 16
NOISES = "gaussian", "uniform"
MOST = 15.0  # bits
RANGE = (2 * pi * e) ** 0.5  # of standard deviations: a normal law in steps of range · 2^−b has an entropy of b bits, nearly
SMALLEST = 1 / 32  # step, of a weight's typical group
LAG = 0.75  # half octaves by which a step may be off to be its left neighbour's
LARGEST = (1 << 20) - 1  # symbol
LOGIT_RATE = 0.003  # of Adam; published 0.001, of trainings many times as long


class NoisyWeight(SoftWeight):
    """Parameters: weights in steps, in the weight's shape; and logits (O, spans), of bits b = 15 · sigmoid(logit) of each group.

    `group`: consecutive weights of a row that share bits; `noise`: "gaussian", of half a step's deviation, or "uniform", within
    half a step; `begin`: bits of all groups at first, None for the steps of the template; `rounded`: the share of the training
    from which on what rounding does takes the place of noise (Esser et al., arXiv 1902.08153, have that gradient of a step)."""

    exponents: Tensor | None  # (O, spans) half octaves, once they are settled
    extent: Tensor  # (), range in steps
    widths: Tensor  # (spans,), columns of each
    base: Tensor  # int32 (O, spans), exponents of the template
    ladder: Tensor  # float32, steps by exponent, from −MAX_EXPONENT on

    def __init__(
        self, tensor: CodedTensor, step: tuple[int, int], group: int, noise: str, begin: float | None, rounded: float
    ) -> None:
        own = in_spans(tensor, step, group)
        super().__init__(own, step)
        self.noise, self.begin, self.rounded, self.rates = noise, begin, rounded, (None, LOGIT_RATE)
        widths = np.minimum(group, own.entry.columns - group * np.arange(own.entry.spans))
        ladder = steps(step, own.entry.qp + 2 * np.arange(-MAX_EXPONENT, MAX_EXPONENT + 1)[None])[0]
        assert own.span_exponents is not None
        self.register_buffer("exponents", None)
        self.register_buffer("extent", torch.ones(()))
        self.register_buffer("base", torch.from_numpy(own.span_exponents), persistent=False)
        self.register_buffer("widths", torch.from_numpy(widths).float(), persistent=False)
        self.register_buffer("ladder", torch.from_numpy(ladder).float(), persistent=False)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The float weight in steps, and the logits to begin with."""
        scaled = self.matrix(weight.detach().float()) / self.unit
        padded = functional.pad(scaled.square(), (0, self._padding))
        energies = padded.reshape(len(scaled), -1, self.tensor.entry.span).sum(2) / self.widths
        typical = float(energies.median().sqrt()) if energies.numel() else 1.0  # one outlier moves one group's
        self.extent.fill_(RANGE * max(typical, SMALLEST))
        bits = log2(float(self.extent)) if self.begin is None else self.begin
        share = min(max(bits, 0.1), MOST - 0.1) / MOST
        logits = torch.full(energies.shape, float(np.log(share / (1 - share))), device=weight.device)
        return scaled.reshape(self.shape).to(weight.dtype), logits.to(weight.dtype)

    def forward(self, *originals: Tensor) -> Tensor:
        """With noise while it trains; as in the file in eval mode and once settled."""
        scaled = self.matrix(originals[0])
        if self.fixed is not None and self.exponents is not None:
            decoded = self.fixed * self._sizes(self.exponents)
        elif self.training and "owner" in self.__dict__:
            size = self._spread(self.steps_of(originals[1]))
            decoded = (scaled + size * self._noise(scaled.detach(), size.detach(), originals[1].detach())) * self.unit
        else:
            decoded = through(self._decoded(scaled.detach(), originals[1].detach()), scaled * self.unit)
        return decoded.reshape(self.shape).to(originals[0].dtype)

    def steps_of(self, logits: Tensor) -> Tensor:
        """Steps (O, spans) of groups, in steps of the template."""
        return self.extent * torch.exp2(-MOST * torch.sigmoid(logits))

    def bits(self, lengths: CodeLengths, *originals: Tensor) -> Tensor:
        """As published, Σ group · b; what the entropy coder makes of it is left to the price."""
        return (MOST * torch.sigmoid(originals[1]) * self.widths).sum()

    def code(self, shift: float, *originals: Tensor) -> CodedTensor:
        """`shift`: octaves by which steps are wider; once they are settled, by how many steps the dead zone is."""
        scaled = self.matrix(originals[0].detach())
        if self.fixed is None or self.exponents is None:
            exponents, symbols = self._rounded(scaled, originals[1].detach(), shift)
        else:
            exponents, symbols = self.exponents, self.fixed
            if shift > 0:
                small = (scaled * self.unit).abs() < (0.5 + shift) * self._sizes(exponents)
                symbols = torch.where(small, torch.zeros_like(symbols), symbols)
        return replace(self.tensor, symbols=integers(symbols), span_exponents=integers(exponents))

    def settle(self, shift: float, *originals: Tensor) -> None:
        """Symbols and steps stay."""
        coded = self.code(shift, *originals)
        assert coded.span_exponents is not None
        self.fixed = torch.from_numpy(coded.symbols).float().to(originals[0].device)
        self.exponents = torch.from_numpy(coded.span_exponents).to(originals[0].device)

    def _noise(self, scaled: Tensor, size: Tensor, logits: Tensor) -> Tensor:
        """What is added, (O, n) in steps: noise, or what rounding does from the share `rounded` of the training on."""
        if self.owner.progress >= self.rounded:
            return (self._decoded(scaled, logits) / self.unit - scaled) / size
        if self.noise == "gaussian":
            return torch.randn(scaled.shape, generator=self.generator()).to(scaled) / 2
        return torch.rand(scaled.shape, generator=self.generator()).to(scaled) - 0.5

    def _decoded(self, scaled: Tensor, logits: Tensor) -> Tensor:
        exponents, symbols = self._rounded(scaled, logits, 0.0)
        return symbols * self._sizes(exponents)

    def _rounded(self, scaled: Tensor, logits: Tensor, shift: float) -> tuple[Tensor, Tensor]:
        """Exponents int32 (O, spans) on the file's grid, and symbols, float (O, n)."""
        wanted = 2 * (self.steps_of(logits.float()).log2() + shift)
        nearest = self._sizes((self.base + wanted.round()).clamp(-MAX_EXPONENT, MAX_EXPONENT).int())
        values = scaled.float() * self.unit
        used = functional.pad((values / nearest).round().abs(), (0, self._padding))
        empty = used.reshape(len(scaled), -1, self.tensor.entry.span).amax(2) == 0
        snapped = torch.from_numpy(snap((self.base + wanted).cpu().numpy(), empty.cpu().numpy())).to(scaled.device)
        symbols = (values / self._sizes(snapped)).round().clamp(-LARGEST, LARGEST)
        return snapped, symbols.masked_fill(self._spread(empty), 0.0)

    def _spread(self, of_spans: Tensor) -> Tensor:
        """What spans have, (O, spans), as (O, n)."""
        return of_spans.repeat_interleave(self.tensor.entry.span, 1)[:, : self.tensor.entry.columns]

    def _sizes(self, exponents: Tensor) -> Tensor:
        """Steps (O, n) as the file has them."""
        return self._spread(self.ladder[exponents.long() + MAX_EXPONENT])

    @property
    def _padding(self) -> int:
        return self.tensor.entry.span * self.tensor.entry.spans - self.tensor.entry.columns


def snap(wanted: NDArray[np.float32], empty: NDArray[np.bool_]) -> IntArray:
    """Exponents int32 (O, spans) for half octaves that are wanted: the left neighbour's where that is near enough or a group is
    `empty`, for that costs next to nothing; else the nearest. Rows round up at thresholds that are spread evenly, so that a size
    moves on little by little where all steps widen together."""
    count = len(wanted)
    threshold = (np.arange(count) + 0.5) / max(count, 1)
    nearest = np.clip(np.floor(wanted + threshold[:, None]), -MAX_EXPONENT, MAX_EXPONENT).astype(np.int32)
    found = nearest.copy()
    for j in range(1, wanted.shape[1]):
        left = found[:, j - 1]
        found[:, j] = np.where(empty[:, j] | (np.abs(wanted[:, j] - left) <= LAG), left, nearest[:, j])
    return found


def in_spans(tensor: CodedTensor, step: tuple[int, int], span: int) -> CodedTensor:
    """A coded weight as one without a transform and with a step for each span of a row: the mean of what its steps are there, on a
    logarithmic scale. Its symbols are those of the decoded weight."""
    entry, sizes = tensor.entry, np.broadcast_to(step_sizes(tensor, step), tensor.symbols.shape)
    if entry.transform != "i":  # coefficients' errors, in the weight
        layout = Layout.of(entry)
        basis: FloatArray = np.asarray(dct_basis(entry.shape[2:]) if tensor.basis is None else tensor.basis, np.float64)
        sizes = np.sqrt(layout.weight(basis**2 @ layout.coded_bands(sizes**2)))
    firsts = np.arange(0, max(entry.columns, 1), span)
    one = float(steps(step, np.zeros((1, 1), np.int64))[0, 0])
    quarters = 4 * np.log2(np.maximum(sizes, 1e-30) / one)
    of_spans = np.add.reduceat(quarters, firsts, 1) / np.minimum(span, entry.columns - firsts) if sizes.size else quarters[:, :0]
    qp = nearest_qp(2.0 ** (float(np.median(of_spans)) / 4)) if of_spans.size else entry.qp
    exponents = np.clip(np.rint((of_spans - qp) / 2), -MAX_EXPONENT, MAX_EXPONENT).astype(np.int32)
    fold = entry.fold if entry.transform == "i" else 1
    own = replace(entry, transform="i", axis="", groups="s", span=span, recon_offsets=(0, 0), qp=qp, fold=fold)
    spans = CodedTensor(own, tensor.symbols, span_exponents=exponents)
    symbols = np.rint(tensor_values(tensor, step) / step_sizes(spans, step)).astype(np.int32)
    return replace(spans, symbols=symbols)
