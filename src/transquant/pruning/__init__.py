"""Removes channels of a network for real: what belongs together, from the network's graph; the smaller module; and what the
channels that stay can take over."""

from transquant.pruning.channel_groups import channel_groups, layer_groups
from transquant.pruning.compensation import compensated
from transquant.pruning.groups import ChannelGroup, Kept
from transquant.pruning.removal import fit, masked, removed

__all__ = ["ChannelGroup", "Kept", "channel_groups", "compensated", "fit", "layer_groups", "masked", "removed"]
