"""What each operation does with the channels of its inputs. A rule returns those of the result, or None where it cannot tell: then
all channels that went in have to stay.

    layers          new channels, read by columns of the weight       (depthwise: the same channels)
    normalisations  the same channels, with entries of vectors
    elementwise     the same channels, of all operands together
    over space      the same channels: pools, means, padding, slices
    rearranged      axes moved, flattened, side by side

To follow another operation: a line in MODULES, FUNCTIONS or METHODS, and a rule.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from transquant.pruning.links import Ids, Links


@dataclass(frozen=True, slots=True)
class Channels:
    """The channels along one axis of a tensor."""

    axis: int
    ids: Ids


@dataclass(frozen=True, slots=True)
class Step:
    """One node of the graph: what goes in, with its shape (None: no tensor) and its channels where they are known, and the
    `shape` that comes out. `layer`: the module that is called, with its path."""

    node: fx.Node
    shapes: Mapping[fx.Node, tuple[int, ...] | None]
    known: Mapping[fx.Node, Channels]
    shape: tuple[int, ...]
    links: Links
    path: str = ""
    layer: Any = None

    def argument(self, place: int, *names: str, default: Any = None) -> Any:
        """An argument by its place among all, or by one of its names."""
        if place < len(self.node.args):
            return self.node.args[place]
        return next((self.node.kwargs[n] for n in names if n in self.node.kwargs), default)

    @property
    def x(self) -> tuple[Channels, tuple[int, ...]] | None:
        """Channels and shape of the first argument, where both are known."""
        node = self.argument(0, "input", "x")
        shape = self.shapes.get(node) if isinstance(node, fx.Node) else None
        return None if shape is None or node not in self.known else (self.known[node], shape)

    def read(self, axis: int) -> Ids:
        """The channels of the first argument along an axis; such as have to stay where they are not known."""
        node = self.argument(0, "input", "x")
        channels = self.known.get(node)
        if channels is not None and channels.axis == axis:
            return channels.ids
        if channels is not None:
            self.links.fix(channels.ids)
        shape = self.shapes[node]
        return fixed(self.links, 0 if shape is None else shape[axis])

    def key(self, attribute: str) -> str:
        """State-dict key of one of the layer's tensors."""
        return f"{self.path}.{attribute}" if self.path else attribute


Rule = Callable[[Step], Channels | None]


def fixed(links: Links, count: int) -> Ids:
    """New channels that have to stay."""
    ids = links.fresh(count)
    links.fix(ids)
    return ids


# ----------------------------------------------------------------------------------------- layers


