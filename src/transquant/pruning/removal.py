"""Channels made zero, or removed for real.

    masked    zero where they are computed and wherever they are read
    removed   rows and columns taken out, and layers told how many channels they have

Both give the same outputs but for the rounding of sums: a removed channel was read by columns that are zero in the masked network.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import Parameter

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
    `kept` as of `masked`.

    Raises InputError for channels that a group has not, groups that can only be masked, and a layer that would vanish."""
    twin = deep_copy(model)
    lost = kept_of(groups, kept)
    for group, _ in lost:
        if not group.removable:
            raise InputError(f"the channels of {group.name!r} can only be masked: it is not known which layers read them")
    gone: dict[tuple[str, int], list[Tensor]] = {}
    for group, channels in lost:
        for part in group.slices:
            rest = sorted(set(range(group.channels)) - set(channels))
            gone.setdefault((part.key, part.axis), []).append(indices(part, rest))
    for (key, axis), parts in gone.items():
        take_out(twin, key, axis, torch.cat(parts))
    return twin


def take_out(model: nn.Module, key: str, axis: int, gone: Tensor) -> None:
    """Remove entries of a tensor of a model along an axis, and tell its layer."""
    path, _, attribute = key.rpartition(".")
    layer: Any = model.get_submodule(path)
    tensor: Tensor = layer.get_parameter(attribute) if attribute in layer._parameters else layer.get_buffer(attribute)
    stays = torch.ones(tensor.shape[axis], dtype=torch.bool)
    stays[gone] = False
    smaller = tensor.detach().index_select(axis, stays.nonzero()[:, 0].to(tensor.device))
    if attribute in layer._parameters:
        layer._parameters[attribute] = Parameter(smaller, tensor.requires_grad)
    else:
        layer._buffers[attribute] = smaller
    _count(layer, attribute, smaller)


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
