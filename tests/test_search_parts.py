"""Parts of a search on a small network: depths, predictions, budgets, searchers."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
import torch

import transquant as tq
from search_nets import images, made
from transquant import modules
from transquant.calibrating import calibrate
from transquant.choices import Method
from transquant.encoder import Encoder, Source
from transquant.errors import InputError, MissingDependency
from transquant.searching import pipeline
from transquant.searching.budget import Budget
from transquant.searching.correction import correct
from transquant.searching.episodes import Record
from transquant.searching.hunt import Hunt
from transquant.searching.policy import Policy, Space, row_depths
from transquant.searching.searchers import METHODS, searcher
from transquant.searching.searchers.lagrange import solve
from transquant.searching.survey import groups_of, survey, usable
from transquant.searching.trial import Trials
from transquant.workers import workers

EXTRAS = {"tpe": ("optuna",), "cma-es": ("optuna", "cmaes"), "ddpg": ("gymnasium", "stable_baselines3")}


@pytest.fixture(scope="module", name="images")
def _images():
    return images()


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
        found, physical = groups_of(self.model, batch, modules.run_batch)
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