def convolution(step: Step) -> Channels | None:
    """Of any number of dimensions, plain or depthwise; other groups have to stay."""
    layer = step.layer
    axis = len(step.shape) - len(layer.kernel_size) - 1
    ids = step.read(axis)
    if layer.groups == 1:
        step.links.put(step.key("weight"), 1, ids, False)
        return _outputs(step, axis, 0)
    if layer.groups != layer.in_channels:
        step.links.fix(ids)
        return None
    return _entries(step, axis, np.repeat(ids, layer.out_channels // layer.in_channels), ("weight", "bias"))


def transposed(step: Step) -> Channels | None:
    """A transposed convolution: inputs are the weight's rows."""
    axis = len(step.shape) - len(step.layer.kernel_size) - 1
    if step.layer.groups != 1:
        return None
    step.links.put(step.key("weight"), 0, step.read(axis), False)
    return _outputs(step, axis, 1)


def linear(step: Step) -> Channels:
    """Channels are on the last axis."""
    axis = len(step.shape) - 1
    step.links.put(step.key("weight"), 1, step.read(axis), False)
    return _outputs(step, axis, 0)


def _outputs(step: Step, axis: int, rows: int) -> Channels:
    """What a layer computes: new channels, unless it was called before."""
    known = step.links.at(step.key("weight"), rows, True)
    ids = step.links.fresh(step.shape[axis]) if known is None else known
    step.links.put(step.key("weight"), rows, ids, True)
    return _entries(step, axis, ids, ("bias",))


def normalisation(step: Step) -> Channels | None:
    """A scale and a shift a channel, with statistics or without."""
    if step.x is None or all(getattr(step.layer, name, None) is None for name in ("weight", "running_mean")):
        return None
    channels, shape = step.x
    if channels.axis != 1 or len(shape) < 2:
        return None
    return _entries(step, 1, channels.ids, ("weight", "bias", "running_mean", "running_var"))


def prelu(step: Step) -> Channels | None:
    """One slope for all, or one a channel."""
    if step.layer.num_parameters == 1:
        return elementwise(step)
    if step.x is None or step.x[0].axis != 1:
        return None
    return _entries(step, 1, step.x[0].ids, ("weight",))


def _entries(step: Step, axis: int, ids: Ids, attributes: tuple[str, ...]) -> Channels:
    for attribute in attributes:
        if getattr(step.layer, attribute, None) is not None:
            step.links.put(step.key(attribute), 0, ids, True)
    return Channels(axis, ids)


# ----------------------------------------------------------------------------------------- the same channels


def elementwise(step: Step) -> Channels | None:
    """Of one operand or several, with broadcasting; channels of all that vary over them are united."""
    inputs = [(n, shape) for n in step.node.all_input_nodes if (shape := step.shapes[n]) is not None]
    places = {step.known[n].axis - len(shape) for n, shape in inputs if n in step.known}
    if len(places) != 1:
        return None
    (place,) = places
    size, full = step.shape[place], []
    for node, shape in inputs:
        if len(shape) < -place or shape[place] == 1:
            if node in step.known:  # one channel meets all: it stays, as do they
                return None
        elif node not in step.known or shape[place] != size:
            return None
        else:
            full.append(step.known[node].ids)
    for ids in full[1:]:
        step.links.unite(full[0], ids)
    return Channels(len(step.shape) + place, full[0]) if full else None


def over_space(step: Step, dimensions: int | None = None) -> Channels | None:
    """Operations on the last `dimensions` axes (None: on all behind the second), each channel by itself."""
    if step.x is None:
        return None
    channels, shape = step.x
    axis = 1 if dimensions is None else len(shape) - dimensions - 1
    same = channels.axis == axis and len(step.shape) == len(shape) > axis + (dimensions is None)
    return channels if same and step.shape[axis] == shape[axis] else None


def reduced(step: Step) -> Channels | None:
    """A mean, sum or maximum over some axes, none of them the channels'."""
    dims = step.argument(1, "dim", "axis")
    dims = [dims] if type(dims) is int else dims
    if step.x is None or not isinstance(dims, list | tuple) or not dims or not all(type(d) is int for d in dims):
        return None
    channels, shape = step.x
    gone = {d % len(shape) for d in dims}
    if channels.axis in gone:
        return None
    kept = len(step.shape) == len(shape)
    return Channels(channels.axis if kept else channels.axis - sum(d < channels.axis for d in gone), channels.ids)


def padded(step: Step) -> Channels | None:
    """Padding over space."""
    pads = step.argument(1, "pad")
    if step.x is None or not isinstance(pads, list | tuple):
        return None
    channels, shape = step.x
    k = 2 * (len(shape) - 1 - channels.axis)  # where the channels' pair is: last axes come first
    return channels if all(type(p) is int and p == 0 for p in pads[k : k + 2]) else None


def indexed(step: Step) -> Channels | None:
    """Slices and numbers over other axes than the channels'."""
    index = step.argument(1)
    if step.x is None:
        return None
    channels, shape = step.x
    index = list(index) if isinstance(index, tuple) else [index]
    if any(not (item is None or item is Ellipsis or isinstance(item, int | slice)) for item in index):
        return None
    taken = sum(item is not None and item is not Ellipsis for item in index)
    if Ellipsis not in index:
        index.append(Ellipsis)
    k = index.index(Ellipsis)
    index[k : k + 1] = [slice(None)] * (len(shape) - taken)
    before, after = 0, 0  # axes of the tensor, and of the result
    for item in index:
        if item is not None and before == channels.axis:
            return Channels(after, channels.ids) if item == slice(None) else None
        before += item is not None
        after += not isinstance(item, int)
    return None


# ----------------------------------------------------------------------------------------- rearranged


def reshaped(step: Step) -> Channels | None:
    """Views that leave the channels' axis, or merge it with axes behind it."""
    if step.x is None:
        return None
    (channels, shape), out = step.x, step.shape
    before, size, after = prod(shape[: channels.axis]), shape[channels.axis], prod(shape[channels.axis + 1 :])
    for axis, length in enumerate(out):
        if prod(out[:axis]) == before and size > 1 and length and length % size == 0:
            span = length // size
            return Channels(axis, np.repeat(channels.ids, span)) if span * prod(out[axis + 1 :]) == after else None
    return None


def permuted(step: Step) -> Channels | None:
    """Axes in another order."""
    first = step.argument(1, "dims")
    order: Any = first if isinstance(first, list | tuple) else step.node.args[1:]
    if step.x is None or not all(type(d) is int for d in order):
        return None
    channels, shape = step.x
    return Channels([d % len(shape) for d in order].index(channels.axis), channels.ids)


def swapped(step: Step) -> Channels | None:
    """Two axes change places."""
    pair = step.argument(1, "dim0", "axis0"), step.argument(2, "dim1", "axis1")
    if step.x is None or not all(type(d) is int for d in pair):
        return None
    channels, shape = step.x
    a, b = (d % len(shape) for d in pair)
    return Channels({a: b, b: a}.get(channels.axis, channels.axis), channels.ids)


def side_by_side(step: Step) -> Channels | None:
    """Concatenation: of channels, or over another axis."""
    nodes, dim = step.argument(0, "tensors"), step.argument(1, "dim", "axis", default=0)
    axes = {step.known[n].axis for n in nodes if n in step.known} if isinstance(nodes, list | tuple) else set()
    if len(axes) != 1 or type(dim) is not int or any(step.shapes.get(n) is None for n in nodes):
        return None
    (axis,) = axes
    if dim % len(step.shape) == axis:
        parts = [step.known[n].ids if n in step.known else fixed(step.links, step.shapes[n][axis]) for n in nodes]  # type: ignore[index]
        return Channels(axis, np.concatenate(parts))
    if any(n not in step.known for n in nodes):
        return None
    for node in nodes[1:]:
        step.links.unite(step.known[nodes[0]].ids, step.known[node].ids)
    return step.known[nodes[0]]


# ----------------------------------------------------------------------------------------- who has which rule

ELEMENTWISE_MODULES = (
    nn.CELU, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.ELU, nn.GELU,
    nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU,
    nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
MODULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), transposed),
    nn.Linear: linear,
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), normalisation),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), normalisation),
    nn.PReLU: prelu,
    **dict.fromkeys(ELEMENTWISE_MODULES, elementwise),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), over_space),
    nn.Flatten: reshaped,
}
FUNCTIONS: dict[Any, Rule] = {
    operator.getitem: indexed, functional.pad: padded, functional.interpolate: over_space,
    torch.cat: side_by_side, torch.concat: side_by_side, torch.concatenate: side_by_side,
}  # fmt: skip
METHODS: dict[str, Rule] = {}
_POOLS = ("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool", "LPPool", "ZeroPad", "ConstantPad", "ReflectionPad",
          "ReplicationPad", "CircularPad")  # fmt: skip
