"""The same samples in the float network and in one with other weights: what the inputs of a layer have become.

    x (float), x' (others)   →   E[x x'ᵀ], E[x' x'ᵀ], E[x], E[x']

A weight W that is yet to be quantized does best as T = W E[x x'ᵀ] E[x' x'ᵀ]⁻¹, which makes of x' what W makes of x: it takes
back what the layers before have done wrong. (Luo et al., ThiNet, arXiv 1707.06342, refit pruned layers so; Li et al., GPTAQ,
arXiv 2504.02692, weights under feedback.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transquant.records import FloatArray, Plan, WeightSpec
from transquant.stats.copies import Copies
from transquant.stats.moments import TOKENS, Moments, moment_shapes
from transquant.stats.recorders import Handle, attach
from transquant.workers import Workers

Run = Callable[[nn.Module, Any], Tensor]

BY_ROW = ("conv1d_hf", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")  # kinds whose rows meet the inputs
MAX_SIDE = 4608  # of the inputs of a layer that is refitted; above it systems of equations take minutes


@dataclass(slots=True)
class Pairs:
    """Sums over micro-batches for one weight, float64: `cross` Σ x x'ᵀ and `moment` Σ x' x'ᵀ (g, n, n), `total` Σ x and `other`
    Σ x' (g, n), `count` (g,). `by_row`: inputs meet the rows of the weight, not its columns."""

    cross: Tensor
    moment: Tensor
    total: Tensor
    other: Tensor
    count: Tensor
    by_row: bool

    def add(self, later: Pairs) -> None:
        """Add the sums of a later micro-batch."""
        for part in ("cross", "moment", "total", "other", "count"):
            getattr(self, part).add_(getattr(later, part))

    def finite(self) -> bool:
        """Whether all inputs were."""
        return bool(torch.isfinite(self.cross).all() and torch.isfinite(self.moment).all())

    def means(self) -> tuple[FloatArray, FloatArray]:
        """E[x] and E[x'], float64 (g, n)."""
        count = self.count.clamp(min=1)[:, None]
        return (self.total / count).numpy(), (self.other / count).numpy()

    def refit(self, weight: FloatArray, damping: float, centre: bool) -> FloatArray:
        """T of a weight float64 (O, n), regularised towards it: E[x' x'ᵀ] + damping · (mean diagonal) · I. `centre`: about the
        means, where something else makes up for those."""
        count = self.count.clamp(min=1)[:, None, None]
        moment, cross = self.moment / count, self.cross / count
        if centre:
            mean, other = self.total / count[:, :, 0], self.other / count[:, :, 0]
            moment = moment - other[:, :, None] * other[:, None, :]
            cross = cross - mean[:, :, None] * other[:, None, :]
        level = moment.diagonal(dim1=1, dim2=2).mean(1)
        side = moment.shape[1]
        damped = moment + (damping * level + 1e-12 * level.max() + 1e-300)[:, None, None] * torch.eye(side, dtype=torch.float64)
        blocks = torch.from_numpy(weight).reshape(len(moment), -1, weight.shape[1])
        blocks = blocks if not self.by_row else blocks.transpose(1, 2)  # z = blocks x
        change = torch.linalg.solve(damped, (blocks @ (cross - moment)).transpose(1, 2)).transpose(1, 2)
        fitted = blocks + change
        result: FloatArray = (fitted if not self.by_row else fitted.transpose(1, 2)).reshape(weight.shape).numpy()
        return result


class _Seen(BaseException):
    """Ends a forward when all that is wanted has been seen; no `except Exception` of the caller's catches it."""


class _Inputs(Moments):
    """In the place of moments: keeps the inputs themselves, of as many calls as there will be."""

    def begin(self, offset: int, wanted: list[int]) -> None:
        """Forget; `wanted[0]` counts the calls that are still to come, of all layers."""
        self.reset(offset)
        self.calls: list[tuple[int | None, Tensor]] = []
        self.by_row, self.wanted, self.stamp = False, wanted, 0

    def add_columns(self, x: Tensor, group: int | None = None, mean: bool = True) -> None:
        """x (g, n, P), of one group (1, n, P)."""
        self._keep(group, x)

    def add_rows(self, y: Tensor, group: int | None = None) -> None:
        """As columns: in a forward without gradients these are inputs."""
        self.by_row = True
        self._keep(group, y)

    def add_row_squares(self, squares: Tensor) -> None:
        """Tokens: only that they came."""
        self._keep(None, torch.zeros(0, 0, 0))

    def _keep(self, group: int | None, x: Tensor) -> None:
        self.stamp = self.stamp or self.wanted[0]
        self.calls.append((group, x.detach().float().cpu()))
        self.wanted[0] -= 1
        if self.wanted[0] == 0:
            raise _Seen


