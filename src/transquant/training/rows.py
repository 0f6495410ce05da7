"""Weights whose rows are fixed some at a time, through error feedback and trellis; rows that are not yet fixed are float.

    parameter, in steps ─┬─ rows that are free ─ × step ───────────────────────┬─ weight of the layer
                         └─ rows to fix ─ RowCoder ─ symbols ─ decoded values ─┘

Gradients of free rows are exact, where one through a quantizer is a guess. They pay for the bits they will take.
"""

from __future__ import annotations

from dataclasses import replace
from math import exp, log

import numpy as np
import torch
from torch import Tensor

from transquant.errors import InputError
from transquant.grid import MAX_EXPONENT
from transquant.records import CodedTensor, FloatArray, IntArray
from transquant.row_coding import CodedRows, RowCoder
from transquant.training.code_length import CodeLengths
from transquant.training.soft import SoftWeight, integers
from transquant.weights import dequantized

STEEP = 2.0  # e-folds of a bit's price for each unit of a shift above zero, and twice as many below
DAMPING = 0.2  # of sensitivity, relative to its mean
LATE = 0.1  # of the rows: those fixed last, which a shift of up to a half quantizes again; one of 1 quantizes all again
GOLDEN = 0.6180339887498949  # multiples of it fill the unit interval evenly
BELOW = 0.45  # a shift below zero goes as far as that, and counts as 1 there


