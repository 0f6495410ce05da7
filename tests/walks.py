"""Walks through two networks side by side, for the tests of layers in execution order."""

from __future__ import annotations

import torch

from transquant.modules import micro_batches, plan_model, run_batch
from transquant.stats import PairedNetworks


def run(model, batch):
    return run_batch(model, batch)


def paired(model, samples, pool):
    return PairedNetworks(model, list(micro_batches([samples])), plan_model(model), run, pool)


def walked(networks, state):
    """Pairs by weight, in a walk where each weight, and what else its module has, becomes that of `state`."""
    found = {}

    def visit(name, pairs):
        assert name not in found
        found[name] = pairs
        return {k: v for k, v in state.items() if k.partition(".")[0] == name.partition(".")[0]}

    networks.walk(visit)
    return found


def noisy(model, amount, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {k: v + amount * v.std() * torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()}
