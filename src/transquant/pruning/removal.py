"""Channels made zero, or removed for real.

    masked    zero where they are computed and wherever they are read
    removed   rows and columns taken out, and layers told how many channels they have

Both give the same outputs but for the rounding of sums: a removed channel was read by columns that are zero in the masked network.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import Parameter

from transquant.channels import MARK, KeptChannels, Shapes, Slice, mask_of, shapes_after, steps_of
from transquant.copying import deep_copy
from transquant.errors import InputError
from transquant.pruning.groups import ChannelGroup, Kept, indices, kept_of

M = TypeVar("M", bound=nn.Module)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
VARIANCES = "running_var"  # stay as they are: divided by, and of no effect where scale and mean are zero


def masked(model: M, groups: Iterable[ChannelGroup], kept: Kept) -> M:
    """A copy of a model in which all channels but the kept ones are zero: their rows, biases, entries of normalisations, and the
    columns that read them. `kept`: by name of a group the channels that stay, integers from 0; groups that are left out keep all.

    Raises InputError for channels that a group has not, and for a layer that would vanish."""
    twin = deep_copy(model)
    state = twin.state_dict(keep_vars=True)
    with torch.no_grad():
        for group, channels in kept_of(groups, kept):
            gone = sorted(set(range(group.channels)) - set(channels))
            for part in group.slices:
                if not part.key.endswith(VARIANCES):
                    tensor = state[part.key]
                    tensor.index_fill_(part.axis, indices(part, gone).to(tensor.device), 0)
    return twin


def removed(model: M, groups: Iterable[ChannelGroup], kept: Kept) -> M:
    """A copy of a model without the channels that are not kept: an ordinary module of the same class, with smaller layers.
    `kept` as of `masked`. The module is marked with what was removed (an attribute, no part of its state), and `compress` writes it
    into the file, so that the file can be installed into the original class.

    Raises InputError for channels that a group has not, groups that can only be masked, and a layer that would vanish."""
    twin = deep_copy(model)
    steps = _steps(kept_of(groups, kept))
    _take(twin, steps)
    return twin


def fit(model: nn.Module, steps: Sequence[KeptChannels], shapes: Shapes) -> None:
    """Remove channels in place, where that, and nothing less, gives a model the `shapes` of a file's tensors; a model that has
    them already stays as it is, as does one that they do not fit. Steps that a model is marked with are behind it. Raises
    InputError, before anything is changed, where the channels are in layers that cannot lose any."""
    done = steps_of(model)
    steps = steps[len(done) :] if tuple(steps[: len(done)]) == done else steps
    state = model.state_dict(keep_vars=True)
    own = {key: tuple(tensor.shape) for key, tensor in state.items()}
    after = shapes_after(steps, own)
    if not steps or after is None or own.keys() != shapes.keys():
        return
    changed = {id(state[key]): shape for key, shape in after.items()}  # under all their names
    expected = {key: changed.get(id(tensor), own[key]) for key, tensor in state.items()}
    if all(tuple(expected[key]) == tuple(shape) for key, shape in shapes.items()):
        for path in dict.fromkeys(key.rpartition(".")[0] for key in after):
            _check(model.get_submodule(path), path, expected)
        _take(model, steps)


def _steps(lost: Sequence[tuple[ChannelGroup, list[int]]]) -> tuple[KeptChannels, ...]:
    """Channels of groups, removed one group after the other: each moves what lies behind it."""
    steps: list[KeptChannels] = []
    done: dict[tuple[str, int], list[tuple[int, int]]] = {}  # first index before all steps, and how many indices are gone
    for group, channels in lost:
        if not group.removable:
            raise InputError(f"the channels of {group.name!r} can only be masked: it is not known which layers read them")
        slices = []
        for part in group.slices:
            own = done.setdefault((part.key, part.axis), [])
            slices.append(replace(part, start=part.start - sum(count for first, count in own if first < part.start)))
            own.append((part.start, (group.channels - len(channels)) * part.span))
        steps.append(KeptChannels(group.channels, mask_of(group.channels, channels), tuple(slices)))
    return tuple(steps)


def _take(model: nn.Module, steps: Sequence[KeptChannels]) -> None:
    """Remove channels in place, and mark the model."""
    for step in steps:
        gone = step.gone()
        for part in step.slices:
            _take_out(model, part, indices(part, gone))
    if steps:
        model.__dict__[MARK] = (*steps_of(model), *steps)


def _take_out(model: nn.Module, part: Slice, gone: Tensor) -> None:
    """Remove entries of a tensor of a model along an axis, and tell its layer."""
    path, _, attribute = part.key.rpartition(".")
    layer: Any = model.get_submodule(path)
    tensor: Tensor = layer.get_parameter(attribute) if attribute in layer._parameters else layer.get_buffer(attribute)
    stays = torch.ones(tensor.shape[part.axis], dtype=torch.bool)
    stays[gone] = False
    smaller = tensor.detach().index_select(part.axis, stays.nonzero()[:, 0].to(tensor.device))
    if attribute in layer._parameters:
        layer._parameters[attribute] = Parameter(smaller, tensor.requires_grad)
    else:
        layer._buffers[attribute] = smaller
    _count(layer, attribute, smaller)


def _check(layer: Any, path: str, shapes: Shapes) -> None:
    """Raises InputError for a layer of a kind that cannot lose channels, and where its tensors would not fit each other."""
    known = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear, nn.PReLU, _NormBase)
    own = {name: shapes[f"{path}.{name}" if path else name] for name in layer.state_dict() if "." not in name}
    weight = own.pop("weight", None)
    rows = next(iter(own.values()), [0])[0] if weight is None else weight[isinstance(layer, TRANSPOSED)]
    fits = isinstance(layer, known) and all(shape[0] == rows for shape in own.values() if len(shape) == 1)
    if fits and isinstance(layer, CONVOLUTIONS) and layer.groups > 1:
        fits = layer.groups == layer.in_channels and rows % (layer.out_channels // layer.groups) == 0
    if not fits:
        raise InputError(f"the file's kept channels do not fit the layer {path!r}, a {type(layer).__name__}")


def _count(layer: Any, attribute: str, tensor: Tensor) -> None:
    """Tell a layer how many channels it has now."""
    if isinstance(layer, _NormBase):
        layer.num_features = len(tensor)
    elif attribute != "weight":
        return
    elif isinstance(layer, TRANSPOSED):
        layer.in_channels, layer.out_channels = tensor.shape[:2]
    elif isinstance(layer, CONVOLUTIONS) and layer.groups > 1:  # depthwise, with as many outputs an input as before
        outputs = layer.out_channels // layer.groups
        layer.out_channels, layer.groups = len(tensor), len(tensor) // outputs
        layer.in_channels = layer.groups
    elif isinstance(layer, CONVOLUTIONS):
        layer.out_channels, layer.in_channels = tensor.shape[:2]
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = tensor.shape
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(tensor)