class RowsWeight(SoftWeight):
    """Parameters: the weight in steps. `log_price`: of a bit, in e-folds from its price at the template's c, for rows that are
    fixed from now on. `coder`: None where nothing is known of the weight's inputs and outputs; a weight that calibration never
    reached keeps the template's symbols."""

    done: Tensor  # bool (O,), rows that are fixed
    exponents: Tensor  # int32 (O,), half octaves of rows' steps
    origin: Tensor  # (O, n), the float network's weight in steps
    symbols: Tensor  # int32 (O, n), of fixed rows
    values: Tensor  # (O, n), of fixed rows as the file decodes to them

    def __init__(self, tensor: CodedTensor, step: tuple[int, int], state_bits: int = 4) -> None:
        if tensor.row_exponents is None:
            groups = f"r{tensor.entry.groups}"
            own = np.zeros(len(tensor.symbols), np.int32)
            tensor = replace(tensor, entry=replace(tensor.entry, groups=groups), row_exponents=own)  # type: ignore[arg-type]
        template = tensor
        if tensor.entry.coding == "t":  # its own symbols are but a first guess of code lengths
            tensor = replace(tensor, entry=replace(tensor.entry, state_bits=state_bits))
        assert tensor.row_exponents is not None
        super().__init__(tensor, step)
        self.template = template
        self.step, self.log_price = step, 0.0
        self.coder: RowCoder | None = None
        self.counts: FloatArray | None = None  # what the trellis knows of code lengths
        self.register_buffer("done", torch.zeros(len(tensor.symbols), dtype=torch.bool))
        self.register_buffer("origin", torch.zeros(tensor.symbols.shape))
        self.register_buffer("exponents", torch.from_numpy(np.array(tensor.row_exponents)))
        self.register_buffer("symbols", torch.from_numpy(np.array(tensor.symbols)))
        self.register_buffer("values", torch.from_numpy(dequantized(self.template, step)).float())

    def give(self, coder: RowCoder | None) -> None:
        """How rows are quantized; None: they are the template's."""
        self.coder = coder
        if coder is None:
            self.tensor, self.done = self.template, torch.ones_like(self.done)
        else:
            coder.tensor = self.tensor  # of other states, and with an exponent a row

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The float weight, in steps."""
        self.origin = self.matrix(weight.detach().float()) / self.unit
        return self.origin.reshape(self.shape).to(weight.dtype)

    def forward(self, *originals: Tensor) -> Tensor:
        """Fixed rows as the file has them, all others as they are."""
        free = self.matrix(originals[0]) * self.unit
        return torch.where(self.done[:, None], self.values.to(free), free).reshape(self.shape).to(originals[0].dtype)

    def bits(self, lengths: CodeLengths, *originals: Tensor) -> Tensor:
        """Of all rows; those that are fixed have no gradient."""
        size = torch.where(self.done[:, None], self.symbols.abs().to(originals[0]), self.matrix(originals[0]).abs())
        return lengths.bits(self.name, size)

    def loss(self, progress: float, *originals: Tensor) -> Tensor | None:
        """What it costs free rows to have moved: as if the network were a little sensitive in all directions, as it may be where no
        sample has been. Adam's steps are as long where gradients are but noise, and would lead away there."""
        if self.coder is None or bool(self.done.all()):
            return None
        far = torch.where(self.done[:, None], 0.0, self.matrix(originals[0]) - self.origin)
        return DAMPING * self.price_of_step() * far.square().sum()

    def price_of_step(self) -> float:
        """What an error of a step costs, in units of the metric: c²."""
        return float(6 / log(2) * self.owner.price.first)

    def code(self, shift: float, *originals: Tensor) -> CodedTensor:
        """Free rows are quantized as they are now. With a `shift` a bit costs `exp(STEEP · shift)` times as much, and the rows that
        were fixed last are quantized again, from where they were; with a large one all are: others have made up for what they lost,
        so that is the last resort."""
        far = abs(shift) if shift > 0 else -shift / BELOW
        log_price = STEEP * far if shift > 0 else -2 * STEEP * far
        rows = _places(~self.done)
        if shift:
            order = self.order()
            share = LATE + (1 - LATE) * min(max(2 * far - 1, 0.0), 1.0)
            again = order[: int(self.done.sum())][-max(round(share * len(order)), 1) :]
            rows = np.union1d(rows, again).astype(np.int32)
        symbols, exponents = self.symbols.cpu().numpy(), self.exponents.cpu().numpy()
        if len(rows) and not (self.coder is None and bool(self.done.all())):
            exponents = self._exponents(rows, log_price)
            symbols = symbols.copy()
            symbols[rows] = self._coded(rows, log_price, exponents, originals[0]).symbols
        integers(originals[0])  # no number may come into a file
        return replace(self.tensor, symbols=symbols, row_exponents=exponents)

    def hold(self, share: float, *originals: Tensor) -> None:
        """So many of the rows are fixed, at least, in an order that was drawn once."""
        rows = np.sort(self.order()[int(self.done.sum()) : round(share * len(self.done))])
        if len(rows):
            self._fix(rows, originals[0])

    def settle(self, shift: float, *originals: Tensor) -> None:
        """All rows are fixed as `code(shift)` has them."""
        tensor = self.code(shift, *originals)
        self.symbols = torch.from_numpy(tensor.symbols).to(self.symbols)
        self.exponents = torch.from_numpy(tensor.row_exponents).to(self.exponents)
        self.values = torch.from_numpy(dequantized(tensor, self.step)).to(self.values)
        self.done = torch.ones_like(self.done)

    def order(self) -> IntArray:
        """Rows in the order in which they are fixed."""
        return torch.randperm(len(self.done), generator=self.generator("rows")).numpy().astype(np.int32)

    def part(self) -> CodedTensor | None:
        """The rows that are fixed, None where there are none."""
        rows = _places(self.done)
        if not len(rows):
            return None
        entry = replace(self.tensor.entry, shape=(len(rows), *self.tensor.entry.shape[1:]))
        symbols, exponents = self.symbols.cpu().numpy()[rows], self.exponents.cpu().numpy()[rows]
        return replace(self.tensor, entry=entry, symbols=symbols, row_exponents=exponents)

    def expected(self) -> IntArray:
        """Symbols int32 (O, n) of the fixed rows, of the others those of the template."""
        return np.where(self.done.cpu().numpy()[:, None], self.symbols.cpu().numpy(), self.tensor.symbols)

    def _fix(self, rows: IntArray, original: Tensor) -> None:
        exponents = self._exponents(rows, 0.0)
        coded = self._coded(rows, 0.0, exponents, original)
        self.counts, where = coded.counts, torch.from_numpy(rows).long().to(self.done.device)
        # new tensors: a forward pass may still need the old ones
        self.exponents = torch.from_numpy(exponents).to(self.exponents)
        self.symbols = self.symbols.index_copy(0, where, torch.from_numpy(coded.symbols).to(self.symbols))
        self.values = self.values.index_copy(0, where, torch.from_numpy(coded.values).to(self.values))
        self.done = self.done.index_fill(0, where, True)

    def _exponents(self, rows: IntArray, log_price: float) -> IntArray:
        """Of all rows: those of `rows` have steps whose square goes with the price of a bit, as at the slope of the rate–distortion
        function. Between two half octaves some rows have one and some the other. Rows that are fixed begin where they are."""
        exponents = self.exponents.cpu().numpy().copy()
        wanted = log_price + np.where(self.done.cpu().numpy()[rows], 0.0, self.log_price)
        moved = np.floor(wanted / log(2) + GOLDEN * (rows + 1) % 1)
        exponents[rows] = np.clip(exponents[rows] + moved, -MAX_EXPONENT, MAX_EXPONENT)
        return exponents

    def _coded(self, rows: IntArray, log_price: float, exponents: IntArray, original: Tensor) -> CodedRows:
        if self.coder is None:
            raise InputError(
                "method 'progressive' needs calibration samples: give them to prepare, beside the start if there is one"
            )
        targets = (self.matrix(original.detach()).float() * self.unit)[torch.from_numpy(rows).long()].double().cpu().numpy()
        return self.coder.code(rows, targets, exp(self.log_price + log_price), self.counts, exponents)


def _places(which: Tensor) -> IntArray:
    return np.flatnonzero(which.cpu().numpy()).astype(np.int32)
