"""Which channels of a network belong together: its graph is run once on an example, and each operation says what becomes of the
channels (rules.py). What cannot be followed has to stay, and what was found is tried out before anybody gets it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import Parameter

from transquant.channels import Slice
from transquant.copying import deep_copy
from transquant.errors import InputError, NotFollowed
from transquant.pruning.groups import ChannelGroup
from transquant.pruning.links import Links
from transquant.pruning.removal import masked, removed
from transquant.pruning.rules import FUNCTIONS, METHODS, MODULES, Channels, Rule, Step

CLOSE = 1e-4  # of the largest output: more than another order of sums in float32, less than a channel that matters
QUESTIONS = ("size", "dim", "numel", "ndimension", "__len__", "is_contiguous")  # about a tensor, not about its values
FACTS = ("shape", "dtype", "device", "ndim", "is_cuda", "layout", "requires_grad")
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def channel_groups(model: nn.Module, example: Any) -> tuple[ChannelGroup, ...]:
    """The channels of a network that can be removed, in groups that are kept or removed together.

    Union–find over the channel axes of all tensors of the network's graph (torch.fx), as it is in eval mode. `example`: a tensor, a
    tuple of positional inputs, or a mapping of keyword inputs, of two samples or more; with it every group has been tried out:
    every other channel removed, outputs are those of the network in which they are zero. The model is copied, never changed.
    Channels that reach an output, or an operation that is not known to take each channel by itself, belong to no group.

    Raises NotFollowed where the graph cannot be traced (then `layer_groups` can be masked), InputError where the model cannot be
    run on the example."""
    twin = deep_copy(model).eval()
    args, kwargs = arguments(example)
    outputs(twin, example)
    bound = inspect.signature(twin.forward).bind(*args, **kwargs)
    left_out = _left_out(twin, bound.arguments)
    bound.apply_defaults()
    try:
        graph = fx.GraphModule(twin, fx.Tracer().trace(twin, left_out))
        follower = _Follower(graph, twin)
        with torch.no_grad():
            follower.run(*bound.args, *bound.kwargs.values())
    except Exception as error:  # whatever the model's own code makes of what stands for tensors
        reason = (str(error) or type(error).__name__).strip().splitlines()[0][:200]
        raise NotFollowed(
            f"the graph of {type(model).__name__} cannot be followed ({reason}): its channels can only be masked, "
            "layer by layer (pruning.layer_groups)"
        ) from error
    return _tried(twin, follower.links.groups(), example)


def layer_groups(model: nn.Module, example: Any) -> tuple[ChannelGroup, ...]:
    """One group for each convolution and linear layer that runs just once, in the order in which they run, but for the last, which
    makes the output. For networks whose graph cannot be traced: nothing is known of who reads the channels, so that they can be
    masked (their own rows and biases become zero; what a BatchNorm adds behind them stays), not removed. Arguments as of
    `channel_groups`. Raises InputError."""
    twin = deep_copy(model).eval()
    ran: list[str] = []
    tied = _tied(twin)

    def note(name: str) -> Any:
        return lambda *_: ran.append(name)

    handles = [m.register_forward_hook(note(n)) for n, m in twin.named_modules() if type(m) in LAYERS]
    outputs(twin, example)
    for handle in handles:
        handle.remove()
    layers: dict[str, Any] = dict(twin.named_modules())
    once = [n for n in ran[:-1] if n and ran.count(n) == 1 and n != ran[-1] and _plain(layers[n], tied)]
    groups = []
    for name in once:
        rows, own = len(layers[name].weight), [a for a in ("weight", "bias") if getattr(layers[name], a) is not None]
        if rows > 1:
            groups.append(ChannelGroup(name, rows, tuple(Slice(f"{name}.{a}", 0, 0, 1) for a in own), (), removable=False))
    return tuple(groups)


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs of an example."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, tuple | list) else (example,)), {}


def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """All tensors that a model returns for an example. Raises InputError where it fails."""
    args, kwargs = arguments(example)
    try:
        with torch.no_grad():
            found = list(_tensors(model(*args, **kwargs)))
    except Exception as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0][:200]
        raise InputError(f"the model cannot be run on the example: {reason}") from error
    if any(t.is_meta for t in found):
        raise InputError("the model is on the meta device, where outputs have no values: give one with weights")
    return found


class _Follower(fx.Interpreter):
    """Runs a graph, and follows channels through it."""

    def __init__(self, graph: fx.GraphModule, model: nn.Module) -> None:
        super().__init__(graph)
        self.links = Links()
        self._layers = dict(model.named_modules())
        self._tied = _tied(model)
        self._shapes: dict[fx.Node, tuple[int, ...] | None] = {}
        self._known: dict[fx.Node, Channels] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self._shapes[n] = shape = tuple(result.shape) if isinstance(result, Tensor) else None
        if n.op == "get_attr":
            self.links.fix_tensor(str(n.target))
        if _asks(n):
            return result
        rule, layer = self._rule(n)
        channels = None
        if rule is not None and shape is not None:
            path = str(n.target) if layer is not None else ""
            channels = rule(Step(n, self._shapes, self._known, shape, self.links, path, layer))
        if channels is None:
            for node in n.all_input_nodes:
                if node in self._known:
                    self.links.fix(self._known[node].ids)
        else:
            self._known[n] = channels
        return result

    def _rule(self, n: fx.Node) -> tuple[Rule | None, nn.Module | None]:
        if n.op == "call_module":
            layer = self._layers[str(n.target)]
            return (MODULES.get(type(layer)) if _plain(layer, self._tied) else None), layer
        if n.op == "call_method":
            return METHODS.get(str(n.target)), None
        return (FUNCTIONS.get(n.target) if n.op == "call_function" else None), None


def _asks(n: fx.Node) -> bool:
    """Whether a node asks for a shape or the like."""
    if n.op == "call_function" and n.target is getattr:
        return n.args[1] in FACTS
    return (n.op == "call_method" and n.target in QUESTIONS) or (n.op == "call_function" and n.target is len)


def _plain(layer: nn.Module, tied: set[int]) -> bool:
    """Whether a layer's tensors are parameters of its own, and nothing but its class says what it does."""
    weight = getattr(layer, "weight", None)
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return (weight is None or isinstance(weight, Parameter)) and not hooked and not any(id(p) in tied for p in layer.parameters())


