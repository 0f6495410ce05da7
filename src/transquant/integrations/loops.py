"""Training loops of other libraries, for a model that `training.prepare` was given before the loop made its optimizer.

    begin: the loop says how long it is ─ step: the penalty's gradient, before each step of the optimizer ─ end: harden

The penalty needs no place in the loss: its gradient is added to that of the loss, once a step, whatever was accumulated.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from transquant.codec import CompressedModel
from transquant.errors import InputError
from transquant.training import SoftNetwork, harden, soft_network


class LoopHooks:
    """What the callbacks of all libraries do. `compressed`: the file, once the loop has ended."""

    compressed: CompressedModel | None = None

    def begin(self, model: nn.Module, steps: int) -> None:
        """Before the first step of `steps`. Raises InputError for a model that is not prepared."""
        network = _prepared(model)
        if not network.schedule.steps and steps > 0:
            network.schedule = replace(network.schedule, steps=steps)

    def step(self, model: nn.Module) -> None:
        """Before a step of the optimizer. Raises TargetError where the size cannot be reached."""
        penalty = _prepared(model).penalty()
        if penalty.requires_grad:
            penalty.backward()  # type: ignore[no-untyped-call]

    def end(self, model: nn.Module) -> None:
        """After the last step: the model gets the weights of the file. Raises TargetError."""
        self.compressed = harden(_prepared(model).model[0])


def _prepared(model: nn.Module) -> SoftNetwork:
    network = soft_network(model)
    if network is None:
        raise InputError("the model is not prepared: call training.prepare before the loop makes its optimizer")
    return network