class PairedNetworks:
    """Copies of a float network, in pairs, of which one takes other weights."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], plan: Plan, run: Run, pool: Workers) -> None:
        self.batches, self.run, self.pool = list(batches), run, pool
        self._count = min(pool.count, len(self.batches))
        self._float, self._other = Copies(model, self._count), Copies(model, self._count)
        specs = [s for s in plan.specs if isinstance(s, WeightSpec) and s.module is not None]
        self._specs = {s.name: s for s in specs}
        self._shapes = moment_shapes(specs, 1 << 30, 1 << 62)
        self.order, self._calls = self._execution_order()

    def measure(self, names: Sequence[str], state: Mapping[str, Tensor]) -> dict[str, Pairs]:
        """Sums over all samples for some weights, in the float network and in one with `state` (keys that are left out stay
        as they are). Left out are layers that are never reached, or see not the same positions in both, or numbers that are not
        finite, and weights of several layers or with a length of their own."""
        self._other.load(state)
        names = [n for n in names if self._calls.get(n) and 0 < self._side(n) <= MAX_SIDE]
        sums: dict[str, Pairs] = {}
        if not names:
            return sums
        some = self._count * self.pool.processes.size
        for first in range(0, len(self.batches), some):  # not all at once: partial sums are large
            for part in self.pool.map(lambda k: self._partial(k, names), range(first, min(first + some, len(self.batches)))):
                for name, pairs in part.items():
                    if name in sums:
                        sums[name].add(pairs)
                    else:
                        sums[name] = pairs
        return {name: pairs for name, pairs in sums.items() if pairs.finite()}

    def _side(self, name: str) -> int:
        """Inputs of a group of the weight; 0 where it is not to be refitted: tokens are what they are, what several layers share
        cannot be fitted for one, and a norm would undo it."""
        shape, spec = self._shapes[name], self._specs[name]
        if spec.kind in TOKENS or spec.tied or spec.rescaled:
            return 0
        return shape.rows if spec.kind in BY_ROW else shape.columns

    def _partial(self, index: int, names: Sequence[str]) -> dict[str, Pairs]:
        wanted = sum(self._calls[n] for n in names)
        with self._float.one() as one, self._other.one() as other:
            seen, changed = (self._inputs(model, index, self.batches[index], names, wanted) for model in (one, other))
        parts = {}
        for name in names:
            a, b = seen[name], changed[name]
            if not a.calls or [(g, x.shape) for g, x in a.calls] != [(g, x.shape) for g, x in b.calls]:
                continue
            parts[name] = _sums(self._shapes[name].groups, a, b)
        return parts

    def _inputs(self, model: nn.Module, index: int, batch: Any, names: Sequence[str], wanted: int) -> dict[str, _Inputs]:
        """What meets these weights in one forward, which ends after so many calls."""
        left = [wanted]
        sinks = {n: _Inputs(self._specs[n], self._shapes[n]) for n in names}
        by_module: dict[tuple[str, str], dict[str, Moments]] = {}
        for name, sink in sinks.items():
            sink.begin(index, left)
            spec = self._specs[name]
            by_module.setdefault((spec.kind, spec.module or ""), {})[spec.attribute] = sink
        modules = dict(model.named_modules(remove_duplicate=False))
        handles: list[Handle] = []
        try:
            for (kind, path), mine in by_module.items():
                handles += attach(kind, modules[path], mine)
            with torch.no_grad():
                self.run(model, batch)
        except _Seen:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return sinks

    def _execution_order(self) -> tuple[tuple[str, ...], dict[str, int]]:
        """Weights in the order of their first use, and how often each is used; those that are seen by no recorder are left out."""
        names = list(self._specs)
        with self._float.one() as model:
            sinks = self._inputs(model, 0, self.batches[0], names, 1 << 62)
        stamps = {n: s.stamp for n, s in sinks.items() if s.calls}
        order = sorted(stamps, key=lambda n: -stamps[n])
        return tuple(order), {n: len(sinks[n].calls) for n in order}


def _sums(groups: int, a: _Inputs, b: _Inputs) -> Pairs:
    """Sums of one micro-batch from the inputs of both networks."""
    side = a.calls[0][1].shape[1]
    zeros = torch.zeros(groups, side, side, dtype=torch.float64)
    sums = Pairs(zeros, zeros.clone(), zeros[:, 0].clone(), zeros[:, 0].clone(), zeros[:, 0, 0].clone(), a.by_row)
    for (group, x), (_, y) in zip(a.calls, b.calls, strict=True):
        place = slice(None) if group is None else slice(group, group + 1)
        sums.cross[place] += (x @ y.transpose(1, 2)).double()
        sums.moment[place] += (y @ y.transpose(1, 2)).double()
        sums.total[place] += x.sum(2, dtype=torch.float64)
        sums.other[place] += y.sum(2, dtype=torch.float64)
        sums.count[place] += x.shape[2]
    return sums
