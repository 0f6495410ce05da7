"""A callback for Hugging Face's Trainer; needs transformers and accelerate.

network = training.prepare(model, calibration, bits=1.0)
callback = TransquantCallback()
optimizer = torch.optim.Adam(network.parameter_groups())
Trainer(model, arguments, train_dataset=data, callbacks=[callback], optimizers=(optimizer, None)).train()
callback.compressed.save("net.tq")
"""

from __future__ import annotations

from typing import Any

from transquant.errors import MissingDependency
from transquant.integrations.loops import LoopHooks

try:
    from transformers import TrainerCallback
except Exception as error:  # beside a torchvision of another torch it fails in ways of its own
    why = f"{type(error).__name__}: {error}".splitlines()[0]
    raise MissingDependency(f'this needs transformers 5.23 or newer ({why}): pip install "transquant[zoo]"') from None


class TransquantCallback(LoopHooks, TrainerCallback):  # type: ignore[misc]
    """Adds the penalty's gradient before each step of the optimizer (after clipping), and hardens at the end."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Raises InputError for a model that is not prepared."""
        self.begin(model, int(state.max_steps))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Raises TargetError where the size cannot be reached."""
        self.step(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Raises TargetError."""
        self.end(model)
