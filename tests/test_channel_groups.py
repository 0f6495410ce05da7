"""Channels that belong together: what a network's graph says of them, and what it does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import networks
from transquant import pruning
from transquant.channels import Slice
from transquant.errors import InputError, NotFollowed


def groups_of(model, shape=(2, 3, 16, 16)):
    torch.manual_seed(1)
    return {g.name: g for g in pruning.channel_groups(model, torch.randn(shape))}


class Net(nn.Module):
    """Layers by name, and a forward that a test writes."""

    def __init__(self, run, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def conv(a, b, k=3, **options):
    return nn.Conv2d(a, b, k, padding=k // 2, **options)


def test_a_chain_has_rows_biases_norms_and_columns():
    net = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.PReLU(8), conv(8, 6), nn.Flatten(), nn.Linear(6 * 16 * 16, 5))
    found = groups_of(net)
    assert list(found) == ["0", "3"]
    first, second = found["0"], found["3"]
    norm = [f"1.{n}" for n in ("weight", "bias", "running_mean", "running_var")]
    assert [s.key for s in first.sources] == ["0.weight", "0.bias", *norm, "2.weight"]
    assert first.readers == (Slice("3.weight", 1, 0, 1),)
    assert (second.channels, second.readers) == (6, (Slice("5.weight", 1, 0, 256),))
    assert all((s.axis, s.start, s.span) == (0, 0, 1) for s in first.sources)


def test_depthwise_kernels_go_with_their_channels_as_many_as_an_input_has():
    net = nn.Sequential(conv(3, 4), conv(4, 8, groups=4), nn.ReLU6(), conv(8, 4, 1), nn.AdaptiveAvgPool2d(1))
    found = groups_of(net)
    assert list(found) == ["0"]
    assert Slice("1.weight", 0, 0, 2) in found["0"].sources
    assert found["0"].readers == (Slice("3.weight", 1, 0, 2),)


def test_what_is_added_is_one_and_what_lies_side_by_side_is_not():
    def run(net, x):
        x = net.a(x)
        x = x + net.b(torch.relu(x))
        x = torch.cat([net.c(x), functional.hardswish(net.d(x))], 1)
        return net.e(x).mean((2, 3))

    found = groups_of(Net(run, a=conv(3, 4), b=conv(4, 4), c=conv(4, 6), d=conv(4, 5), e=conv(11, 7)))
    assert list(found) == ["a", "c", "d"]
    assert [s.key for s in found["a"].sources] == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert [s.key for s in found["a"].readers] == ["b.weight", "c.weight", "d.weight"]
    assert found["d"].readers == (Slice("e.weight", 1, 6, 1),)


def test_a_sum_of_things_side_by_side_splits_a_layer():
    def run(net, x):
        return net.d(torch.cat([net.a(x), net.b(x)], 1) + net.c(x)).mean((2, 3))

    found = groups_of(Net(run, a=conv(3, 4), b=conv(3, 5), c=conv(3, 9), d=conv(9, 3)))
    assert {name: g.channels for name, g in found.items()} == {"a": 4, "b": 5}
    assert Slice("c.weight", 0, 4, 1) in found["b"].sources


def test_squeeze_and_excitation_is_followed_through_views():
    def run(net, x):
        x = net.a(x)
        s = torch.sigmoid(net.up(torch.relu(net.down(x.mean((2, 3))))))
        return net.head((x * s.view(s.size(0), -1, 1, 1)).amax((2, 3)))

    found = groups_of(Net(run, a=conv(3, 8), down=nn.Linear(8, 4), up=nn.Linear(4, 8), head=nn.Linear(8, 3)))
    assert list(found) == ["a", "down"]
    assert [s.key for s in found["a"].sources] == ["a.weight", "a.bias", "up.weight", "up.bias"]


def test_a_layer_that_is_called_twice():
    def run(net, x):
        x = net.a(x)
        return net.head(net.b(torch.relu(net.b(x))).mean((2, 3)))

    found = groups_of(Net(run, a=conv(3, 6), b=conv(6, 6), head=nn.Linear(6, 3)))
    assert list(found) == ["a"]
    assert {(s.key, s.axis) for s in found["a"].slices} >= {("b.weight", 0), ("b.weight", 1), ("head.weight", 1)}


def test_over_space_anything_goes():
    def run(net, x):
        x = functional.interpolate(functional.pad(functional.max_pool2d(net.a(x), 2), (1, 0, 2, 3)), scale_factor=2.0)
        x = torch.cat([x, x], 2)[:, :, ::2, 1:]
        x = net.b(x).permute(0, 2, 3, 1).transpose(1, 3)
        return net.c(x).flatten(2).mean(-1)

    assert list(groups_of(Net(run, a=conv(3, 6), b=conv(6, 4), c=conv(4, 3)))) == ["a", "b"]


KEPT_WHOLE = {
    "padding of channels": lambda net, x: functional.pad(net.a(x), (0, 0, 0, 0, 1, 1))[:, 1:-1],
    "softmax over channels": lambda net, x: net.a(x).softmax(1),
    "a mean over channels": lambda net, x: net.a(x) - net.a(x).mean(1, keepdim=True),
    "an order of channels": lambda net, x: net.a(x).view(x.size(0), 2, -1, 16, 16).transpose(1, 2).reshape(x.size(0), -1, 16, 16),
    "the network's input": lambda net, x: net.a(x) + torch.cat([x, x], 1),
    "a number that is written down": lambda net, x: net.a(x).view(-1, 6 * 256).view(-1, 6, 16, 16),
    "a slice of channels": lambda net, x: torch.cat([net.a(x)[:, 3:], net.a(x)[:, :3]], 1),
    "a weight that is used otherwise": lambda net, x: net.a(x) * net.a.weight.sum(),
}


@pytest.mark.parametrize("what", KEPT_WHOLE)
def test_what_cannot_be_followed_stays(what):
    def run(net, x):
        return net.c(torch.relu(net.b(KEPT_WHOLE[what](net, x)))).mean((2, 3))

    assert list(groups_of(Net(run, a=conv(3, 6), b=conv(6, 4), c=conv(4, 3)))) == ["b"]


def test_layers_that_are_not_what_they_seem_stay():
    tied = conv(6, 6)
    hooked = conv(6, 6)
    hooked.register_forward_hook(lambda module, inputs, result: result.flip(1))
    old = torch.nn.utils.weight_norm(conv(6, 6))
    net = nn.Sequential(
        conv(3, 6), nn.ReLU(), parametrizations.weight_norm(conv(6, 6)), nn.ReLU(), old, nn.ReLU(), tied, nn.ReLU(), conv(6, 6),
        nn.ReLU(), hooked, nn.GroupNorm(2, 6), conv(6, 6, groups=2), conv(6, 5), nn.ReLU(), conv(5, 3),
    )  # fmt: skip
    net[8].weight = tied.weight
    assert list(groups_of(net)) == ["13"]


def test_a_number_in_the_models_own_code_is_found_by_trying():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.width = nn.Linear(6, 8), nn.Linear(8, 8), 8
            self.c = nn.Linear(8, 2)

        def forward(self, x):
            x = torch.relu(self.b(torch.relu(self.a(x))))
            return self.c(x / (x.shape[1] / self.width))  # in the graph, each channel divided by a number

    assert list(groups_of(Own(), (4, 6))) == ["a"]


def test_networks_that_branch_on_values_can_only_be_masked():
    def run(net, x):
        x = net.norm(net.a(x))
        return net.c(net.b(x) if x.sum() > 0 else net.b(-x)).mean((2, 3))

    net = Net(run, a=conv(3, 4), norm=nn.BatchNorm2d(4), b=conv(4, 5, bias=False), c=conv(5, 3)).eval()
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(NotFollowed, match="can only be masked"):
        pruning.channel_groups(net, x)
    groups = pruning.layer_groups(net, x)
    assert [(g.name, g.channels, g.removable) for g in groups] == [("a", 4, False), ("b", 5, False)]
    twin = pruning.masked(net, groups, {"b": [1, 4]})
    assert twin.b.weight.flatten(1).any(1).tolist() == [False, True, False, False, True]
    with pytest.raises(InputError, match="can only be masked"):
        pruning.removed(net, groups, {"b": [1, 4]})


def test_examples_of_every_kind_and_models_that_fail_on_them():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x, y, bias=None):
            s = self.a(x) + self.b(y)
            if bias is not None:
                s = s + bias
            return {"result": self.c(s.relu_())}

    x, y = torch.randn(3, 4), torch.randn(3, 5)
    for example in ((x, y), {"y": y, "x": x}):
        (group,) = pruning.channel_groups(Two(), example)
        assert {s.key for s in group.sources} == {"a.weight", "a.bias", "b.weight", "b.bias"}
    with pytest.raises(InputError, match="cannot be run on the example"):
        pruning.channel_groups(Two(), (x, x))
    with pytest.raises(InputError, match="cannot be run on the example"):
        pruning.channel_groups(Two(), x)


def test_inputs_that_are_left_out():
    class Some(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x, add=None, factor=2.0, *, scale=None):
            x = self.a(x) if add is None else self.a(x) + add
            return self.b(x * factor if scale is None else x * scale)

    x, one = torch.randn(3, 4), torch.tensor(1.5)
    for example in (x, {"x": x, "factor": one}, {"x": x, "scale": one}, (x, one)):
        assert [g.name for g in pruning.channel_groups(Some(), example)] == ["a"]

    class Any(Some):
        def forward(self, *inputs):
            return self.b(self.a(inputs[0]).mul_(inputs[1]))

    assert [g.name for g in pruning.channel_groups(Any(), (x, one))] == ["a"]


def test_the_model_stays_as_it_is():
    net = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 2)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    groups_of(net)
    assert net.training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_real_networks():
    if networks.shared_data() is not None:
        net = networks.network("resnet20")
    else:
        net = networks.ResNet20().eval()
    blocks = groups_of(net, (2, 3, 32, 32))
    assert list(blocks) == [f"layer{s}.{k}.conv1" for s in (1, 2, 3) for k in range(3)]  # shortcuts pad channels: streams stay
    fires = groups_of(networks.SqueezeNet().eval(), (2, 3, 64, 64))
    assert len(fires) == 1 + 3 * 8
    assert fires["features.4.expand3x3"].readers == (Slice("features.6.squeeze.weight", 1, 64, 1),)
    chain = groups_of(networks.MobileNetV1().eval(), (2, 3, 64, 64))
    assert [g.channels for g in chain.values()] == list(networks.MobileNetV1.WIDTHS)


def test_a_model_without_values():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    for groups in (pruning.channel_groups, pruning.layer_groups):
        with pytest.raises(InputError, match="meta device"):
            groups(net, torch.zeros(2, 4, device="meta"))
