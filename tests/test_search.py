"""Whole searches on a small network: results, files, budgets, records, the command line."""

from __future__ import annotations

import json

import pytest
import torch

import transquant as tq
from search_nets import Winding, images, made
from transquant.errors import InputError, TargetError
from transquant.searching.hunt import FINALISTS


@pytest.fixture(scope="module", name="images")
def _images():
    return images()


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


def test_the_smallest_feasible_is_named(images):
    with pytest.raises(TargetError, match=r"cannot be reached.* the smallest takes \d+ bytes"):
        tq.search(made(), [images], size=300)
    with pytest.raises(TargetError, match=r"multiply–adds cannot be reached.* it is 0\.\d+"):
        tq.search(made(), [images], macs=0.001)


def test_the_smallest_share_that_is_named_can_be_asked_for(images):
    with pytest.raises(TargetError) as caught:
        tq.search(made(), [images], macs=0.001)
    share = float(str(caught.value).rpartition(" ")[2])
    result = tq.search(made(), [images], macs=share, episodes=2, effort=1)
    assert result.report.macs[1] <= share * result.report.macs[0]


def test_a_file_that_multiply_adds_make_smaller_than_the_budget_of_bytes(images):
    result = tq.search(made(), [images], ratio=1.3, macs=0.1, episodes=2, effort=1)
    assert result.report.macs[1] <= 0.1 * result.report.macs[0]
    assert len(result.compressed.data) <= result.report.bytes[0] / 1.3


def test_batches_that_only_forward_understands(images):
    options = {"macs": 0.7, "episodes": 2, "effort": 1}
    for batches, forward in (
        ([(torch.zeros(120), images)], lambda model, batch: model(batch[1])),
        ([{"x": images, "scale": torch.tensor(1.0)}], lambda model, batch: model(x=batch["x"])),
    ):
        found = tq.search(made(), batches, **options, forward=forward)
        assert found.report.macs[0] == 12 * 27 * 100 + 16 * 108 * 100 + 12 * 16 * 100 + 12 * 9 * 25 + 120  # of one sample
        assert found.report.macs[1] <= 0.7 * found.report.macs[0]
        assert not found.masked
    net = made()
    past = {**options, "forward": lambda model, batch: model.last(batch.mean((2, 3)).repeat(1, 4))}
    with pytest.raises(InputError, match="does not call the model"):
        tq.search(net, [images], **past)


def test_a_model_in_train_mode_stays_as_it_is(images):
    net = made().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    result = tq.search(net, [images], ratio=4, episodes=2, effort=1)
    assert result.report.reference == 0  # what is measured is measured in eval mode
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert net.training
    assert net.last.training
    assert torch.equal(state, torch.get_rng_state())


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
    with pytest.raises(InputError, match="not this search's"):
        tq.search(made(), [images], **options, output=lambda logits: logits[:, :2])
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
        ({"ratio": 4, "seed": -1}, "seed is -1"), ({"ratio": 4, "seed": "a"}, "seed is 'a'"), ({"ratio": 4, "effort": 10}, "effort is 10"),
        ({"ratio": 4, "criterion": "age"}, "criterion is 'age'"), ({"ratio": 4, "metric": "weights"}, "metric of the output"),
    ],
)  # fmt: skip
def test_bad_input(images, options, complaint):
    with pytest.raises(InputError, match=complaint):
        tq.search(made(), [images], **options, watch=lambda episode: pytest.fail("episodes before the options were looked at"))


def test_a_record_that_is_no_file(images, tmp_path):
    (tmp_path / "episodes.jsonl").mkdir()
    with pytest.raises(InputError, match="cannot read"):
        tq.search(made(), [images], ratio=4, work=tmp_path)


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
    code, _, err = cli(*command, "-o", "x.tq", "--plot", "small.xyz")
    assert (code, "small.xyz" in err, (tmp_path / "x.tq").exists()) == (2, True, False)
