"""The same samples in the float network and in one with other weights: what the inputs of a layer have become.

    x (float), x' (others)   →   E[x x'ᵀ], E[x' x'ᵀ], E[x], E[x']

A weight W that is yet to be quantized does best as T = W E[x x'ᵀ] E[x' x'ᵀ]⁻¹, which makes of x' what W makes of x: it takes
back what the layers before have done wrong. (Luo et al., ThiNet, arXiv 1707.06342, refit pruned layers so; Li et al., GPTAQ,
arXiv 2504.02692, weights under feedback.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transquant.memory import give_back
from transquant.records import FloatArray, Plan, WeightSpec
from transquant.stats.forwards import Enough, Forward, Run, Twins
from transquant.stats.live import Live
from transquant.stats.moments import TOKENS, Moments, Shape, moment_shapes
from transquant.stats.recorders import attach
from transquant.workers import Workers

BY_ROW = ("conv1d_hf", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")  # kinds whose rows meet the inputs
MAX_SIDE = 4608  # of the inputs of a layer that is refitted; above it systems of equations take minutes
MOST_LIVE = 3 << 29  # bytes of activations that all forwards may hold, where nothing else is said


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


class _Inputs(Moments):
    """In the place of moments: keeps the inputs themselves, of one call of a module, until they came `wanted` times."""

    def __init__(self, spec: WeightSpec, shape: Shape, offset: int, wanted: int) -> None:
        super().__init__(spec, shape)
        self.offset, self.wanted = offset, wanted
        self.calls: list[tuple[int | None, Tensor]] = []
        self.by_row = False

    def add_columns(self, x: Tensor, group: int | None = None, mean: bool = True) -> None:
        """x (g, n, P), of one group (1, n, P)."""
        self.calls.append((group, x.detach().float().cpu()))
        if len(self.calls) == self.wanted:
            raise Enough

    def add_rows(self, y: Tensor, group: int | None = None) -> None:
        """As columns: in a forward without gradients these are inputs."""
        self.by_row = True
        self.add_columns(y, group)


class _Noted(Moments):
    """In the place of moments: counts how often inputs came, in one table for all weights."""

    def __init__(self, spec: WeightSpec, shape: Shape, seen: Counter[str]) -> None:
        super().__init__(spec, shape)
        self.seen = seen

    def add_columns(self, x: Tensor, group: int | None = None, mean: bool = True) -> None:
        """Any."""
        self.seen[self.spec.name] += 1

    def add_rows(self, y: Tensor, group: int | None = None) -> None:
        """Any."""
        self.seen[self.spec.name] += 1

    def add_row_squares(self, squares: Tensor) -> None:
        """Tokens."""
        self.seen[self.spec.name] += 1


Visit = Callable[[str, Pairs | None], Mapping[str, Tensor]]


class PairedNetworks:
    """A float network and one whose weights become others on the way, side by side on the same micro-batches."""

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], plan: Plan, run: Run, pool: Workers, most_live: int | None = None
    ) -> None:
        self.run, self.pool = run, pool
        specs = [s for s in plan.specs if isinstance(s, WeightSpec) and s.module is not None]
        self._specs = {s.name: s for s in specs}
        self._shapes = moment_shapes(specs, 1 << 30, 1 << 62)
        self._chunk = pool.processes.size * max(pool.processes.exchange(pool.count))
        self._float, self._other = Twins(model), Twins(model)
        self._weights, self._parts, self._once, live = self._execution_order(batches[0])
        self.order = tuple(name for names in self._weights.values() for name in names)
        # each micro-batch waits in two networks, and memory that it needed on its way is not always given back; the rule knows
        # nothing of the machine, so files are the same everywhere
        self.batches = list(batches[: max(1, (most_live or MOST_LIVE) // max(2 * live, 1))])

    def walk(self, visit: Visit) -> None:
        """One forward of both networks on all micro-batches, side by side.

        Before a module with weights all micro-batches wait, and `visit(name, pairs)` is called for one of its weights after the
        other. It returns tensors by key that the other network has from there on; keys that are never returned stay as they are.
        `pairs` is None where a weight is not to be refitted: where nothing has been changed yet or numbers are not finite, for
        tokens, for weights of several layers or with a length of their own, for modules that are called more than once (what they
        will see later depends on the weight itself), and above MAX_SIDE inputs. Weights that are never reached are not visited.

        A micro-batch that does not come to a module, or comes to it late, is not waited for: of the modules where forwards
        stand, the first in the order of the first micro-batch is next, with those that stand there."""
        self._other.reset()
        share = range(self.pool.processes.rank, len(self.batches), self.pool.processes.size)
        wanted = set(self._weights)
        kinds = {path: self._specs[names[0]].kind for path, names in self._weights.items()}

        def forward(twins: Twins, index: int) -> Forward:
            return Forward(twins.one(), self.batches[index], self.run, kinds, wanted)

        lanes = {k: (forward(self._float, k), forward(self._other, k)) for k in share}
        every = [f for lane in lanes.values() for f in lane]
        try:
            changed = False
            self.pool.own(Forward.advance, every)
            while wanted and (path := self._next(every)) is not None:
                for name in self._weights[path]:
                    pairs = self._measure(name, path, lanes) if changed and self._may_be_refitted(name, path) else None
                    self._other.load(visit(name, pairs))
                    changed = True
                wanted.discard(path)
                self.pool.own(Forward.advance, [f for f in every if f.place == path] if wanted else [])
        finally:
            for one in every:
                one.close()
            give_back()

    def _next(self, forwards: Sequence[Forward]) -> str | None:
        """Where the weights are next: the first of all places where forwards of any process stand."""
        paths = list(self._weights)
        own = min((paths.index(f.place) for f in forwards if f.place is not None), default=len(paths))
        first = min(self.pool.processes.exchange(own))
        return paths[first] if first < len(paths) else None

    def _may_be_refitted(self, name: str, path: str) -> bool:
        """Tokens are what they are, what several layers share cannot be fitted for one, and a norm would undo it."""
        shape, spec = self._shapes[name], self._specs[name]
        if path not in self._once or spec.kind in TOKENS or spec.tied or spec.rescaled:
            return False
        return (shape.rows if spec.kind in BY_ROW else shape.columns) <= MAX_SIDE

    def _measure(self, name: str, path: str, lanes: Mapping[int, tuple[Forward, Forward]]) -> Pairs | None:
        """Sums over all micro-batches that stand before the module in both networks and see the same positions there."""
        spec, shape = self._specs[name], self._shapes[name]

        def partial(index: int) -> Pairs | None:
            seen = []
            for one in lanes[index]:
                if one.place != path:
                    return None
                sink = _Inputs(spec, shape, index, self._parts[name])
                one.record({spec.attribute: sink})
                seen.append(sink)
            a, b = seen
            same = [(g, x.shape) for g, x in a.calls] == [(g, x.shape) for g, x in b.calls]
            return _sums(shape.groups, a, b) if a.calls and same else None

        sums: Pairs | None = None
        for first in range(0, len(self.batches), self._chunk):  # not all at once: partial sums are large
            for part in self.pool.map(partial, range(first, min(first + self._chunk, len(self.batches)))):
                if sums is None or part is None:
                    sums = sums or part
                else:
                    sums.add(part)
        return sums if sums is not None and sums.finite() else None

    def _execution_order(self, batch: Any) -> tuple[dict[str, list[str]], Counter[str], set[str], int]:
        """From one forward: weights by path of their module, in the order of their first use; in how many parts a weight's inputs
        come (queries, keys, values); the modules that are called once; the most bytes of activations that it holds. Weights
        that no recorder sees are left out."""
        seen: Counter[str] = Counter()
        calls: Counter[str] = Counter()
        model = self._float.one()
        live = Live(model)
        modules = dict(model.named_modules(remove_duplicate=False))
        sinks: dict[tuple[str, str], dict[str, Moments]] = {}

        def came_to(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any) -> None:
                calls[path] += 1

            return hook

        for name, spec in self._specs.items():
            sinks.setdefault((spec.kind, spec.module or ""), {})[spec.attribute] = _Noted(spec, self._shapes[name], seen)
        for (kind, path), mine in sinks.items():
            attach(kind, modules[path], mine)
            modules[path].register_forward_pre_hook(came_to(path))
        with torch.no_grad():
            self.run(model, batch)
        weights: dict[str, list[str]] = {}
        for name in seen:
            weights.setdefault(self._specs[name].module or "", []).append(name)
        return weights, seen, {path for path in weights if calls[path] == 1}, live.most


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