def _tied(model: nn.Module) -> set[int]:
    """Parameters (by id) that more than one module has."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for own in {id(p) for p in module.parameters(recurse=False)}:
            owners[own] = owners.get(own, 0) + 1
    return {own for own, count in owners.items() if count > 1}


def _tried(twin: nn.Module, groups: Sequence[ChannelGroup], example: Any) -> tuple[ChannelGroup, ...]:
    """Those groups of which every other channel can be removed without any other effect than that of masking it."""
    if not groups or _works(twin, groups, example):
        return tuple(groups)
    good: list[ChannelGroup] = []
    for group in groups:
        if _works(twin, [*good, group], example):
            good.append(group)
    return tuple(good)


def _works(twin: nn.Module, groups: Sequence[ChannelGroup], example: Any) -> bool:
    kept = {group.name: range(0, group.channels, 2) for group in groups}
    expected = outputs(masked(twin, groups, kept), example)
    try:
        found = outputs(removed(twin, groups, kept), example)
    except InputError:
        return False
    same = bool(expected) and [t.shape for t in expected] == [t.shape for t in found]
    return same and all(_close(one, other) for one, other in zip(expected, found, strict=True))


def _close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point() or one.numel() == 0:
        return torch.equal(one, other)
    return float((one - other).abs().max()) <= CLOSE * max(float(one.abs().max()), 1e-30)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(map(_tensors, value.values()))
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(map(_tensors, value))


def _left_out(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Defaults of the inputs that an example leaves out, for the tracer."""
    parameters = inspect.signature(model.forward).parameters
    empty = inspect.Parameter.empty
    return {n: p.default for n, p in parameters.items() if n not in given and p.default is not empty} or None
