"""Two processes make the file that one makes, and end together."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

import transquant as tq
from transquant.processes import Processes

NETWORK = """
import os, sys, time
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 96, 3, padding=1), nn.ReLU(), nn.Conv2d(96, 24, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 10)).eval()

def samples():
    print("said by the user's own function")
    return torch.randn(160, 3, 12, 12, generator=torch.Generator().manual_seed(1))

def others():
    return torch.randn(160, 3, 12, 12, generator=torch.Generator().manual_seed(int(os.environ.get("RANK", 0))))

def fails_in_one():
    if os.environ["RANK"] == "1":
        raise KeyError("only here")
    return samples()

class Refuses(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.calls = net(), 0
    def forward(self, x):
        self.calls += 1
        if self.calls == 3 and os.environ["RANK"] == "1":
            raise RuntimeError("no more")
        return self.body(x)

class RefusesOtherWeights(nn.Module):
    # where layers go in execution order: there alone samples that are not held back meet other weights
    def __init__(self):
        super().__init__()
        self.body = net()
    def forward(self, x):
        y = self.body[0](x)
        other = not torch.equal(self.body[0].weight, net()[0].weight)
        if other and os.environ["RANK"] == "1" and (x[0] == samples()[:128]).flatten(1).all(1).any():
            raise RuntimeError("no other weights")
        return self.body[1:](y)

def leaves():
    if os.environ["RANK"] == "1":
        os._exit(9)
    return samples()
"""


@pytest.fixture
def launch(tmp_path):
    """Runs a script or a module in processes; returns what torchrun does."""
    (tmp_path / "network.py").write_text(NETWORK)

    def run(*arguments, processes=2, **environment):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *map(str, arguments)]
        kept = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        started = time.monotonic()
        done = subprocess.run(command, cwd=tmp_path, env={**kept, **environment}, capture_output=True, text=True, timeout=300)
        assert time.monotonic() - started < 120, "it waited for something"
        return done

    return run


def alone(tmp_path, *arguments):
    command = [sys.executable, "-m", "transquant", *map(str, arguments)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)


CALIBRATED = ("--calibration", "network.py:samples")


@pytest.mark.parametrize(
    ("options", "processes"),
    [
        (("--bits", 4, *CALIBRATED), 2),
        (("--step", 0.05, "--transform", "klt", "--axis", "input", *CALIBRATED), 2),  # 96 bands: numpy's BLAS would use threads
        (("--bits", 4, "--effort", 1), 2),
        (("--step", 0.05, "--effort", 6, "--transform", "identity", *CALIBRATED), 2),
        (("--step", 0.05, "--transform", "identity", *CALIBRATED), 5),  # more than there are folds or layers
    ],
    ids=["tuned", "klt", "no calibration", "learning", "five"],
)
def test_the_file_of_one_process(launch, tmp_path, options, processes):
    command = ("compress", "--model", "network.py:net", *options)
    alone(tmp_path, *command, "-o", "one.tq")
    done = launch("-m", "transquant", *command, "-o", "two.tq", processes=processes)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one.tq").read_bytes() == (tmp_path / "two.tq").read_bytes()
    assert done.stdout.count("bytes on disk") == 1
    assert done.stdout.count("said by the user") == (CALIBRATED[0] in options)


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (("--model", "network.py:net", "--calibration", "network.py:fails_in_one", "--bits", 4), "'only here'", 2),
        (("--model", "network.py:Refuses", *CALIBRATED, "--bits", 4), "refuses a calibration batch", 2),
        (("--model", "network.py:RefusesOtherWeights", *CALIBRATED, "--step", 0.05), "no other weights", 2),
        (("--model", "network.py:net", "--calibration", "network.py:others", "--bits", 4), "different calibration samples", 2),
        (("--model", "network.py:net", *CALIBRATED, "--size", 10), "cannot be reached", 3),
        (
            ("--model", "network.py:net", "--calibration", "network.py:leaves", "--bits", 4),
            "another of the 2 processes has ended",
            1,
        ),
    ],
    ids=["while loading", "while measuring", "in order", "other samples", "target", "killed"],
)
def test_an_error_in_one_is_an_error_in_all(launch, tmp_path, options, message, code):
    done = launch("-m", "transquant", "compress", *options, "-o", "two.tq")
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 or code == 1  # torchrun ends those that are left when one was killed
    if code != 1:
        assert message in done.stderr
        assert f"exitcode: {code})" in done.stderr
    assert not (tmp_path / "two.tq").exists()


SCRIPT = """
import datetime, hashlib, os, sys
import torch, torch.distributed as dist
import transquant as tq
from network import net, samples

dist.init_process_group("gloo")
rank = dist.get_rank()
try:
    tq.compress(net(), samples(), bits=0.001)
except tq.errors.TargetError as error:
    assert "cannot be reached" in str(error)
scores = []
def evaluate(model):
    scores.append(1)
    return float(model(samples()).std()) + 1e-9 * rank
c = tq.compress(net(), samples(), max_drop=(evaluate, 0.05), effort=1)
digests = [None, None]
dist.all_gather_object(digests, hashlib.sha256(c.data).hexdigest())
assert digests[0] == digests[1]
assert bool(scores) == (rank == 0)
c.save(f"rank{rank}.tq")
dist.destroy_process_group()
"""


def test_in_python_after_an_error_and_with_a_score(launch, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = launch("script.py", PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rank0.tq").read_bytes() == (tmp_path / "rank1.tq").read_bytes()
    tq.load(tmp_path / "rank1.tq")


def test_commands_that_share_nothing_are_run_once(launch, tmp_path, compressed):
    compressed.save(tmp_path / "net.tq")
    done = launch("-m", "transquant", "inspect", "net.tq")
    assert done.returncode == 0
    assert done.stdout.count("bytes on disk") == 1


def test_one_process_alone_exchanges_nothing():
    one = Processes()
    with one.together():
        assert one.exchange(3) == [3]
        assert one.swap([1, 2]) == [[1, 2]]
        assert one.once(lambda: 5) == 5
        one.agree("anything", object())
