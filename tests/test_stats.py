from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from transquant.errors import InputError
from transquant.modules import micro_batches, plan_model, run_batch
from transquant.records import BatchNormSpec, VectorSpec, WeightSpec
from transquant.stats import Reference, collect, weight_statistics
from transquant.stats.moments import Shape, moment_shapes
from transquant.stats.sums import both
from transquant.workers import workers


def statistics(model, images, metric="auto", cross_validate=False, **options):
    """Sample moments, so that they can be compared with brute force."""
    with workers() as pool:
        return collect(
            model,
            list(micro_batches([images])),
            plan_model(model),
            run_batch,
            pool,
            metric,
            cross_validate=cross_validate,
            **options,
        )


LAYERS = [
    nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, (3, 1), stride=2, padding=(1, 0), bias=False), nn.Conv2d(4, 6, 3, dilation=2, padding="same"),
    nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.Conv2d(4, 4, 3, groups=4, padding=1), nn.Conv2d(4, 6, 2, padding=1, padding_mode="reflect"),
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_moments_of_convolutions_equal_brute_force(layer):
    """One sample a micro-batch makes the direction known: ∇W = Σ_t g_t x_tᵀ by autograd must have the moments' trace."""
    torch.manual_seed(3)
    model = nn.Sequential(copy.deepcopy(layer), nn.Flatten(), nn.LazyLinear(5)).eval()
    images = torch.randn(6, 4, 7, 7)
    model(images)
    stats = statistics(model, images, "mse")
    found = stats.layers["0.weight"]
    conv, weight = model[0], model[0].weight.detach()
    rows = weight.shape[0] // conv.groups
    # every patch through the layer with unit weights gives x back
    unit = torch.zeros(weight[0].numel(), *weight.shape[1:])
    unit.view(len(unit), -1).fill_diagonal_(1)
    for k in range(conv.groups):
        probe = copy.deepcopy(conv)
        probe.groups, probe.bias = 1, None
        probe.weight = nn.Parameter(unit)
        part = images[:, k * weight.shape[1] : (k + 1) * weight.shape[1]]
        patches = probe(part).detach().permute(1, 0, 2, 3).flatten(1).double()
        np.testing.assert_allclose(found.input_moment[k], patches @ patches.T / patches.shape[1], rtol=1e-4, atol=1e-5)
    assert found.output_moment.shape == (conv.groups, rows, rows)
    traces = sum(np.trace(found.input_moment[k]) * np.trace(found.output_moment[k]) for k in range(conv.groups))
    assert traces == pytest.approx(found.gradient_energy / 5, rel=1e-6)  # mse: a fifth for five output values


@pytest.mark.parametrize("metric", ["kl", "mse"])
def test_predicted_distortion_is_the_measured_one(net, metric):
    """White errors in one layer at a time: ½ E(∇·Δ)² against the KL divergence, and the same for MSE.

    Right within the standard error of the scale: not off by the ½ of the KL, by a number of samples, or of positions."""
    generator = torch.Generator().manual_seed(0)
    plan = plan_model(net)
    many = torch.randn(1280, 3, 12, 12, generator=generator)
    stats = statistics(net, many, metric)
    with workers() as pool:
        reference = Reference(net, list(micro_batches([many[:320]])), run_batch, pool, metric)
        for spec in plan.specs:
            if not isinstance(spec, WeightSpec):
                continue
            layer = stats.layers[spec.name]
            predicted = measured = 0.0
            weight = net.state_dict()[spec.name]
            for _ in range(48):
                error = torch.randn(weight.shape, generator=generator) * 0.02 * weight.std()
                matrix = error.double().reshape(spec.groups, -1, weight[0].numel()).numpy()
                predicted += np.einsum("kpo,kon,knm,kpm->", layer.output_moment, matrix, layer.input_moment, matrix)
                measured += reference.distortion({spec.name: weight + error})
            tolerance = 0.15 + 3 * layer.gradient_energy_error
            assert layer.gradient_energy_error < 0.25
            assert predicted / measured == pytest.approx(1, abs=tolerance), spec.name


def test_reference_forgets_the_weights_tried_before(net, images):
    with workers() as pool:
        reference = Reference(net, list(micro_batches([images])), run_batch, pool, "mse")
        assert reference.distortion({}) == 0
        assert reference.distortion({"linear.bias": net.linear.bias.detach() + 1}) == pytest.approx(1, rel=1e-5)
        assert reference.distortion({}) == 0


