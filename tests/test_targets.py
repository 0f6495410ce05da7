"""Every kind of target: met, not wasted, or refused with what can be reached."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import transquant as tq


def saved(compressed, folder):
    path = folder / "net.tq"
    compressed.save(path)
    return path


def window(target):
    return target - max(0.01 * target, 64), target


def test_bits_counts_the_whole_file(small, samples, tmp_path):
    parameters = sum(p.numel() for p in small.parameters())
    for bits in (3.5, 8.0):
        low, high = window(bits * parameters / 8)
        size = saved(tq.compress(small, samples, bits=bits), tmp_path).stat().st_size
        assert low - 1 <= size <= high


@pytest.mark.parametrize(("size", "target"), [(1500, 1500), ("1.5KB", 1500), ("1.5KiB", 1536), ("2000", 2000)])
def test_size(small, size, target, tmp_path):
    low, high = window(target)
    assert low <= saved(tq.compress(small, None, size=size), tmp_path).stat().st_size <= high


def test_ratio_counts_buffers(small, samples):
    original = sum(t.numel() * t.element_size() for t in small.state_dict().values())
    low, high = window(original / 6)
    compressed = tq.compress(small, samples, ratio=6)
    assert low - 1 <= len(compressed.data) <= high
    assert compressed.report.original_bytes == original
    assert compressed.report.compression_ratio >= 6


def test_size_window_on_a_larger_network(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 10)).eval()
    data = torch.randn(100, 300)
    for bits in (0.7, 1.5, 5.0):
        target = bits * sum(p.numel() for p in model.parameters()) / 8
        size = saved(tq.compress(model, data, bits=bits), tmp_path).stat().st_size
        assert 0.99 * target - 1 <= size <= target


@pytest.mark.parametrize("size", [2265, 2318, 2371, 2477, 2530])
def test_step_indices_that_move_with_c_leave_no_gap(size):
    """One layer has nearly all the weights: where its step index jumps, so does the size, here from 2,191 to 2,373 bytes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 10)).eval()
    assert size - 64 <= len(tq.compress(model, torch.randn(100, 300), size=size, effort=1).data) <= size


def test_distortion_is_kept_and_not_wasted(small, samples):
    found = tq.compress(small, samples, distortion=0.05)
    assert 0.02 <= found.report.measured_distortion <= 0.05
    weights = tq.compress(small, None, distortion=0.01).report
    assert weights.metric == "weights"
    assert 0.005 <= weights.predicted_distortion <= 0.01


def test_step_is_used_as_it_is(small, samples):
    one, two = tq.compress(small, samples, step=1e-3), tq.compress(small, samples, step=2e-3)
    assert one.report.settings["c"] == pytest.approx(1e-3, rel=1e-3)
    steps = [{r.name: r.step for r in c.report.layers if r.step} for c in (one, two)]  # saturates only at low rates
    assert all(steps[1][k] / v > 1.1 for k, v in steps[0].items())
    assert len(two.data) < len(one.data)


def test_max_drop_keeps_the_score(small, samples):
    with torch.no_grad():
        labels = small(samples).argmax(1)
    calls = []

    def agreement(model):
        assert not model.training
        calls.append(model)
        with torch.no_grad():
            return 100 * (model(samples).argmax(1) == labels).float().mean().item()

    found = tq.compress(small, samples, max_drop=(agreement, 5.0), effort=1)
    assert agreement(small) - agreement(found.install(copy.deepcopy(small))) <= 5.0
    assert len(found.data) < len(tq.compress(small, samples, step=found.report.settings["c"] / 4).data)
    assert all(m is not small for m in calls[:-2])
    with pytest.raises(tq.errors.InputError, match="evaluate returned 'good'"):
        tq.compress(small, samples, max_drop=(lambda m: "good", 1.0))


def test_unreachable_targets_say_what_is_reachable(small, samples):
    with pytest.raises(tq.errors.TargetError, match=r"10 bytes cannot be reached: the smallest takes \d+ bytes") as caught:
        tq.compress(small, samples, size=10)
    smallest = int(str(caught.value).split()[-2])
    assert len(tq.compress(small, samples, size=smallest + 100).data) <= smallest + 100
    with pytest.raises(tq.errors.TargetError, match="tensors take only"):
        tq.compress(small, samples, bits=40.0)
    with pytest.raises(tq.errors.TargetError):
        tq.compress(small, samples, ratio=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one target .* given: none"),
        ({"bits": 2, "size": 100}, "given: bits and size"),
        ({"bits": 0}, "bits is 0"),
        ({"bits": float("nan")}, "bits is nan"),
        ({"bits": "two"}, "bits is 'two'"),
        ({"size": "64 parsecs"}, "64 parsecs"),
        ({"size": -5}, "size is -5"),
        ({"ratio": True}, "ratio is True"),
        ({"max_drop": 1.0}, "pair"),
        ({"bits": 2, "metric": "psnr"}, "metric is 'psnr'"),
        ({"bits": 2, "transform": "wavelet"}, "transform is 'wavelet'"),
        ({"bits": 2, "axis": "rows"}, "axis is 'rows'"),
        ({"bits": 2, "transform": "dct", "axis": "input"}, "axis is 'input', allowed is 'kernel'"),
        ({"bits": 2, "coding": "huffman"}, "coding is 'huffman'"),
        ({"bits": 2, "coder": "fast"}, "coder is 'fast', allowed are 'adaptive', 'static'"),
        ({"bits": 2, "feedback": "yes"}, "feedback is 'yes'"),
        ({"bits": 2, "verify": True}, "verify needs calibration"),
        ({"bits": 2, "objective": "time"}, "objective is 'time'"),
        ({"bits": 2, "effort": 11}, "effort is 11"),
        ({"bits": 2, "overrides": {"nothing.*": "exact"}}, "matches no coded tensor"),
        ({"bits": 2, "overrides": {"linear.*": "smaller"}}, "'smaller'"),
        ({"bits": 2, "seed": "x"}, "seed is 'x'"),
    ],
)
def test_bad_options_are_named(small, samples, options, message):
    with pytest.raises(tq.errors.InputError, match=message):
        tq.compress(small, None if "verify" in options else samples, **options)


def test_effort_buys_states():
    """At the same size, more states leave less of an error; over two matrices, since sizes differ by up to a per cent."""
    errors = [0.0, 0.0, 0.0]
    for seed in (4, 5):
        weight = {"weight": torch.randn(160, 256, generator=torch.Generator().manual_seed(seed))}
        for k, effort in enumerate((5, 6, 9)):
            decoded = tq.compress(weight, bits=2.0, effort=effort).state_dict()["weight"]
            errors[k] += float((decoded - weight["weight"]).square().mean())
    assert errors[0] > 1.01 * errors[1] > 1.02 * errors[2]
