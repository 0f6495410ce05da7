"""Moments of every kind of layer against brute force, and replayed layers against the modules that they stand for."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from layer_models import Conv1D
from transquant.modules import plan_model, run_batch
from transquant.stats import collect
from transquant.stats.moments import Moments, moment_shapes
from transquant.stats.recorders import attach
from transquant.workers import workers


class Alone(nn.Module):
    """One layer whose output is the model's, so that the random direction is the gradient of the layer's output."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = self.layer(x)
        return y[0] if isinstance(y, tuple) else y


def statistics(layer, x):
    with workers() as pool:
        model = Alone(layer).eval()
        return collect(model, [x], plan_model(model), run_batch, pool, "mse", cross_validate=False).layers


def signs(shape):
    """The direction of the first micro-batch, of squared error, seed 0."""
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1


def shape_of(moment):
    return moment / np.abs(moment).max()


def weight_gradient(layer, output):
    (gradient,) = torch.autograd.grad(output, layer.weight, retain_graph=True)
    return gradient.reshape(len(gradient), -1).double().numpy()


def check_scale(stats, layer, x, outputs):
    """tr A · tr G, summed over groups, is the squared gradient of the weight."""
    traces = sum(np.trace(a) * np.trace(g) for a, g in zip(stats.input_moment, stats.output_moment, strict=True))
    energy = float((weight_gradient(layer, (layer(x) * signs(outputs)).sum()) ** 2).sum()) / len(x)
    assert stats.gradient_energy == pytest.approx(energy, rel=1e-5)
    assert traces == pytest.approx(energy / np.prod(outputs[1:]), rel=1e-5)


CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3), (7,)), (nn.Conv1d(4, 6, 4, stride=3, padding=2, dilation=2, groups=2), (9,)),
    (nn.Conv1d(4, 4, 3, groups=4, padding="same", padding_mode="circular"), (6,)), (nn.Conv1d(4, 2, 3, padding="valid"), (6,)),
    (nn.Conv1d(4, 6, 2, padding=1, padding_mode="replicate", bias=False), (5,)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (5, 5)),
    (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect", groups=2), (4, 3)),
    (nn.Conv3d(4, 6, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1), groups=2), (2, 4, 3)),
    (nn.Conv3d(2, 3, 2, padding="same", dilation=(1, 1, 2)), (2, 3, 3)),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "size"), CONVOLUTIONS, ids=lambda v: str(v).replace(" ", ""))
def test_moments_of_convolutions(layer, size):
    """A patch is the gradient of one output with respect to the weights of its row."""
    x = torch.randn(3, layer.in_channels, *size, generator=torch.Generator().manual_seed(1))
    y = layer(x)
    groups, rows = layer.groups, layer.out_channels // layer.groups
    found = statistics(copy.deepcopy(layer), x)["layer.weight"]
    gradient = signs(y.shape).flatten(2).double().numpy()
    flat = y.flatten(2)
    for k in range(groups):
        picks = itertools.product(range(len(x)), range(flat.shape[2]))
        columns = np.stack([weight_gradient(layer, flat[n, k * rows, p])[k * rows] for n, p in picks], 1)
        np.testing.assert_allclose(found.input_moment[k], columns @ columns.T / columns.shape[1], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.input_mean[k], columns.mean(1), rtol=1e-4, atol=1e-5)
    g = gradient.reshape(len(x), groups, rows, -1).transpose(1, 2, 0, 3).reshape(groups, rows, -1)
    np.testing.assert_allclose(shape_of(found.output_moment), shape_of(g @ g.transpose(0, 2, 1)), rtol=1e-5, atol=1e-6)
    check_scale(found, layer, x, y.shape)


