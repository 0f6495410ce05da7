"""Searches on a small network: predictions, budgets, searchers, records, files."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

import transquant as tq
from transquant import modules
from transquant.calibrating import calibrate
from transquant.choices import Method
from transquant.encoder import Encoder, Source
from transquant.errors import InputError, MissingDependency, TargetError
from transquant.searching import pipeline
from transquant.searching.budget import Budget
from transquant.searching.correction import correct
from transquant.searching.episodes import Record
from transquant.searching.hunt import FINALISTS, Hunt
from transquant.searching.policy import Policy, Space, row_depths
from transquant.searching.searchers import METHODS, searcher
from transquant.searching.searchers.lagrange import solve
from transquant.searching.survey import groups_of, survey, usable
from transquant.searching.trial import Trials
from transquant.workers import workers

EXTRAS = {"tpe": ("optuna",), "cma-es": ("optuna", "cmaes"), "ddpg": ("gymnasium", "stable_baselines3")}


class Net(nn.Module):
    """Plain convolutions, a residual addition, and a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.inner = nn.Conv2d(12, 16, 3, padding=1)
        self.outer = nn.Conv2d(16, 12, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, stride=2, padding=1, groups=12)
        self.last = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.stem(x)))
        x = torch.relu(x + self.bn2(self.outer(torch.relu(self.inner(x)))))
        return self.last(torch.relu(self.depthwise(x)).mean((2, 3)))


