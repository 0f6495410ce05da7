from __future__ import annotations

import pytest
import torch
from torch import nn

from transquant.errors import InputError
from transquant.modules import apply_overrides, batches_of, gather, install, micro_batches, plan_model, plan_state_dict, run_batch
from transquant.records import AliasSpec, BatchNormSpec, RawSpec, WeightSpec


def kinds(plan):
    return {s.name: type(s).__name__ for s in plan.specs}


def test_plan_covers_every_key_once(net):
    plan = plan_model(net)
    names = []
    for spec in plan.specs:
        if isinstance(spec, BatchNormSpec):
            names += [spec.key(k) for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
        else:
            names.append(spec.name)
    assert names == list(net.state_dict())
    assert plan.num_parameters == sum(p.numel() for p in net.parameters())
    assert plan.original_bytes == sum(t.numel() * t.element_size() for t in net.state_dict().values())
    groups = {s.name: s.groups for s in plan.specs if isinstance(s, WeightSpec)}
    assert groups == {"conv.weight": 1, "depthwise.weight": 16, "grouped.weight": 4, "linear.weight": 1}


def test_tied_weights_and_shared_modules():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embedding.weight
            self.norm = nn.BatchNorm1d(6)
            self.again = self.norm

    model = Tied()
    plan = plan_model(model)
    aliases = {s.name: s.of for s in plan.specs if isinstance(s, AliasSpec)}
    assert aliases["head.weight"] == "embedding.weight"
    assert aliases["again.num_batches_tracked"] == "norm.num_batches_tracked"
    assert len(aliases) == 6
    assert plan.num_parameters == 66 + 12
    assert plan.original_bytes == 4 * 66 + 4 * 24 + 8


def test_what_is_exact():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)
            self.free = nn.Parameter(torch.zeros(3, 3))
            self.register_buffer("table", torch.arange(5))
            self.bare = nn.BatchNorm2d(3, affine=False)
            self.stateless = nn.BatchNorm2d(3, track_running_stats=False)
            self.empty = nn.Parameter(torch.zeros(0, 3))

    found = kinds(plan_model(Odd()))
    assert [k for k, v in found.items() if v == "RawSpec"] == [
        "free", "empty", "table", "bare.running_mean", "bare.running_var", "bare.num_batches_tracked"
    ]  # fmt: skip
    assert found["stateless.weight"] == "VectorSpec"
    assert kinds(plan_state_dict({"a": torch.ones(2, 2), "b": torch.ones(3)})) == {"a": "WeightSpec", "b": "RawSpec"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("text", "str"),
        (nn.ReLU(), "no weight to code"),
        (nn.Sequential(nn.LayerNorm(3)), "no weight to code"),
        (nn.LazyLinear(3), "not initialised"),
    ],
)
def test_bad_models(model, message):
    with pytest.raises(InputError, match=message):
        plan_model(model)


def test_bad_values():
    model = nn.Linear(3, 3)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="'weight' has NaN"):
        plan_model(model)
    with pytest.raises(InputError, match="only dense"):
        plan_state_dict({"a": torch.eye(3).to_sparse()})
    with pytest.raises(InputError, match="int"):
        plan_state_dict({"a": 3})


def test_batchnorm_equivalent_is_the_same_function(net):
    values, _ = gather(plan_model(net), net.state_dict())
    x = torch.randn(4, 16, 3, 3, dtype=torch.float64)
    expected = net.bn.double()(x)
    scale, shift = (torch.from_numpy(values[f"bn.{k}"])[None, :, None, None] for k in ("scale", "shift"))
    torch.testing.assert_close(scale * x + shift, expected)


def test_install_is_strict_and_changes_nothing_on_failure(net):
    state = {k: torch.zeros_like(v) for k, v in net.state_dict().items()}
    before = {k: v.clone() for k, v in net.state_dict().items()}
    wrong = dict(state)
    del wrong["conv.bias"]
    wrong["extra"] = torch.zeros(1)
    wrong["linear.weight"] = torch.zeros(2, 2)
    with pytest.raises(InputError, match=r"missing conv\.bias; unexpected extra; of another shape linear\.weight"):
        install(net, wrong)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert install(net, state) is net


def test_overrides(net):
    plan = apply_overrides(plan_model(net), {"linear.*": "exact"})
    assert [s.name for s in plan.specs if isinstance(s, RawSpec)] == ["linear.weight", "linear.bias"]
    for rules in ({"nothing*": "exact"}, {"conv.weight": 8}, {"*": "exact"}):
        with pytest.raises(InputError):
            apply_overrides(plan_model(net), rules)


def test_ways_to_run_a_batch():
    class Words(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.linear, self.wrap = nn.Linear(4, 3), wrap

        def forward(self, x, scale=1.0):
            return self.wrap(self.linear(x) * scale)

    x = torch.randn(5, 4)
    for wrap in (lambda y: y, lambda y: (y, 1), lambda y: {"logits": y}, lambda y: type("Out", (), {"logits": y})()):
        model = Words(wrap)
        for batch in (x, (x, torch.zeros(5)), [x], {"x": x, "scale": 1.0, "labels": x}):
            torch.testing.assert_close(run_batch(model, batch), model.linear(x))
    model = Words(lambda y: {"a": 1, "b": {"c": y}})
    with pytest.raises(InputError, match="pass output="):
        run_batch(model, x)
    torch.testing.assert_close(run_batch(model, x, output=lambda r: r["b"]["c"]), model.linear(x))
    torch.testing.assert_close(run_batch(model, 2, forward=lambda m, b: m.linear(x) * b), 2 * model.linear(x))
    with pytest.raises(InputError, match=r"\(5, 7\)"):
        run_batch(Words(lambda y: y), torch.randn(5, 7))
    with pytest.raises(InputError, match="NaN"):
        run_batch(Words(lambda y: y / 0), torch.zeros(5, 4))


def test_micro_batches_do_not_depend_on_the_users_batches():
    data = torch.randn(170, 3, 4, 4)
    one = list(micro_batches([data]))
    two = list(micro_batches(data.split(9)))
    assert [len(b) for b in one] == [32, 32, 32, 32, 32, 10]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    words = list(micro_batches([{"x": torch.zeros(40, 5), "m": torch.zeros(40)}]))
    assert [len(b["m"]) for b in words] == [32, 8]


@pytest.mark.parametrize(
    ("calibration", "message"), [([], "no batches"), (3, "int"), ([torch.full((2, 2), float("inf"))], "infinite")]
)
def test_bad_calibration(calibration, message):
    with pytest.raises(InputError, match=message):
        batches_of(calibration)