TRANSPOSED = [
    (nn.ConvTranspose1d(4, 6, 3), (5,)), (nn.ConvTranspose1d(4, 6, 4, stride=3, padding=2, output_padding=2, groups=2), (4,)),
    (nn.ConvTranspose1d(4, 2, 2, stride=4, output_padding=1), (4,)), (nn.ConvTranspose1d(4, 4, 3, groups=4, dilation=2), (5,)),
    (nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), output_padding=(1, 0), dilation=(1, 2)), (3, 3)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=3, groups=2, bias=False), (4, 4)),
    (nn.ConvTranspose3d(4, 6, (1, 3, 2), stride=(1, 2, 2), padding=(0, 1, 1), output_padding=(0, 1, 0), groups=2), (2, 3, 3)),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "size"), TRANSPOSED, ids=lambda v: str(v).replace(" ", ""))
def test_moments_of_transposed_convolutions(layer, size):
    """What an input position reaches of the gradient: the weights' gradient for an input that is one there and zero elsewhere."""
    x = torch.randn(2, layer.in_channels, *size, generator=torch.Generator().manual_seed(1))
    y = layer(x)
    direction = signs(y.shape)
    groups, rows = layer.groups, layer.in_channels // layer.groups
    found = statistics(copy.deepcopy(layer), x)["layer.weight"]
    positions = int(np.prod(size))
    for k in range(groups):
        columns = []
        for n, p in itertools.product(range(len(x)), range(positions)):
            one = torch.zeros(1, layer.in_channels, positions)
            one[0, k * rows, p] = 1
            output = layer(one.view(1, layer.in_channels, *size))
            columns.append(weight_gradient(layer, (output * direction[n : n + 1]).sum())[k * rows])
        patches = np.stack(columns, 1)
        np.testing.assert_allclose(found.input_moment[k], patches @ patches.T / patches.shape[1], rtol=1e-4, atol=1e-5)
    inputs = x.flatten(2).double().numpy().reshape(len(x), groups, rows, -1).transpose(1, 2, 0, 3).reshape(groups, rows, -1)
    np.testing.assert_allclose(shape_of(found.output_moment), shape_of(inputs @ inputs.transpose(0, 2, 1)), rtol=1e-4, atol=1e-5)
    assert found.input_mean is None
    check_scale(found, layer, x, y.shape)


def test_an_output_size_that_is_asked_for():
    class Sized(nn.ConvTranspose2d):
        def forward(self, x):
            return super().forward(x, output_size=(8, 7))

    layer, x = Sized(3, 4, 3, stride=2, padding=1), torch.randn(2, 3, 4, 4)
    plain = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=(1, 0))
    plain.load_state_dict(layer.state_dict())
    one, two = statistics(layer, x)["layer.weight"], statistics(plain, x)["layer.weight"]
    np.testing.assert_array_equal(one.input_moment, two.input_moment)


