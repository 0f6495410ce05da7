"""One step of training, shared between micro-batches and processes, whose number changes nothing but the order of sums.

    batch ─ micro-batches ─ dealt out to processes ─ gradients, buffers, numbers ─ summed up: the same in all processes

Micro-batches start from the same buffers (running statistics of BatchNorm), and the mean of what they leave stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transquant.errors import InputError
from transquant.processes import Processes
from transquant.training.soft import SoftWeight


@dataclass(frozen=True, slots=True)
class Share:
    """Samples `first` up to `last` of a batch, micro-batch `number`; `weight`: their share of the batch."""

    number: int
    first: int
    last: int
    weight: float


def check(micro_batches: int, job: Processes) -> None:
    """Raises InputError where processes would have different numbers of micro-batches."""
    if micro_batches % job.size:
        raise InputError(f"micro_batches is {micro_batches}, allowed are multiples of {job.size}, the number of processes")


def shares(samples: int, micro_batches: int, job: Processes) -> list[Share]:
    """What this process does of a batch. Where there are too few samples for all, one repeats the first with no weight, so that
    its buffers go on as those of the others."""
    count = min(samples, micro_batches)
    cuts = [samples * k // count for k in range(count + 1)]
    own = range(micro_batches * job.rank // job.size, micro_batches * (job.rank + 1) // job.size)
    found = [Share(k, cuts[k], cuts[k + 1], (cuts[k + 1] - cuts[k]) / samples) for k in own if k < count]
    return found or [Share(0, cuts[0], cuts[1], 0.0)]


class Buffers:
    """The floating buffers of a model that forward passes change, over the micro-batches of a step."""

    def __init__(self, model: nn.Module) -> None:
        modules = (m for m in model.modules() if not isinstance(m, SoftWeight))
        self._places = [(m, key) for m in modules for key, b in m._buffers.items() if b is not None]
        self._before: list[Tensor] = []
        self._sums: list[Tensor] = []

    def begin(self) -> None:
        """Before the first micro-batch of a step."""
        self._before = [b.clone() for b in self._now()]
        self._sums = [torch.zeros_like(b) for b in self._before if b.is_floating_point()]

    def add(self, weight: float, last: bool) -> None:
        """After a micro-batch: what it has left counts with its weight; the next starts as this one did."""
        pairs = list(zip(self._now(), self._before, strict=True))
        changes = (torch.where(b == before, 0, b - before) for b, before in pairs if b.is_floating_point())
        for total, change in zip(self._sums, changes, strict=True):
            total.add_(change, alpha=weight)
        if not last:
            for buffer, before in pairs:
                buffer.copy_(before)

    def end(self, sums: Sequence[Tensor]) -> None:
        """After the last: the means stay; `sums` are those of all processes."""
        pairs = [(b, before) for b, before in zip(self._now(), self._before, strict=True) if b.is_floating_point()]
        for (buffer, before), total in zip(pairs, sums, strict=True):
            buffer.copy_(before + total)

    @property
    def sums(self) -> list[Tensor]:
        """Of this process: weighted sums of what micro-batches have changed."""
        return self._sums

    def _now(self) -> list[Tensor]:
        return [b for m, key in self._places if (b := m._buffers[key]) is not None]


def summed(
    parameters: Sequence[nn.Parameter], sums: Sequence[Tensor], numbers: Sequence[float], job: Processes
) -> tuple[list[Tensor], list[float]]:
    """Gradients, added up over processes in place, in one message; and the sums of the given tensors and numbers. A parameter
    without a gradient in any process has none afterwards."""
    if job.size == 1:
        return list(sums), list(numbers)
    wide = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
    device = parameters[0].device
    has = torch.tensor([float(p.grad is not None) for p in parameters], dtype=wide, device=device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    tail = torch.tensor(list(numbers), dtype=wide, device=device)
    pieces = [*gradients, *sums, has, tail]
    flat = job.sum(torch.cat([piece.detach().reshape(-1).to(device, wide) for piece in pieces]))
    parts = [
        part.reshape(piece.shape).to(piece)
        for part, piece in zip(torch.split(flat, [p.numel() for p in pieces]), pieces, strict=True)
    ]
    for parameter, part, found in zip(parameters, parts, parts[-2].tolist(), strict=False):
        parameter.grad = part if found else None
    return parts[len(gradients) : -2], parts[-1].tolist()