_POOL_FUNCTIONS = ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool", "lp_pool")
_NAMES: dict[Rule, str] = {  # of functions of torch and torch.nn.functional, of operators, and of methods; with "_" too
    elementwise: "abs add addcmul alpha_dropout ceil celu clamp clamp_max clamp_min clip clone contiguous cos detach div "
    "dropout dropout1d dropout2d dropout3d elu erf exp expm1 feature_alpha_dropout feature_dropout float floor floordiv gelu half "
    "hardshrink hardsigmoid hardswish hardtanh iadd imul isub itruediv leaky_relu lerp log log1p logsigmoid maximum minimum mish "
    "mul multiply neg negative pow reciprocal relu relu6 round rsqrt selu sigmoid sign silu sin softplus softshrink softsign sqrt "
    "square sub subtract tanh tanhshrink threshold to truediv true_divide type type_as double",
    reduced: "mean sum amax amin logsumexp prod std var norm",
    reshaped: "flatten reshape squeeze unsqueeze view unflatten",
    permuted: "permute",
    swapped: "transpose swapaxes swapdims",
}

for _rule, _words in _NAMES.items():
    for _name in [n for word in _words.split() for n in (word, word + "_")]:
        for _space in (torch, functional, operator):
            if (_function := getattr(_space, _name, None)) is not None:
                FUNCTIONS.setdefault(_function, _rule)
        if hasattr(Tensor, _name):
            METHODS[_name] = _rule
for _d in (1, 2, 3):
    for _name in _POOLS:
        if (_class := getattr(nn, f"{_name}{_d}d", None)) is not None:
            MODULES[_class] = partial(over_space, dimensions=_d)
    for _name in _POOL_FUNCTIONS:
        for _space in (torch, functional):
            if (_function := getattr(_space, f"{_name}{_d}d", None)) is not None:
                FUNCTIONS.setdefault(_function, partial(over_space, dimensions=_d))