def test_vector_sensitivities_by_finite_differences(net, images):
    stats = statistics(net, images, "mse", seed=5)
    generator = torch.Generator().manual_seed(0)
    plan = plan_model(net)
    batches = list(micro_batches([images]))
    net = net.double()
    state = net.state_dict()

    def outputs(changed):
        twin = copy.deepcopy(net)
        twin.load_state_dict({**state, **changed})
        return torch.cat([twin(b.double()) for b in batches]).detach()

    base = outputs({})
    for spec in plan.specs:
        if isinstance(spec, VectorSpec):
            key = spec.name
            delta = 1e-4 * torch.randn(state[key].shape, generator=generator, dtype=torch.float64)
            changes = [({key: state[key] + s * delta}, stats.vectors[key]) for s in (1,)]
        elif isinstance(spec, BatchNormSpec):
            deviation = (state["bn.running_var"] + spec.eps).sqrt()
            delta = 1e-4 * torch.randn(16, generator=generator, dtype=torch.float64)
            # scale s → s + δ at fixed shift t = β − μ s: γ grows by δ·√(σ²+eps), β by μ·δ
            by_scale = {
                "bn.weight": state["bn.weight"] + delta * deviation,
                "bn.bias": state["bn.bias"] + delta * state["bn.running_mean"],
            }
            changes = [(by_scale, stats.vectors["bn.weight"]), ({"bn.bias": state["bn.bias"] + delta}, stats.vectors["bn.bias"])]
        else:
            continue
        for changed, sensitivity in changes:
            measured = float(((outputs(changed) - base) ** 2).mean())
            predicted = float((torch.from_numpy(sensitivity) * delta**2).sum())
            assert 0.25 < predicted / measured < 4, (spec.name, predicted / measured)  # few draws, and entries correlate


def test_embedding_linear_and_repeated_calls():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.mix, self.head = nn.Embedding(9, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 9)

        def forward(self, ids):
            return self.head(self.mix(torch.tanh(self.mix(self.embedding(ids)))))

    torch.manual_seed(0)
    model = Words().eval()
    ids = torch.randint(0, 7, (40, 6))
    stats = statistics(model, ids)
    assert stats.metric == "kl"
    embedding = stats.layers["embedding.weight"]
    assert embedding.output_moment.shape == (1, 9)
    assert embedding.input_moment.shape == (1, 4, 4)
    counts = torch.bincount(ids.reshape(-1), minlength=9).double().numpy()
    np.testing.assert_allclose(embedding.output_moment[0] / embedding.output_moment.sum(), counts / counts.sum())
    with torch.no_grad():
        first = model.embedding(ids)
        second = torch.tanh(model.mix(first))
        both = torch.cat([first, second]).reshape(-1, 4).double()
    np.testing.assert_allclose(stats.layers["mix.weight"].input_moment[0], both.T @ both / len(both), rtol=1e-5)


def test_result_does_not_depend_on_threads_or_batches(net, images):
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(statistics(net, images, cross_validate=True))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    for other in results[1:]:
        for name, layer in results[0].layers.items():
            np.testing.assert_array_equal(layer.input_moment, other.layers[name].input_moment)
            np.testing.assert_array_equal(layer.output_moment, other.layers[name].output_moment)
        for name, vector in results[0].vectors.items():
            np.testing.assert_array_equal(vector, other.vectors[name])


def test_large_sides_become_blocks_then_diagonals(net, images):
    full = statistics(net, images)
    blocks = statistics(net, images, max_side=20)
    a, b = full.layers["linear.weight"], blocks.layers["linear.weight"]
    assert b.input_moment.shape == (1, 2, 16, 16)
    np.testing.assert_allclose(b.input_moment[0, 1], a.input_moment[0, 16:, 16:])
    assert blocks.layers["conv.weight"].input_moment.shape == (1, 27)  # 27 columns have no blocks of 16 to 20
    np.testing.assert_allclose(
        blocks.layers["conv.weight"].input_moment[0], np.diag(full.layers["conv.weight"].input_moment[0]), rtol=1e-5
    )
    scale = {
        n: np.einsum("kii->k", s.output_moment).sum() if s.output_moment.ndim == 3 else s.output_moment.sum()
        for n, s in blocks.layers.items()
    }
    assert all(v > 0 for v in scale.values())
    spec = WeightSpec("w", "w", "linear", (1000, 5000), "float32")
    for limit in (1 << 30, 100 << 20, 10 << 20, 1 << 20, 50_000, 1):
        (shape,) = moment_shapes([spec], 8192, limit).values()
        assert shape.num_bytes <= limit or shape == Shape(1, 1000, 5000, 0, False)


