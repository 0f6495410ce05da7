"""A coder's transform, and the BatchNorm before it, in the weights of the layer that makes the map: one convolution with K outputs.

    layer (C) ─ BatchNorm ─ · − mean ─ analysis (K, C) ─ components     →     layer (K) ─ components

Weights are multiplied in float64. Components are those of the network as it was but for the rounding of float32, so that now and
then one that lies between two symbols is rounded to the other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from transquant.features.records import Components, Point

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NAME = "folded"
_EXACT = (torch.float32, torch.float64)  # of weights; shorter ones, folded, are rounded where the map's own were not


@dataclass(frozen=True, slots=True)
class Ending:
    """What a device half ends with: `layer`, a convolution or linear layer by the name of `path`, and `norm` behind it, or None."""

    path: str
    layer: Any
    norm: Any

    @property
    def tensors(self) -> list[Tensor]:
        """All that folding reads."""
        norm = self.norm
        own = [] if norm is None else [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        return [t for t in (self.layer.weight, self.layer.bias, *own) if t is not None]


def ending(network: fx.GraphModule, point: Point) -> Ending | None:
    """The layer that a transform of channels at `point` can go into, as `network` is now. None where something else makes the map,
    in groups, or with hooks, in training or in half precision; or where the layer's result goes elsewhere, too."""
    node: Any = next(reversed(network.graph.nodes)).args[0]
    norm = _module(network, node, NORMS)
    if norm is not None:
        if norm.training or norm.running_var is None:
            return None
        node = node.args[0]
    layer = _module(network, node, (*CONVOLUTIONS, nn.Linear))
    if layer is None or layer.weight.dtype not in _EXACT:
        return None
    if isinstance(layer, nn.Linear):  # a BatchNorm's channels are in axis 1, of vectors the last
        fits = layer.out_features == point.channels and (norm is None or point.axis == 1)
    else:
        fits = layer.out_channels == point.channels and layer.groups == 1 and point.axis == 1
    return Ending(str(node.target), layer, norm) if fits else None


def fold(network: fx.GraphModule, end: Ending, components: Components) -> fx.GraphModule:
    """The network up to the components instead of the map. It shares the other layers with `network`, which stays as it is."""
    graph = fx.Graph()
    last: Any = graph.graph_copy(network.graph, {})
    graph.output(last)
    result = fx.GraphModule(network, graph, "Folded")
    name = NAME
    while hasattr(result, name):
        name += "_"
    result.add_submodule(name, _folded_layer(end, components))
    layer = last if end.norm is None else last.args[0]
    layer.target = name
    if end.norm is not None:
        last.replace_all_uses_with(layer)
        graph.erase_node(last)
    result.delete_all_unused_submodules()
    result.recompile()
    return result


class Folder:
    """Folds a device half when it is first asked to, and again whenever the weights that it read are others."""

    def __init__(self, components: Components, point: Point) -> None:
        self.components, self.point = components, point
        self._read: list[Tensor] = []  # kept, so that no other tensor gets their identity
        self._state: list[Any] = []
        self._made: fx.GraphModule | None = None

    def __call__(self, network: fx.GraphModule) -> fx.GraphModule | None:
        """The folded network, None where nothing can be folded."""
        end = ending(network, self.point)
        if end is None:
            return None
        state = _state(end.tensors)
        if self._made is None or state != self._state:
            self._made, self._read, self._state = fold(network, end, self.components), end.tensors, state
        return self._made


def _module(network: fx.GraphModule, node: Any, kinds: tuple[type, ...]) -> Any:
    """The module that a node calls, if it is of these classes, does nothing beside, and nothing else reads its result."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) != 1 or len(node.args) != 1 or node.kwargs:
        return None
    module = network.get_submodule(str(node.target))
    hooked = module._forward_hooks or module._forward_pre_hooks  # such as set the weight
    return module if type(module) in kinds and not hooked else None


def _folded_layer(end: Ending, components: Components) -> nn.Module:
    weight = end.layer.weight
    analysis, shift = _float64(torch.from_numpy(components.analysis)), -_float64(torch.from_numpy(components.mean))
    scale = torch.ones_like(shift)
    if end.norm is not None:
        scale /= (_float64(end.norm.running_var) + end.norm.eps).sqrt()
        if end.norm.weight is not None:
            scale *= _float64(end.norm.weight)
        if end.norm.bias is not None:
            shift += _float64(end.norm.bias)
        shift -= scale * _float64(end.norm.running_mean)
    if end.layer.bias is not None:
        shift += scale * _float64(end.layer.bias)
    layer: nn.Module = copy.deepcopy(end.layer)
    folded = torch.tensordot(analysis * scale, _float64(weight), 1), analysis @ shift
    layer.weight, layer.bias = (nn.Parameter(v.to(weight.device, weight.dtype), requires_grad=False) for v in folded)
    if isinstance(layer, nn.Linear):
        layer.out_features = len(analysis)
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        layer.out_channels = len(analysis)
    return layer


def _float64(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _state(tensors: Iterable[Tensor]) -> list[Any]:
    """Changes with every change of a tensor that torch counts."""
    return [(id(t), t.data_ptr(), None if t.is_inference() else t._version, t.dtype, t.device) for t in tensors]
