"""A whole training in one call: it ends at the asked size, and goes on after a kill to the same bits."""

from __future__ import annotations

import copy
import gc
import hashlib
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

import transquant as tq
from transquant import training
from transquant.demo.network import load_digits_split, pretrained
from transquant.errors import InputError, TargetError
from transquant.training.checkpoint import Checkpoints

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.fixture(scope="module")
def digits():
    return load_digits_split()


@pytest.fixture(scope="module")
def start(digits):
    return tq.compress(pretrained(), [digits[0][0][:128]], bits=1.5, trellis=False, effort=1)


@pytest.fixture(scope="module")
def plain():
    """A network without BatchNorm, and its data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5))
    x = torch.randn(96, 12, generator=torch.Generator().manual_seed(1))
    return model, (x, x[:, :5].argmax(1))


def shift(inputs, labels, generator):
    moved = torch.randint(-1, 2, (), generator=generator).item()
    return inputs.roll(moved, 3), labels


class Killed(Exception):
    pass


def killed_at(step):
    def watch(moment):
        if moment.step == step:
            raise Killed

    return watch


def final(folder):
    """All that the last checkpoint holds, but times."""
    content = Checkpoints(folder).newest()
    for epoch in [*content["history"], content["tally"]]:
        epoch.pop("seconds")
    return content


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class Noisy(nn.Module):
    """Dropout, which draws from torch's own states."""

    def __init__(self):
        super().__init__()
        self.body = pretrained()
        self.body.classifier = nn.Sequential(nn.Dropout(0.2), self.body.classifier)

    def forward(self, x):
        return self.body(x)


@pytest.fixture(scope="module")
def noisy_start(digits):
    return tq.compress(Noisy(), [digits[0][0][:64]], bits=1.5, trellis=False, effort=1)


@pytest.fixture(scope="module")
def whole(digits, noisy_start, tmp_path_factory):
    """An uninterrupted training, for those that are."""
    folder = tmp_path_factory.mktemp("whole")
    x, y = digits[0]
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:600], y[:600]), batch_size=100, shuffle=True)
    options = {"bits": 1.4, "epochs": 3, "start": noisy_start, "augment": shift, "teacher": "self", "clip": 5.0}
    result = training.fit(Noisy(), batches, **options, work=folder)
    return batches, options, result, final(folder)


@pytest.mark.parametrize("step", [1, 6, 9, 16, 18])
def test_resumed_after_an_error_anywhere(whole, tmp_path, monkeypatch, step):
    batches, options, result, content = whole
    monkeypatch.setattr("transquant.training.loop.EVERY", 0.0)  # a checkpoint after each step
    with pytest.raises(Killed):
        training.fit(Noisy(), batches, **options, work=tmp_path, watch=killed_at(step))
    assert Checkpoints(tmp_path).steps()[-1] in (step, step - 1)
    torch.manual_seed(99)  # as another process may find it
    again = training.fit(Noisy(), batches, **options, work=tmp_path)
    assert again.compressed.data == result.compressed.data
    assert same(final(tmp_path), content)


def test_when_checkpoints_are_written_changes_nothing(whole, tmp_path):
    batches, options, result, _ = whole
    folder = tmp_path / "made"
    assert training.fit(Noisy(), batches, **options).compressed.data == result.compressed.data
    with pytest.raises(Killed):
        training.fit(Noisy(), batches, **options, work=folder, watch=killed_at(17))
    assert Checkpoints(folder).steps() == [6, 12]
    newest = folder / "step-00000012.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])  # as a disk may leave it
    assert training.fit(Noisy(), batches, **options, work=folder).compressed.data == result.compressed.data
    assert not folder.exists()


SCRIPT = """
import sys, time, torch
from transquant import training, load
from transquant.demo.network import load_digits_split, pretrained
(x, y), _ = load_digits_split()
def slow(moment):
    print(moment.step, flush=True)
    time.sleep(float(sys.argv[1]))
result = training.fit(pretrained(), (x, y), bits=1.4, epochs=3, start=load("start.tq"), work="work", watch=slow)
result.compressed.save("net.tq")
"""