def test_weights_as_the_metric(net):
    from transquant.modules import gather

    plan = plan_model(net)
    values, _ = gather(plan, net.state_dict())
    stats = weight_statistics(plan, values)
    names = [s.name for s in plan.specs if isinstance(s, WeightSpec)]
    predicted = sum(np.sum((0.1 * values[n]) ** 2 * stats.layers[n].output_moment[0][:, None]) for n in names)
    assert predicted == pytest.approx(0.01)
    count = sum(values[n].size for n in names)
    error = 0.1 * values["conv.bias"]
    assert np.sum(error**2 * stats.vectors["conv.bias"]) == pytest.approx(0.01 * 256 * 16 / count)


def test_failures_say_what_is_wrong(net, images):
    with pytest.raises(InputError, match=r"\(8, 3\)"):
        statistics(net, torch.randn(40, 3))
    with pytest.raises(InputError, match="metric 'kl'"):
        statistics(nn.Conv2d(3, 2, 3), images, "kl")
    net.handle = (k for k in range(3))  # generators cannot be copied
    with pytest.raises(InputError, match="cannot be copied"):
        statistics(net, images)


def test_tied_weights_take_the_moments_of_all_their_users():
    class Tied(nn.Module):
        def __init__(self, second):
            super().__init__()
            self.embedding, self.one, self.two = nn.Embedding(9, 4), nn.Linear(4, 4), second
            self.two.weight = self.one.weight
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.two(torch.tanh(self.one(self.embedding(ids)))))

    torch.manual_seed(0)
    model = Tied(nn.Linear(4, 4)).eval()
    ids = torch.randint(0, 9, (40, 6))
    stats = statistics(model, ids)
    with torch.no_grad():
        first = model.embedding(ids)
        second = torch.tanh(model.one(first))
        both = torch.cat([first, second]).reshape(-1, 4).double()
        last = model.two(second).reshape(-1, 4).double()
    np.testing.assert_allclose(stats.layers["one.weight"].input_moment[0], both.T @ both / len(both), rtol=1e-5)
    # an embedding that is the output layer too has the moments of both uses, as layers of their own would have them
    alone = Tied(nn.Linear(4, 4)).eval()
    alone.head.weight = nn.Parameter(model.embedding.weight.detach().clone())
    alone.load_state_dict(model.state_dict())
    apart = statistics(alone, ids).layers
    embedding, head, found = apart["embedding.weight"], apart["head.weight"], stats.layers["embedding.weight"]
    assert found.output_moment.shape == (1, 9, 9)
    for one, two, sum_of_both in (
        (head.input_moment[0], embedding.input_moment[0], found.input_moment[0]),
        (head.output_moment[0], np.diag(embedding.output_moment[0]), found.output_moment[0]),
    ):
        parts = np.stack([one.ravel() / np.trace(one), two.ravel() / np.trace(two)], 1)
        shares, *_ = np.linalg.lstsq(parts, sum_of_both.ravel() / np.trace(sum_of_both))
        assert shares.min() > 0.1
        assert shares.sum() == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(parts @ shares * np.trace(sum_of_both), sum_of_both.ravel(), rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(head.input_moment[0], last.T @ last / len(last), rtol=1e-5)


def test_one_product_for_two_uses():
    """The trace of both, and no less than the share of either: in every form that moments take."""
    generator = np.random.default_rng(0)

    def moment(*shape):
        root = generator.standard_normal(shape)
        return root @ np.swapaxes(root, -1, -2)

    def full(m):
        (m,) = m
        return np.diag(m) if m.ndim == 1 else m if m.ndim == 2 else np.asarray(torch.block_diag(*torch.from_numpy(m)))

    forms = (moment(1, 8, 8), moment(1, 2, 4, 4), generator.random((1, 8)))
    for a, b in itertools.product(forms, forms):
        g, h = moment(1, 5, 5), generator.random((1, 5))
        columns, rows = both(a, g, b, h)
        cost = np.trace(full(a)) * np.trace(full(g)) + np.trace(full(b)) * np.trace(full(h))
        assert np.trace(full(columns)) * np.trace(full(rows)) == pytest.approx(cost)
        share = np.trace(full(a)) * np.trace(full(g)) / cost
        if a.ndim == b.ndim or min(a.ndim, b.ndim) == 2:
            least = full(columns) / np.trace(full(columns)) - share * full(a) / np.trace(full(a))
            assert np.linalg.eigvalsh(least).min() > -1e-12
