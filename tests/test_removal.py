"""Masked and removed channels are the same to the output; what is kept can take over a part."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import networks
from transquant import codec, modules, pruning
from transquant.errors import InputError
from transquant.stats import collect
from transquant.workers import workers


def randomised(net, seed=0):
    """Weights and statistics of BatchNorms as training might leave them."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in net.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2, generator=generator)
        elif value.ndim == 1 and value.is_floating_point():
            value.normal_(0.3, 0.4, generator=generator)
    return net.eval()


class Stream(nn.Module):
    """A stream of residual additions without padding, a depthwise block, PReLU, and a flattened end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.back = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.Conv2d(12, 8, 1)
        self.inner_norm, self.slopes = nn.BatchNorm2d(12), nn.PReLU(12)
        self.deep, self.wide = nn.Conv2d(8, 16, 3, groups=8, stride=2), nn.ConvTranspose2d(16, 6, 2, stride=2)
        self.first, self.last = nn.Linear(6 * 196, 10), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.back(self.slopes(self.inner_norm(self.inner(x))))
        x = torch.sigmoid(self.wide(self.deep(x)))
        return self.last(torch.tanh(self.first(nn.functional.max_pool2d(x, 2).flatten(1))))


NETS = {
    "stream": (Stream, (2, 3, 30, 30)),
    "resnet20": (networks.ResNet20, (2, 3, 32, 32)),
    "squeezenet": (networks.SqueezeNet, (2, 3, 64, 64)),
    "mobilenet": (networks.MobileNetV1, (2, 3, 64, 64)),
}


def example_of(name):
    torch.manual_seed(0)
    make, shape = NETS[name]
    return randomised(make()), torch.randn(shape)


def chosen(groups, seed):
    generator = torch.Generator().manual_seed(seed)
    counts = {g.name: int(torch.randint(1, g.channels + 1, (), generator=generator)) for g in groups}
    return {g.name: torch.randperm(g.channels, generator=generator)[: counts[g.name]] for g in groups}


@pytest.mark.parametrize("name", NETS)
def test_removed_channels_are_those_that_are_masked(name):
    net, x = example_of(name)
    groups = pruning.channel_groups(net, x)
    assert sum(g.channels for g in groups) >= 30
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for seed in range(3):
        kept = chosen(groups, seed)
        full, small = pruning.masked(net, groups, kept), pruning.removed(net, groups, kept)
        with torch.no_grad():
            expected, found, untouched = full(x), small(x), net(x)
        assert float((expected - found).abs().max()) <= 1e-5 * float(expected.abs().max())
        assert float((expected - untouched).abs().max()) > 1e-3 * float(expected.abs().max())
        assert type(small) is type(net)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_layers_know_their_numbers():
    net, x = example_of("stream")
    groups = pruning.channel_groups(net, x)
    kept = {"stem": [1, 4, 5], "inner": [0, 11], "wide": [2, 3], "first": range(7)}
    assert [g.name for g in groups] == list(kept)
    small = pruning.removed(net, groups, kept).train()
    assert (small.stem.in_channels, small.stem.out_channels, small.norm.num_features) == (3, 3, 3)
    assert (small.inner.in_channels, small.inner.out_channels, small.slopes.num_parameters) == (3, 2, 2)
    assert (small.deep.in_channels, small.deep.out_channels, small.deep.groups) == (3, 6, 3)
    assert (small.wide.in_channels, small.wide.out_channels) == (6, 2)
    assert (small.first.in_features, small.first.out_features, small.last.in_features) == (392, 7, 7)
    assert torch.equal(small.stem.weight, net.stem.weight[[1, 4, 5]])
    small(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


def test_modes_flags_and_dtypes_stay():
    net, x = example_of("stream")
    groups = pruning.channel_groups(net, x)
    net.train().double()
    net.stem.weight.requires_grad_(False)
    small = pruning.removed(net, groups, {"stem": [0]})
    assert small.training
    assert small.stem.weight.dtype == torch.float64
    assert not small.stem.weight.requires_grad
    assert small.back.weight.requires_grad


@pytest.mark.parametrize("change", [pruning.masked, pruning.removed])
def test_channels_that_cannot_be_kept(change):
    net, x = example_of("stream")
    groups = pruning.channel_groups(net, x)
    for kept, message in (
        ({"inner": []}, "layer 'inner' would vanish: at least one of its 12"),
        ({"inner": [12]}, "integers from 0 to 11"),
        ({"inner": [-1]}, "integers from 0 to 11"),
        ({"inner": [0, 0]}, "different integers"),
        ({"inner": [0.5]}, "integers"),
        ({"inner": torch.tensor([True, False])}, "integers"),
        ({"outer": [0]}, "no group of channels named 'outer', allowed are 'stem'"),
    ):
        with pytest.raises(InputError, match=message):
            change(net, groups, kept)
    everything = change(net, groups, {g.name: range(g.channels) for g in groups})
    assert {k: v.shape for k, v in everything.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}


def statistics_of(net, images):
    _, _, plan = codec._open(net, None)
    with workers() as pool:
        return collect(net, list(images.split(32)), plan, modules.run_batch, pool, "mse")


def images_of(count, size):
    """Neighbouring pixels and colours that have to do with each other."""
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))
    return nn.functional.avg_pool2d(noise, 5, 1, 2) * 4 + 0.3 * noise.mean(1, keepdim=True)


@pytest.mark.parametrize("name", ["stream", "resnet20"])
def test_what_is_kept_takes_over(name):
    net, x = example_of(name)
    images = images_of(256, x.shape[2])
    statistics = statistics_of(net, images[:192])
    groups = pruning.channel_groups(net, x)
    assert ("layer1.0.conv2.weight" in statistics.absorbers) == (name == "resnet20")
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        kept = {g.name: torch.randperm(g.channels, generator=generator)[: -(-3 * g.channels // 4)] for g in groups}
        plain = pruning.removed(net, groups, kept)
        better = pruning.removed(pruning.compensated(net, groups, kept, statistics), groups, kept)
        with torch.no_grad():
            errors = [float((twin(images[192:]) - net(images[192:])).square().mean()) for twin in (plain, better)]
        assert errors[1] < 0.3 * errors[0]


def test_a_copy_of_a_channel_is_taken_over_whole():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(5 * 64, 2)).eval()
    with torch.no_grad():
        net[0].weight[3], net[0].bias[3] = 2 * net[0].weight[1], 2 * net[0].bias[1]
    images = images_of(96, 12)
    groups = pruning.channel_groups(net, images[:2])
    kept = {"0": [0, 1, 2]}
    better = pruning.removed(pruning.compensated(net, groups, kept, statistics_of(net, images)), groups, kept)
    plain = pruning.removed(net, groups, kept)
    with torch.no_grad():
        errors = [float((twin(images) - net(images)).square().mean()) for twin in (plain, better)]
    assert errors[1] < 1e-3 * errors[0]
