"""Models that are not as tame as the one in conftest: tied, routed, functional, without gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import transquant as tq


def measured(model, samples, **options):
    """(what the report says, what the decoded network does) on the same samples."""
    compressed = tq.compress(model, samples, **options)
    with torch.no_grad():
        p, q = (m(samples).flatten(0, -2).log_softmax(-1) for m in (model, compressed.install(copy.deepcopy(model))))
    return compressed.report.measured_distortion, float((p.exp() * (p - q)).sum(1).mean())


def test_measured_distortion_of_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.mix, self.head = nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 64, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(torch.relu(self.mix(self.embedding(ids))))

    torch.manual_seed(0)
    said, true = measured(Tied().eval(), torch.randint(0, 64, (320, 8)), bits=3.0, effort=1)
    assert said == pytest.approx(true, rel=0.3)


@pytest.mark.parametrize("shared", ["weight", "bias", "running_mean", "running_var"])
def test_batchnorms_that_share_a_vector(shared):
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.one, self.two, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, 10)
            for norm in (self.one, self.two):
                norm.running_mean.uniform_(-1, 1)
                norm.running_var.uniform_(0.2, 3)
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.uniform_(norm.bias, -1, 1)
            setattr(self.two, shared, getattr(self.one, shared))

        def forward(self, x):
            x = self.conv(x)
            return self.head((torch.relu(self.one(x)) + torch.relu(self.two(x / 2))).mean((2, 3)))

    torch.manual_seed(0)
    model, images = Twins().eval(), torch.randn(64, 3, 8, 8)
    decoded = tq.compress(model, images, step=1e-6).install(copy.deepcopy(model))
    with torch.no_grad():
        torch.testing.assert_close(decoded(images), model(images), rtol=1e-3, atol=1e-3)


def test_weights_that_a_function_uses_are_measured():
    """Attention hands its projection to a function: no call of the module, but a gradient."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(16, 8)).eval()
    compressed = tq.compress(model, torch.randn(160, 5, 16), step=1e-4)
    rows = {r.name: r for r in compressed.report.layers}
    projection = rows["0.self_attn.out_proj.weight"]
    assert projection.distortion_share > 0
    assert projection.step < 0.1 * float(layer.self_attn.out_proj.weight.std())


class Routed(nn.Module):
    """The second branch gets no samples; the first gets single vectors."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        first = torch.stack([self.one(v) for v in x])
        return self.head(first) + self.head(self.two(x[:0])).sum()


def test_empty_and_single_inputs_of_layers():
    torch.manual_seed(0)
    said, true = measured(Routed().eval(), torch.randn(320, 16), bits=8.0, effort=1)
    assert said == pytest.approx(true, rel=0.6)


def test_inference_mode_of_the_caller(small, samples):
    with torch.inference_mode():
        inside = tq.compress(small, samples + 0, bits=5.0, effort=1).data
    assert inside == tq.compress(small, samples, bits=5.0, effort=1).data


class NoGradient(nn.Linear):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class NaNGradient(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return (y * 0).norm(dim=1, keepdim=True).sqrt() + y


@pytest.mark.parametrize(("model", "message"), [(NoGradient(4, 3), "no gradient"), (NaNGradient(4, 3), "gradient of '.*' has NaN")])
def test_gradients_that_say_nothing(model, message):
    with pytest.raises(tq.errors.InputError, match=message):
        tq.compress(model.eval(), torch.randn(20, 4), step=0.01)


def test_biases_that_two_layers_share():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 8)
            self.two.bias = self.one.bias

        def forward(self, x):
            return self.head(torch.relu(self.one(x)) + torch.relu(self.two(x + 2)))

    torch.manual_seed(0)
    samples = torch.randn(320, 16) + 1
    compressed = tq.compress(Shared().eval(), samples, bits=8.0, effort=1)
    assert compressed.report.predicted_distortion == pytest.approx(compressed.report.measured_distortion, rel=0.7)


@pytest.mark.parametrize(
    "samples", [torch.randn(1, 3, 12, 12), torch.zeros(50, 3, 12, 12), torch.ones(50, 3, 12, 12)], ids=["one", "zeros", "equal"]
)
def test_samples_that_say_little(small, samples):
    data = tq.compress(small, samples, bits=6.0).data
    assert len(data) <= 6 * sum(p.numel() for p in small.parameters()) / 8


def test_every_file_that_is_written_can_be_read(small, samples):
    for options in ({"step": 1e-40}, {"bits": 26.0}, {"step": 1e30}, {"bits": 28.0, "effort": 1}):
        compressed = tq.compress(small, samples, **options)
        assert list(compressed.state_dict()) == list(small.state_dict())
        assert list(tq.reader.loads(compressed.data)) == list(small.state_dict())


def test_dead_layers_do_not_stand_in_the_way_of_a_size():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 200), nn.ReLU(), nn.Linear(200, 10)).eval()
    model[0].idle = nn.Linear(100, 100)  # never called
    nn.init.constant_(model[0].bias, -100)  # and a layer whose outputs are all zero
    target = sum(p.numel() for p in model.parameters()) // 8
    assert len(tq.compress(model, torch.randn(200, 16), size=target).data) <= target


def test_few_weights_and_large_vectors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.BatchNorm1d(512), nn.ReLU()).eval()
    tq.compress(model, torch.randn(100, 1, 16, 32), bits=4.0)


def test_inputs_of_several_tensors_through_forward():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(16, 8), nn.Linear(4, 8)

        def forward(self, x, y):
            return self.one(x) + self.two(y)

    torch.manual_seed(0)
    batches = [(torch.randn(20, 16), torch.randn(20, 4)) for _ in range(8)]
    report = tq.compress(Two().eval(), batches, bits=10.0, forward=lambda m, b: m(*b)).report
    assert report.settings["samples"] == 140
    assert report.measured_distortion > 0


def test_batchnorms_can_be_stored_exactly(small, samples):
    compressed = tq.compress(small, samples, bits=12.0, overrides={"bn.*": "exact"})
    state = compressed.state_dict()
    assert list(state) == list(small.state_dict())
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(state[f"bn.{name}"], small.state_dict()[f"bn.{name}"])


def test_names_that_no_file_may_hold():
    for name in ("a\tb", "x" * 600, "", 7):
        with pytest.raises(tq.errors.InputError, match="printable text"):
            tq.compress({name: torch.randn(5, 5)}, step=0.01)


def test_limits_are_kept_from_load_to_install(tmp_path):
    layer = nn.Linear(2048, 2048, bias=False)
    nn.init.zeros_(layer.weight)
    tq.compress(layer, None, step=1.0).save(tmp_path / "zeros.tq")
    with pytest.raises(tq.errors.LimitExceeded):
        tq.load(tmp_path / "zeros.tq")
    loaded = tq.load(tmp_path / "zeros.tq", limits=tq.Limits(max_expansion=10**9))
    assert not loaded.install(nn.Linear(2048, 2048, bias=False)).weight.any()


def test_a_forward_that_belongs_to_another_object():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    layers = list(model)
    model.forward = lambda x: layers[2](torch.relu(layers[0](x)))  # a copy of the model still runs the original's layers
    with pytest.raises(tq.errors.InputError, match="reached no weight"):
        tq.compress(model, torch.randn(40, 4), step=0.01)
    assert all(p.grad is None for p in model.parameters())


def test_a_lone_last_sample_joins_the_others():
    from transquant.modules import micro_batches

    assert [len(b) for b in micro_batches([torch.zeros(193, 3)])] == [32, 32, 32, 32, 32, 33]
    assert [len(b) for b in micro_batches([torch.zeros(1, 3)])] == [1]