class Winding(Net):
    """The same, but what it does depends on its input: its graph cannot be followed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if float(x.sum()) < 1e9 else x / 2)


def made(kind: type[Net] = Net) -> Net:
    torch.manual_seed(3)
    net = kind()
    with torch.no_grad():
        net.last.weight.mul_(8)
        net.inner.weight[::4] *= 0.02  # channels that do little
    return net.eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(120, 3, 10, 10, generator=torch.Generator().manual_seed(1))


class Ready:
    """What `search` has before its first episode."""

    def __init__(self, images, pool, fixed=None, macs=None, ratio=5.0, criterion="sensitivity"):
        self.model = made()
        self.plan = modules.plan_model(self.model)
        source = Source(*modules.gather(self.plan, self.model.state_dict()))
        say = lambda *_: None  # noqa: E731
        seen = calibrate(self.model, [images], self.plan, source, "auto", None, None, 0, pool, say, 0, None, False, False, False)
        how = Method(transform="identity", state_bits=3)
        self.encoder = Encoder(self.plan, source, seen.stats, pool, how)
        batch = seen.reference.batches[0]
        found, physical = groups_of(self.model, batch)
        self.groups = usable(found, self.encoder)
        self.predictor = survey(self.model, self.groups, self.encoder, batch, modules.run_batch, criterion, fixed)
        self.raw = dict(self.predictor.removals)
        self.trials = Trials(self.model, self.groups, seen.stats, seen.reference, pool, how, physical)
        pipeline._fit(self.predictor, self.encoder, seen.reference)
        self.whole = self.predictor.costs(self.policy())
        self.budget = Budget(
            None if ratio is None else self.plan.original_bytes / ratio, None if macs is None else macs * self.whole.macs
        )
        self.budget.check(self.predictor, lambda policy: self.trials.draft(self.predictor, policy, None)[1])
        correct(self.predictor, self.budget, self.trials, say)

    def policy(self, bits=8.0, **removed):
        space = self.predictor.space
        return space.with_bits({g: removed.get(g, 0) for g in space.groups}, dict.fromkeys(space.weights, bits))


@pytest.fixture(scope="module")
def pool():
    with workers() as pool:
        yield pool


@pytest.fixture(scope="module")
def ready(images, pool):
    return Ready(images, pool)


# ------------------------------------------------------------------------------------------- depths and policies


def test_depths_hold_their_mean_and_follow_importance(rng):
    importance = rng.normal(size=40) * 3
    for bits in (1.0, 2.5, 4.125, 7.75, 8.0):
        depths = row_depths(bits, importance)
        assert depths.sum() == round(bits * 40)
        assert ((depths >= 1) & (depths <= 8)).all()
        assert (np.diff(depths[np.argsort(importance)]) >= -1).all()
    assert row_depths(4.0, np.array([0.0, 4.0])).tolist() == [3, 5]  # four octaves of squares are two bits


def test_numbers_and_policies():
    space = Space({"a": 8, "b": 4}, ("x", "y"))
    policy = space.policy([0.5, 0.999, 0.0, 1.0])
    assert policy == Policy({"a": 4, "b": 3}, {"x": 1.0, "y": 8.0})
    assert space.policy(space.numbers(policy)) == policy
    assert space.size == 4
    assert Space({"a": 8}, ("x", "y"), 8).size == 1


def test_depths_of_rows_in_compress(images):
    model = made()
    names = [n for n, p in model.named_parameters() if p.ndim > 1]
    file = tq.compress(model, images, step=1.0, depths=dict.fromkeys(names, 8), effort=1, trellis=False, feedback=False)
    assert file.report.settings["factor"] == pytest.approx(1, rel=1e-3)
    for name in names:
        float_rows, rows = (s[name].flatten(1) for s in (model.state_dict(), file.state_dict()))
        steps = float_rows.abs().amax(1) / 128
        worst = (rows - float_rows).abs().amax(1) / steps
        assert 0.25 < float(worst.median()) < 0.75  # of a step
        assert float(worst.max()) < 1.0
    coarse = tq.compress(model, images, size=1500, depths={"inner.weight": [0, 4] * 8}, effort=1)
    assert len(coarse.data) <= 1500
    rows = coarse.state_dict()["inner.weight"].flatten(1)
    assert not rows[::2].any()
    assert rows[1::2].any()
    for depths, complaint in (
        ({"absent": 4}, "'absent'"), ({"inner.weight": [1, 2]}, r"\(16,\)"), ({"inner.weight": 17}, "0 to 16"), ({"inner.weight": "x"}, "no numbers"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=complaint):
            tq.compress(model, images, size=1500, depths=depths)
    with pytest.raises(InputError, match="identity"):
        tq.compress(model, images, size=1500, depths={"inner.weight": 4}, transform="klt")


# ------------------------------------------------------------------------------------------- predictions


def test_groups(ready):
    assert dict(ready.predictor.space.groups) == {"stem": 12, "inner": 16}
    assert ready.predictor.space.weights[0] == "stem.weight"
    counted = sum(w.macs for w in ready.predictor.weights.values())
    assert counted == 12 * 27 * 100 + 16 * 108 * 100 + 12 * 16 * 100 + 12 * 9 * 25 + 120


def test_channels_that_do_little_go_first(ready):
    assert set(ready.predictor.removals["inner"].order[:4].tolist()) == {0, 4, 8, 12}
    for removal in ready.predictor.removals.values():
        assert (np.diff(removal.costs) >= 0).all()
        assert removal.costs[0] == 0


def test_costs_of_one_removal_after_the_other_are_those_of_all_at_once(ready):
    removal, stats = ready.raw["inner"], ready.encoder.layers["outer.weight"]
    weight = ready.encoder.source.values["outer.weight"]
    a, g = stats.input_moment[0].copy(), stats.output_moment[0]
    a += 1e-3 * np.trace(a) / len(a) * np.eye(len(a))
    for count in (1, 5, 15):
        gone, kept = removal.order[:count], removal.order[count:]
        schur = a[np.ix_(gone, gone)] - a[np.ix_(gone, kept)] @ np.linalg.solve(a[np.ix_(kept, kept)], a[np.ix_(kept, gone)])
        expected = np.trace(g @ weight[:, gone] @ schur @ weight[:, gone].T)
        assert removal.costs[count] == pytest.approx(expected, rel=1e-6)


def test_predicted_against_real_files(ready):
    for policy in (ready.policy(5.0), ready.policy(6.0, inner=5), ready.policy(4.0, inner=4, stem=3)):
        costs = ready.predictor.costs(policy)
        draft, size, network = ready.trials.draft(ready.predictor, policy, None)
        assert costs.bytes == pytest.approx(size, rel=0.1)
        network.load_state_dict(draft.state(), strict=False)
        assert 0.2 < costs.distortion / ready.trials.reference.compared(network) < 5


def test_what_is_predicted_better_is_better(ready, rng):
    predicted, real = [], []
    for _ in range(16):
        numbers = rng.random(ready.predictor.space.size)
        numbers[:2] *= rng.random()
        policy = ready.predictor.space.policy(numbers)
        predicted.append(ready.predictor.costs(policy).distortion)
        real.append(-ready.trials.measured(ready.predictor, policy, None).value)
    ranks = np.argsort(np.argsort([predicted, real], axis=1), axis=1)
    assert np.corrcoef(ranks)[0, 1] > 0.8


def test_predicted_multiply_adds_are_those_of_the_smaller_network(ready):
    from transquant.inference import count_macs

    policy = ready.policy(8.0, inner=7, stem=5)
    network = ready.trials.network(ready.trials.kept(ready.predictor, policy))
    x = torch.zeros(2, 3, 10, 10)
    assert ready.predictor.costs(policy).macs == pytest.approx(sum(count_macs(network, x, lambda m, b: m(b)).values()) / 2)


# ------------------------------------------------------------------------------------------- budgets


def test_budgets_hold_whatever_is_proposed(images, pool, rng):
    for options in ({"macs": 0.5}, {"fixed": 6, "macs": 0.6, "ratio": 4.0}):
        ready = Ready(images, pool, **options)
        for _ in range(20):
            policy, costs = ready.budget.enforced(
                ready.predictor, ready.predictor.space.policy(rng.random(ready.predictor.space.size))
            )
            assert costs.bytes <= ready.budget.bytes
            assert ready.budget.macs is None or costs.macs <= ready.budget.macs * (1 + 1e-9)
            assert all(0 <= k < ready.predictor.space.groups[g] for g, k in policy.removed.items())
            assert all(1 <= b <= 8 for b in policy.bits.values())


def test_the_smallest_feasible_is_named(images):
    with pytest.raises(TargetError, match=r"cannot be reached.* the smallest takes \d+ bytes"):
        tq.search(made(), [images], size=300)
    with pytest.raises(TargetError, match=r"multiply–adds cannot be reached.* it is 0\.\d+"):
        tq.search(made(), [images], macs=0.001)


# ------------------------------------------------------------------------------------------- searchers


def test_prices_find_what_brute_force_finds(images, pool):
    ready = Ready(images, pool, fixed=8, macs=0.5, ratio=None)
    space = ready.predictor.space
    best = min(
        (ready.predictor.costs(space.with_bits({"stem": a, "inner": b}, {})) for a, b in product(range(12), range(16))),
        key=lambda c: (not ready.budget.holds(c), c.distortion),
    )
    _, found = ready.budget.enforced(ready.predictor, solve(ready.predictor, ready.budget))
    assert found.distortion <= 1.5 * best.distortion  # what lies on the hull of the frontier
    agent = searcher("lagrange", ready.predictor, ready.budget, 60, 0)
    reached = 0.0
    for _ in range(60):
        policy, costs = ready.budget.enforced(ready.predictor, agent.propose())
        agent.observe(policy, costs.reward)
        reached = max(reached, costs.reward)
    assert reached == pytest.approx(best.reward, abs=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_searchers(ready, method):
    for extra in EXTRAS.get(method, ()):
        pytest.importorskip(extra)
    walks = []
    for _ in range(2):
        hunt = Hunt(ready.predictor, ready.budget, ready.trials, Record(None, ""), lambda *_: None, None)
        state = torch.get_rng_state()
        hunt.walk(method, 16, 100, seed=5)
        assert torch.equal(state, torch.get_rng_state())
        walks.append([e.policy for e in hunt.record.known.values()])
        assert all(e.costs.bytes <= ready.budget.bytes for e in hunt.record.known.values())
        assert hunt.best.reward == max(e.reward for e in hunt.record.known.values())
    assert walks[0] == walks[1]
    assert len({json.dumps(dict(p.removed)) + json.dumps(dict(p.bits)) for p in walks[0]}) > 3


def test_what_is_missing_is_named(ready, monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *rest, **options):
        if name.split(".")[0] in ("optuna", "gymnasium"):
            raise ImportError(f"No module named {name!r}", name=name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    for method in EXTRAS:
        with pytest.raises(MissingDependency, match=r"transquant\[search\]"):
            searcher(method, ready.predictor, ready.budget, 10, 0)


# ------------------------------------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def result(images):
    return tq.search(made(), [images], ratio=5, macs=0.7, episodes=30, check_every=10, effort=1)


def test_the_whole(result, images, tmp_path):
    assert 5 <= result.report.bytes[0] / len(result.compressed.data) < 5.6
    assert result.report.macs[1] <= 0.7 * result.report.macs[0]
    assert result.report.parameters[1] == sum(p.numel() for p in result.model.parameters())
    assert len(result.episodes) == 30
    assert sum(e.measured is not None for e in result.episodes) >= 3
    assert result.report.measured in [e.measured for e in result.episodes]
    assert not result.masked
    result.compressed.save(tmp_path / "small.tq")
    rebuilt = tq.load(tmp_path / "small.tq").install(made())
    with torch.no_grad():
        assert torch.allclose(rebuilt(images), result.model(images), atol=1e-5)
        assert result.network(images).shape == (120, 10)
    assert "multiply-adds" in str(result.report)
    result.plot(tmp_path / "search.png")
    assert (tmp_path / "search.png").stat().st_size > 10_000


def test_one_depth_for_all_rows(images):
    result = tq.search(made(), [images], macs=0.6, precision=8, episodes=10, effort=1, criterion="norm")
    assert result.compressed.report.settings["factor"] == pytest.approx(1, rel=1e-3)
    assert set(result.policy.bits.values()) == {8.0}
    assert any(result.policy.removed.values())


def test_what_decides_can_be_given(images):
    asked = []

    def evaluate(model):
        asked.append(model)
        return float(len(asked))

    result = tq.search(made(), [images], ratio=4, episodes=12, effort=1, evaluate=evaluate)
    assert result.report.measured.value == FINALISTS  # the last
    assert result.report.reference == FINALISTS + 1
    with pytest.raises(InputError, match="evaluate returned 'good'"):
        tq.search(made(), [images], ratio=4, episodes=2, effort=1, evaluate=lambda model: "good")


def test_a_network_that_cannot_be_followed_is_masked(images, caplog):
    with caplog.at_level("WARNING", "transquant"):
        result = tq.search(made(Winding), [images], ratio=8, episodes=40, method="random", effort=1)
    assert result.masked
    assert "stay in the result, as zeros" in caplog.text
    state = result.compressed.state_dict()
    assert state["inner.weight"].shape == (16, 12, 3, 3)
    for name, count in result.policy.removed.items():
        assert int((state[f"{name}.weight"].flatten(1).abs().amax(1) == 0).sum()) == count
    with pytest.raises(InputError, match="macs needs"):
        tq.search(made(Winding), [images], macs=0.5)


def test_a_killed_search_goes_on_to_the_same_result(result, images, tmp_path):
    work = tmp_path / "work"
    options = {"ratio": 5, "macs": 0.7, "episodes": 30, "check_every": 10, "effort": 1, "work": work}
    seen = []

    def killed(episode):
        seen.append(episode)
        if len(seen) == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tq.search(made(), [images], **options, watch=killed)
    record = work / "episodes.jsonl"
    record.write_text(record.read_text()[:-20])  # cut off while it was written
    again = tq.search(made(), [images], **options)
    assert again.policy == result.policy
    assert again.compressed.data == result.compressed.data
    assert [(e.policy, e.costs) for e in again.episodes] == [(e.policy, e.costs) for e in result.episodes]
    for other in ({"ratio": 6}, {"macs": 0.8}, {"seed": 1}, {"method": "random"}):
        with pytest.raises(InputError, match="holds a search of another model"):
            tq.search(made(), [images], **{**options, **other})
    with pytest.raises(InputError, match="holds a search of another model"):
        tq.search(made(Winding), [images + 1], **{**options, "macs": None})
    lines = record.read_text().splitlines()
    record.write_text("\n".join([lines[0], '{"number": 0}', *lines[1:]]) + "\n")
    with pytest.raises(InputError, match="damaged"):
        tq.search(made(), [images], **options)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "needs a budget"), ({"ratio": 4, "bits": 4}, "exactly one"), ({"macs": 1.5}, "macs is 1.5"), ({"macs": True}, "macs is True"),
        ({"ratio": 4, "precision": 1}, "precision is 1"), ({"ratio": 4, "precision": "low"}, "precision is 'low'"),
        ({"ratio": 4, "method": "luck"}, "method is 'luck'"), ({"ratio": 4, "episodes": 0}, "episodes is 0"),
        ({"ratio": 4, "criterion": "age"}, "criterion is 'age'"), ({"ratio": 4, "metric": "weights"}, "metric of the output"),
    ],
)  # fmt: skip
def test_bad_input(images, options, complaint):
    with pytest.raises(InputError, match=complaint):
        tq.search(made(), [images], **options)


def test_command_line(cli, tmp_path):
    from cli_model import NET

    command = ("search", *NET, "--ratio", 4, "--episodes", 5, "--effort", 1)
    code, out, err = cli(*command, "-o", "small.tq", "--plot", "small.png", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["bytes"] == (tmp_path / "small.tq").stat().st_size
    assert found["ratio"] >= 4
    assert (tmp_path / "small.png").exists()
    code, out, err = cli(*command, "-o", "small.tq", "--force")
    assert (code, "multiply-adds" in out) == (0, True), err
    assert cli("search", *NET, "--macs", 0.0001, "-o", "x.tq")[0] == 3
    assert cli("search", *NET, "--ratio", 4, "--method", "luck", "-o", "x.tq")[0] == 2
    assert cli("search", *NET[:2], "--ratio", 4, "-o", "x.tq")[0] == 2