def test_unbatched_inputs_of_convolutions():
    class Each(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return torch.stack([self.layer(v) for v in x])

    for layer in (nn.Conv1d(4, 6, 3), nn.ConvTranspose1d(4, 6, 3, 2)):
        x = torch.randn(3, 4, 8)
        one, two = statistics(layer, x)["layer.weight"], statistics(Each(layer), x)["layer.layer.weight"]
        np.testing.assert_allclose(one.input_moment, two.input_moment, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(one.output_moment, two.output_moment, rtol=1e-5, atol=1e-6)


def test_moments_of_linear_kinds():
    x, direction = torch.randn(5, 3, 4), signs((5, 3, 6)).reshape(-1, 6)
    a, g = x.reshape(-1, 4).T @ x.reshape(-1, 4), direction.T @ direction
    linear = statistics(nn.Linear(4, 6), x)["layer.weight"]
    turned = statistics(Conv1D(6, 4), x)["layer.weight"]
    for columns, rows, stats in ((a, g, linear), (g, a, turned)):
        np.testing.assert_allclose(stats.input_moment[0], columns.numpy() / 15, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(shape_of(stats.output_moment[0]), shape_of(rows.numpy()), rtol=1e-5, atol=1e-6)
    assert linear.gradient_energy == pytest.approx(turned.gradient_energy, rel=1e-5)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("form", ["matrix", "offsets", "last_offset"])
def test_moments_of_bags(mode, form):
    """Squared factors of each token in each bag; a token that comes twice counts with the sum of its factors."""
    ids = torch.tensor([[0, 1, 1, 4], [2, 0, 3, 3], [4, 4, 4, 4]])
    layer = nn.EmbeddingBag(6, 5, mode=mode, include_last_offset=form == "last_offset")
    offsets = {"matrix": None, "offsets": torch.tensor([0, 4, 8]), "last_offset": torch.tensor([0, 4, 8, 12])}[form]

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) if offsets is None else self.layer(x.reshape(-1), offsets=offsets)

    with workers() as pool:
        model = Bag()
        found = collect(model, [ids], plan_model(model), run_batch, pool, "mse", cross_validate=False).layers["layer.weight"]
    factors = torch.nn.functional.one_hot(ids, 6).sum(1).double() / (4 if mode == "mean" else 1)
    np.testing.assert_allclose(shape_of(found.output_moment[0]), shape_of((factors**2).sum(0).numpy()), rtol=1e-6)
    direction = signs((3, 5)).double()
    np.testing.assert_allclose(found.input_moment[0], (direction.T @ direction).numpy() / 3, rtol=1e-6)


def test_weighted_bags_and_sparse_gradients():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.table = nn.EmbeddingBag(6, 5, mode="sum", sparse=True), nn.Embedding(6, 5, sparse=True)

        def forward(self, x):
            return self.layer(x, per_sample_weights=torch.tensor([1.0, 2.0, 3.0]).expand(len(x), 3)) + self.table(x[:, 0])

    model = Bag()
    ids = torch.tensor([[0, 1, 2], [2, 2, 3]])
    with workers() as pool:
        stats = collect(model, [ids], plan_model(model), run_batch, pool, "mse", cross_validate=False).layers
    np.testing.assert_allclose(shape_of(stats["layer.weight"].output_moment[0]), np.array([1, 4, 9 + 9, 9, 0, 0]) / 18)
    assert stats["table.weight"].gradient_energy > 0


# ------------------------------------------------------------------------------------------------------ replayed layers


class Sink(dict):
    """Moments for every weight of a module, made when it asks."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        specs = {s.attribute: s for s in plan_model(module).specs if hasattr(s, "kind")}
        shapes = moment_shapes(list(specs.values()), 8192, 1 << 30)
        self.update({a: Moments(s, shapes[s.name]) for a, s in specs.items()})


def assert_same(module, kind, call, x):
    """Outputs and gradients of inputs and parameters are the module's own, and the module is itself again afterwards."""
    tensors = [t.requires_grad_() for t in x] + list(module.parameters())
    results, gradients = [], []
    for replayed in (False, True):
        handles = attach(kind, module, Sink(module)) if replayed else []
        outputs = [t for t in flattened(call(module)) if t is not None]
        assert ("forward" in vars(module)) == replayed
        generator = torch.Generator().manual_seed(0)
        total = sum((t * torch.randn(t.shape, generator=generator)).sum() for t in outputs)
        gradients.append(torch.autograd.grad(total, tensors, allow_unused=True))
        results.append(outputs)
        for handle in handles:
            handle.remove()
    assert "forward" not in vars(module)
    for one, two in zip(results[0], results[1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    for one, two in zip(*gradients, strict=True):
        if one is not None or two is not None:
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def flattened(value):
    return [t for v in value for t in flattened(v)] if isinstance(value, tuple) else [value]


RECURRENT = [
    (kind, options)
    for kind in (nn.LSTM, nn.GRU, nn.RNN)
    for options in (
        {}, {"num_layers": 3}, {"bidirectional": True}, {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5},
        {"bias": False}, {"batch_first": True},
    )
] + [
    (nn.LSTM, {"proj_size": 3}), (nn.LSTM, {"proj_size": 3, "num_layers": 2, "bidirectional": True, "bias": False}),
    (nn.RNN, {"nonlinearity": "relu"}),
]  # fmt: skip


@pytest.mark.parametrize("start", ["zeros", "given"])
@pytest.mark.parametrize("single", [False, True], ids=["batch", "single"])
@pytest.mark.parametrize(("kind", "options"), RECURRENT, ids=str)
def test_replayed_recurrent_layers(kind, options, single, start):
    torch.manual_seed(0)
    module = kind(5, 4, **options).eval()
    x = torch.randn(*((6,) if single else ((3, 6) if module.batch_first else (6, 3))), 5)
    hx = None
    if start == "given":
        count = module.num_layers * (1 + module.bidirectional)
        states = [torch.randn(*((count,) if single else (count, 3)), w) for w in (module.proj_size or 4, 4)]
        hx = tuple(states) if kind is nn.LSTM else states[0]
    assert_same(module, "recurrent", lambda m: m(x, hx), [x])


@pytest.mark.parametrize("start", ["zeros", "given"])
@pytest.mark.parametrize("single", [False, True], ids=["batch", "single"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_replayed_cells(kind, bias, single, start):
    torch.manual_seed(0)
    module = kind(5, 4, bias=bias)
    lead = () if single else (3,)
    x, states = torch.randn(*lead, 5), (torch.randn(*lead, 4), torch.randn(*lead, 4))
    hx = None if start == "zeros" else (states if kind is nn.LSTMCell else states[0])
    assert_same(module, "recurrent_cell", lambda m: m(x, hx), [x])


@pytest.mark.parametrize("form", ["self", "masks", "causal", "float_mask", "weights", "heads", "single"])
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True, "batch_first": True},
     {"kdim": 6, "vdim": 7}, {"kdim": 6, "vdim": 7, "add_bias_kv": True, "batch_first": True, "add_zero_attn": True}, {"dropout": 0.3}],
    ids=str,
)  # fmt: skip
def test_replayed_attention(options, form):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, **options).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
    first, single = module.batch_first, form == "single"

    def sequence(length, width):
        return torch.randn(*((length,) if single else ((3, length) if first else (length, 3))), width)

    query = sequence(5, 8)
    same = module._qkv_same_embed_dim and form == "self"
    key, value = (query, query) if same else (sequence(5, module.kdim), sequence(5, module.vdim))
    masks = {
        "masks": {"key_padding_mask": torch.arange(5)[None] > torch.tensor([[4], [2], [3]]), "attn_mask": torch.eye(5).bool()},
        "causal": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(5), "is_causal": True, "need_weights": False},
        "float_mask": {"attn_mask": torch.randn(5, 5)}, "weights": {"need_weights": False}, "heads": {"average_attn_weights": False},
    }.get(form, {})  # fmt: skip
    assert_same(module, "attention", lambda m: m(query, key, value, **masks), [query] if same else [query, key, value])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_moments_of_recurrent_layers(kind):
    """One sample, and a layer of its own for each step: gradients of its biases are those of the gates."""
    torch.manual_seed(0)
    layer, x = kind(3, 4, batch_first=True), torch.randn(1, 5, 3)
    found = statistics(copy.deepcopy(layer), x)
    steps = [copy.deepcopy(layer) for _ in range(5)]
    state, outputs, before = None, [], [torch.zeros(4)]
    for step, part in zip(steps, x.split(1, 1), strict=True):
        y, state = step(part, state)
        outputs.append(y)
        before.append(y[0, 0].detach())
    output = torch.cat(outputs, 1)
    (output * signs(output.shape)).sum().backward()
    expected = {
        "ih": (x[0], torch.stack([s.bias_ih_l0.grad for s in steps])),
        "hh": (torch.stack(before[:-1]), torch.stack([s.bias_hh_l0.grad for s in steps])),
    }
    for name, (columns, rows) in expected.items():
        stats = found[f"layer.weight_{name}_l0"]
        np.testing.assert_allclose(stats.input_moment[0], (columns.T @ columns).numpy() / 5, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(shape_of(stats.output_moment[0]), shape_of((rows.T @ rows).numpy()), rtol=1e-4, atol=1e-6)


def test_moments_of_attention():
    """One query that looks at four one-hot keys and values: the weights' gradients have the projections' in their columns."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(4, 2, batch_first=True)
    query, key, value = torch.randn(1, 1, 4), torch.eye(4)[None] * 2, torch.eye(4)[None] * 3
    sinks = Sink(module)
    handles = attach("attention", module, sinks)
    module(query, key, value)[0].sum().backward()
    for handle in handles:
        handle.remove()
    found, gradients = sinks["in_proj_weight"], module.in_proj_weight.grad.chunk(3)
    torch.testing.assert_close(found.positions, torch.tensor([1, 4, 4], dtype=torch.float64))
    for k, x in enumerate((query, key, value)):
        torch.testing.assert_close(found.columns[k], (x[0].T @ x[0]).double())
        # ∇W = Σ g xᵀ: with one x its multiple gives g, with orthogonal ones of length 2 or 3 the columns do
        rows = (gradients[0] @ query[0, 0])[:, None] / query.square().sum() if k == 0 else gradients[k] / (k + 1)
        torch.testing.assert_close(found.rows[k], (rows @ rows.T).double(), rtol=1e-4, atol=1e-6)


def test_groups_of_attention_have_scales_of_their_own():
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=True)

    class Self(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = module

        def forward(self, x):
            return self.layer(x, x, x)[0]

    x = torch.randn(40, 5, 8)
    with workers() as pool:
        model = Self()
        stats = collect(model, [x], plan_model(model), run_batch, pool, "mse", cross_validate=False).layers["layer.in_proj_weight"]
    (gradient,) = torch.autograd.grad((model(x) * signs((40, 5, 8))).sum(), [module.in_proj_weight])
    energies = gradient.reshape(3, -1).square().sum(1).double().numpy() / 40 / 40  # a sample; forty output values
    traces = np.einsum("kii->k", stats.input_moment) * np.einsum("kii->k", stats.output_moment)
    np.testing.assert_allclose(traces, energies, rtol=1e-4)


def test_large_new_layers_keep_to_the_limits():
    for layer in (nn.LSTM(600, 300, 2), nn.MultiheadAttention(500, 5), nn.ConvTranspose2d(64, 128, 5), nn.EmbeddingBag(3000, 64)):
        specs = [s for s in plan_model(layer).specs if hasattr(s, "kind")]
        full = sum(s.num_bytes for s in moment_shapes(specs, 8192, 1 << 40).values())
        for limit in (full // 3, full // 20, 1):
            shapes = moment_shapes(specs, 8192, limit).values()
            diagonal = all(s.blocks == 0 and not s.full_output for s in shapes)
            assert diagonal or sum(s.num_bytes for s in shapes) <= limit
    torch.manual_seed(0)
    layer, x = nn.LSTM(32, 48, batch_first=True), torch.randn(6, 5, 32)
    with workers() as pool:
        model = Alone(layer)
        stats = collect(model, [x], plan_model(model), run_batch, pool, "mse", cross_validate=False, max_side=20).layers
        whole = collect(model, [x], plan_model(model), run_batch, pool, "mse", cross_validate=False).layers
    assert stats["layer.weight_ih_l0"].input_moment.shape == (1, 2, 16, 16)
    assert stats["layer.weight_ih_l0"].output_moment.shape == (1, 192)
    np.testing.assert_allclose(
        stats["layer.weight_ih_l0"].output_moment[0], np.diag(whole["layer.weight_ih_l0"].output_moment[0]), rtol=1e-5
    )
