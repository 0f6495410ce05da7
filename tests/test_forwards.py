from __future__ import annotations

import threading
from typing import ClassVar

import pytest
import torch
from torch import nn

from transquant.errors import InputError
from transquant.modules import plan_model
from transquant.stats import PairedNetworks
from transquant.workers import workers
from walks import noisy, paired, run, walked


class Wayward(nn.Module):
    """What is called, and in which order, depends on the samples; `log` is every copy's."""

    log: ClassVar[list[str]] = []

    def __init__(self) -> None:
        super().__init__()
        self.start, self.a, self.b, self.c, self.end = (nn.Linear(4, 4) for _ in range(5))
        self.kept = None

    def forward(self, x):
        Wayward.log.append("in")
        self.kept = self.start(x)  # a copy for all micro-batches would mix them up
        first, second = (self.a, self.b) if float(x[0, 0]) > 0 else (self.b, self.a)
        y = second(torch.tanh(first(x)))
        if float(x[0, 0]) < -1:
            y = self.c(y)
        if float(x[0, 0]) > 9:
            raise ValueError("too large")
        Wayward.log.append("out")
        return self.end(torch.tanh(y + self.kept))


def wayward_batches(*firsts):
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(8, 4, generator=generator) for _ in firsts]
    for batch, first in zip(batches, firsts, strict=True):
        batch[0, 0] = first
    return batches


def walkers(model, batches, pool):
    return PairedNetworks(model, batches, plan_model(model), run, pool)


@pytest.mark.parametrize("threads", [1, 3])
def test_forwards_that_take_other_ways_are_not_waited_for(threads):
    torch.manual_seed(0)
    model, other = Wayward().eval(), Wayward().eval()
    state, batches = noisy(model, 0.3), wayward_batches(2, -0.5, -2, 1, -3)
    other.load_state_dict({**state, **{k: v for k, v in model.state_dict().items() if k.startswith(("end", "c"))}})
    before, count = threading.active_count(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with workers() as pool:
            networks = walkers(model, batches, pool)
            Wayward.log.clear()
            found = walked(networks, state)
            assert Wayward.log.count("in") == Wayward.log.count("out") == 2 * len(batches)  # one forward of each network
    finally:
        torch.set_num_threads(count)
    assert threading.active_count() == before
    assert list(found) == [f"{n}.weight" for n in ("start", "a", "b", "end")]  # c is not called by the first micro-batch
    assert found["a.weight"].count.tolist() == [2 * 8]  # the others go to b first
    assert found["b.weight"].count.tolist() == [5 * 8]
    seen = []
    for network in (model, other):
        network.end.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().double()))
        run(network, torch.cat(batches[:1]))
    last = torch.zeros(4, 4, dtype=torch.float64)
    for k, batch in enumerate(batches):
        seen.clear()
        for network in (model, other):
            network.c.load_state_dict(model.c.state_dict())
            run(network, batch)
        last += seen[0].T @ seen[1]
        assert k or not torch.equal(*seen)
    torch.testing.assert_close(found["end.weight"].cross[0], last, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("where", ["forward", "visit", "keyboard", "at once"])
def test_an_error_ends_all_forwards(where):
    torch.manual_seed(0)
    model = Wayward().eval()
    state, before = noisy(model, 0.3), threading.active_count()
    batches = wayward_batches(2, 1, 10 if where == "forward" else 1, 1)

    def visit(name, pairs):
        if name == "b.weight" and where == "visit":
            raise KeyError("mine")
        if name == "b.weight" and where == "keyboard":
            raise KeyboardInterrupt
        return {k: v for k, v in state.items() if k.startswith(name)}

    expected = {"forward": InputError, "visit": KeyError, "keyboard": KeyboardInterrupt, "at once": RuntimeError}[where]
    with workers() as pool:
        networks = walkers(model, batches, pool)
        if where == "at once":
            networks.run = lambda model, batch: torch.ones(2) @ torch.ones(3)
        with pytest.raises(expected, match="too large" if where == "forward" else None):
            networks.walk(visit)
        assert threading.active_count() <= before + pool.count  # the pool's own
        networks.run = run
        networks.batches = batches[:2]
        assert len(walked(networks, state)) == 4
    assert threading.active_count() == before


def test_forwards_wait_with_no_more_activations_than_allowed(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 600), nn.AvgPool1d(100), nn.Linear(6, 2)).eval()
    x = torch.randn(320, 4)
    with workers() as pool:
        assert len(paired(model, x, pool).batches) == 10
        held = 2 * 4 * 32 * (4 + 600)  # bytes: a micro-batch and the largest input of a module, in two networks
        monkeypatch.setattr("transquant.stats.paired.MOST_LIVE", 3 * held)
        assert len(paired(model, x, pool).batches) == 3
        monkeypatch.setattr("transquant.stats.paired.MOST_LIVE", 10)
        assert len(paired(model, x, pool).batches) == 1