def test_resumed_after_sigkill(start, digits, tmp_path):
    start.save(tmp_path / "start.tq")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py"]
    running = subprocess.Popen([*command, "0.3"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for line in running.stdout:
        if int(line) >= 9:
            break
    running.send_signal(signal.SIGKILL)
    running.wait()
    running.stdout.close()
    assert not (tmp_path / "net.tq").exists()
    assert Checkpoints(tmp_path / "work").steps() == [0, 7]
    done = subprocess.run([*command, "0"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("8\n")
    first = (tmp_path / "net.tq").read_bytes()
    assert not (tmp_path / "work").exists()
    subprocess.run([*command, "0"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "net.tq").read_bytes() == first


def test_it_ends_at_the_asked_size_and_says_how_it_went(start, digits):
    (x, y), (tx, ty) = digits
    model, moments, stages = pretrained(), [], set()
    before = copy.deepcopy(model.state_dict())

    def score(m):
        return 100 * float((m(tx).argmax(1) == ty).float().mean())

    result = training.fit(
        model, (x, y), bits=1.2, epochs=18, start=start, teacher="self", evaluate=score, autocast="bfloat16", channels_last=True,
        watch=moments.append, progress=lambda stage, done, total: stages.add(stage),
    )  # fmt: skip
    size = 1.2 * sum(p.numel() for p in model.parameters()) / 8
    assert size * 0.99 - 64 <= len(result.compressed.data) <= size
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training
    assert [e.epoch for e in result.history] == list(range(1, 19))
    assert [m.step for m in moments] == list(range(1, 127))
    assert result.history[-1].score == pytest.approx(score(result.compressed.install(pretrained())), abs=0.5)
    assert result.history[-1].score > 90
    assert not result.stopped
    assert "training" in stages


def trained(model, data, **options):
    """The state of a training after a few steps."""
    folder = options.pop("folder")
    training.fit(model, data, **options, work=folder)
    return final(folder)["model"]


def test_micro_batches_are_the_big_batch(plain, tmp_path):
    model, data = plain
    states = []
    for count in (1, 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        options = {"bits": 6.0, "epochs": 3, "batch": 32, "effort": 1, "calibration_samples": 64}
        states.append(trained(model, data, folder=folder, micro_batches=count, **options))
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=1e-4)


TWO = """
import sys, torch, os
import torch.distributed as dist
from transquant import training, load
from transquant.demo.network import load_digits_split, pretrained
if "RANK" in os.environ:
    dist.init_process_group("gloo")
(x, y), _ = load_digits_split()
folder = sys.argv[1]
result = training.fit(pretrained(), (x, y), bits=1.4, epochs=2, start=load("start.tq"), micro_batches=int(sys.argv[2]), work=folder)
result.compressed.save(folder + os.environ.get("RANK", "") + ".tq")
"""


def test_two_processes_train_as_one_does(start, tmp_path):
    start.save(tmp_path / "start.tq")
    (tmp_path / "script.py").write_text(TWO)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "script.py"]
    subprocess.run([sys.executable, "script.py", "one", "4"], cwd=tmp_path, check=True, capture_output=True)
    subprocess.run([*launch, "two", "4"], cwd=tmp_path, check=True, capture_output=True)
    one, two = final(tmp_path / "one"), final(tmp_path / "two")
    for key, value in one["model"].items():
        torch.testing.assert_close(two["model"][key], value, rtol=1e-3, atol=1e-3)
    assert two["history"][-1]["loss"] == pytest.approx(one["history"][-1]["loss"], rel=1e-3)
    assert two["history"][-1]["accuracy"] == pytest.approx(one["history"][-1]["accuracy"], abs=0.2)
    hashes = {hashlib.sha256((tmp_path / f"two{rank}.tq").read_bytes()).hexdigest() for rank in (0, 1)}
    assert len(hashes) == 1
    odd = subprocess.run([*launch, "odd", "3"], cwd=tmp_path, capture_output=True, text=True)
    assert "micro_batches is 3, allowed are multiples of 2" in odd.stderr


def test_nan_stops_with_the_last_good_checkpoint(plain, tmp_path):
    model, data = plain
    calls = []

    def bad(output, labels):
        calls.append(1)
        loss = nn.functional.cross_entropy(output, labels)
        return loss * float("nan") if len(calls) == 4 else loss

    with pytest.raises(InputError, match=r"step 4 of 6, whose loss is nan: the last good checkpoint is of step 0, in"):
        training.fit(model, data, bits=6.0, epochs=2, batch=32, effort=1, calibration_samples=64, loss=bad, work=tmp_path)
    assert Checkpoints(tmp_path).steps() == [0]  # that of step 3 has the weights that led to it
    calls.extend([1] * 10)
    again = training.fit(
        model, data, bits=6.0, epochs=2, batch=32, effort=1, calibration_samples=64, loss=bad, rate=1e-4, work=tmp_path
    )
    assert len(again.history) == 2


def test_patience_ends_it(plain):
    model, data = plain
    result = training.fit(
        model, data, bits=6.0, epochs=10, batch=32, effort=1, calibration_samples=64, evaluate=lambda m: 1.0, patience=2
    )
    assert result.stopped
    assert len(result.history) == 7  # the size is reached after five; one to compare with, two without a better score
    size = 6.0 * sum(p.numel() for p in model.parameters()) / 8
    assert len(result.compressed.data) <= size


def test_checkpoints_of_another_training_are_refused(plain, tmp_path):
    model, data = plain
    options = {"bits": 6.0, "epochs": 2, "batch": 32, "effort": 1, "calibration_samples": 64, "work": tmp_path}
    training.fit(model, data, **options)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight[0, 0] += 1
    with pytest.raises(InputError, match="differ in model"):
        training.fit(other, data, **options)
    with pytest.raises(InputError, match="differ in data"):
        training.fit(model, (data[0] + 1, data[1]), **options)
    with pytest.raises(InputError, match="differ in epochs, which is 3; the checkpoint has 2"):
        training.fit(model, data, **{**options, "epochs": 3})


def test_targets_that_no_file_meets(plain):
    with pytest.raises(TargetError, match="cannot be reached"):
        training.fit(*plain, size=20, epochs=1, effort=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"rate": -1}, "rate is -1"),
        ({"distill": 2}, "distill is 2"),
        ({"patience": 2}, "patience needs evaluate"),
        ({"autocast": "fp8"}, "autocast is 'fp8'"),
        ({"micro_batches": 1.5}, "micro_batches is 1.5"),
        ({"teacher": "other"}, "teacher is 'other'"),
        ({"method": "none"}, "method is 'none'"),
        ({"depth": 3}, "has no option 'depth'"),
        ({"data": iter([])}, "can be gone through once"),
        ({"data": [1, 2]}, "gave a int as a batch"),
        ({"data": (torch.zeros(3, 12), torch.zeros(2))}, "3 inputs and 2 labels"),
        ({"evaluate": lambda m: float("nan")}, "evaluate returned nan"),
        ({"loss": lambda output, labels: 1.0}, "loss returned float"),
        ({"augment": lambda x, y, g: x}, "gave a Tensor as a batch"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(plain, change, message):
    model, data = plain
    given = {"data": data, "bits": 6.0, "epochs": 1, "effort": 1, "calibration_samples": 64, **change}
    with pytest.raises(InputError, match=message):
        training.fit(model, **given)


def test_three_lines_in_a_loop_of_one_s_own(start, digits, caplog):
    (x, y), _ = digits
    model = pretrained()
    network = training.prepare(model, bits=1.4, start=start, steps=4)
    optimizer = torch.optim.Adam(network.parameter_groups())
    with pytest.raises(InputError, match="harden it first"):
        tq.compress(model, bits=4.0)
    with pytest.raises(InputError, match="harden it first"):
        start.install(model)
    for k in range(4):
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(x[k::4]), y[k::4]) + network.penalty()).backward()
        optimizer.step()
    training.harden(model)
    del network, optimizer, model
    gc.collect()
    assert not caplog.records
    forgotten = pretrained()
    training.prepare(forgotten, bits=1.4, start=start).penalty()
    del forgotten
    gc.collect()
    assert "without training.harden" in caplog.text
