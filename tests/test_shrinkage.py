from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from transquant.modules import micro_batches, plan_model, run_batch
from transquant.quantizers.metric import factor
from transquant.stats import collect, shrinkage
from transquant.stats.shrinkage import centre, cross_validated, mean_moment
from transquant.workers import workers


def folded(samples, count=4):
    """Sums and counts of every fourth sample (g = 1)."""
    parts = [samples[k::count] for k in range(count)]
    return [(p.T @ p)[None] for p in parts], [torch.tensor([float(len(p))], dtype=torch.float64) for p in parts]


def covariance(side, condition, generator):
    basis, _ = torch.linalg.qr(torch.randn(side, side, generator=generator, dtype=torch.float64))
    return (basis * torch.logspace(0, np.log10(condition), side, dtype=torch.float64)) @ basis.T


@pytest.mark.parametrize(("side", "count", "condition"), [(40, 60, 10.0), (40, 200, 10.0), (80, 50, 100.0), (200, 160, 1000.0)])
def test_feedback_under_it_costs_less_of_the_true_metric(side, count, condition):
    """Steps and errors shaped by an estimate S cost tr(S⁻¹ A) / n, and log det S / n in rate: Stein's loss of the truth A."""
    generator = torch.Generator().manual_seed(side + count)
    truth = covariance(side, condition, generator)
    root = torch.linalg.cholesky(truth)
    losses = {"sample": [], "cross": []}
    for _ in range(5):
        samples = torch.randn(count, side, generator=generator, dtype=torch.float64) @ root.T
        sums, counts = folded(samples)
        for name, estimate in (("sample", mean_moment(sums, counts)), ("cross", cross_validated(sums, counts))):
            shaped = estimate[0] + 1e-3 * torch.trace(estimate[0]) / side * torch.eye(side, dtype=torch.float64)
            mean = torch.trace(torch.linalg.solve(shaped, truth)) / side
            losses[name].append(float(mean.log() + (torch.logdet(shaped) - torch.logdet(truth)) / side))
    assert np.mean(losses["cross"]) < 0.8 * np.mean(losses["sample"])


def test_trace_and_limit():
    """The trace is the sample moment's; with many samples so is the whole."""
    generator = torch.Generator().manual_seed(0)
    root = torch.linalg.cholesky(covariance(12, 50.0, generator))
    sums, counts = folded(torch.randn(400_001, 12, generator=generator, dtype=torch.float64) @ root.T)
    estimate, sample = cross_validated(sums, counts), mean_moment(sums, counts)
    assert float(torch.trace(estimate[0])) == pytest.approx(float(torch.trace(sample[0])))
    assert float((estimate - sample).norm() / sample.norm()) < 0.01


def test_where_there_is_nothing_to_compare(monkeypatch):
    sums, counts = folded(torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    only = sums[:1], counts[:1]
    torch.testing.assert_close(cross_validated(*only), sums[0] / counts[0])
    diagonal = [s.diagonal(dim1=1, dim2=2) for s in sums]
    torch.testing.assert_close(cross_validated(diagonal, counts), mean_moment(diagonal, counts))
    empty = [*counts[:3], torch.zeros(1, dtype=torch.float64)]
    torch.testing.assert_close(cross_validated([*sums[:3], 0 * sums[3]], empty), mean_moment(sums[:3], counts[:3]))
    monkeypatch.setattr(shrinkage, "MAX_SIDE", 5)
    torch.testing.assert_close(cross_validated(sums, counts), mean_moment(sums, counts))


def test_centring_of_sums():
    x = torch.randn(3, 5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 2  # g, n, positions
    mean = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    centred = x - mean[..., None]
    count = torch.full((3,), 40.0, dtype=torch.float64)
    found = x @ x.transpose(1, 2)
    centre(found, x.sum(2), count, mean)
    torch.testing.assert_close(found, centred @ centred.transpose(1, 2))


def test_statistics_keep_traces_and_means():
    """The white error's cost is E‖∇W‖² with either estimate, and small eigenvalues are no longer too small."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(24, 30), nn.ReLU(), nn.Linear(30, 6)).eval()
    batches = list(micro_batches([torch.randn(64, 24) + 1]))
    with workers() as pool:
        sample, cross = (
            collect(model, batches, plan_model(model), run_batch, pool, cross_validate=s).layers for s in (False, True)
        )
    for name in sample:
        a, b = sample[name], cross[name]
        cost = [np.trace(x.input_moment[0]) * np.trace(x.output_moment[0]) for x in (a, b)]
        assert cost[0] == pytest.approx(cost[1])
        np.testing.assert_allclose(a.input_mean, b.input_mean)
    mean_log = [np.log(factor(x["2.weight"].output_moment[0] + 1e-9 * np.eye(6)).diagonal).mean() for x in (sample, cross)]
    assert mean_log[1] > mean_log[0]
