"""A callback for Lightning; needs lightning.

network = training.prepare(module.net, calibration, bits=1.0)    before the Trainer calls configure_optimizers,
                                                                 which returns torch.optim.Adam(network.parameter_groups())
callback = TransquantCallback()
Trainer(callbacks=[callback], max_epochs=20).fit(module, loader)
callback.compressed.save("net.tq")
"""

from __future__ import annotations

from typing import Any

from transquant.errors import MissingDependency
from transquant.integrations.loops import LoopHooks

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise MissingDependency(f"this needs Lightning ({error}): pip install lightning") from None


class TransquantCallback(LoopHooks, Callback):  # type: ignore[misc]
    """Adds the penalty's gradient before each step of the optimizer, and hardens at the end."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Raises InputError for a module that is not prepared."""
        steps = trainer.estimated_stepping_batches
        self.begin(pl_module, int(steps) if steps < float("inf") else 0)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Raises TargetError where the size cannot be reached."""
        self.step(pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Raises TargetError."""
        self.end(pl_module)
