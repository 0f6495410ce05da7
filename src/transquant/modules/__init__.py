"""Meets nn.Module: which tensors are coded, as which matrices; how a batch is run; how decoded weights go back."""

from transquant.modules.install import check, install, load
from transquant.modules.overrides import apply_overrides
from transquant.modules.run import batches_of, micro_batches, num_samples, run_batch
from transquant.modules.source import gather
from transquant.modules.walk import names_of, plan_model, plan_state_dict

__all__ = [
    "apply_overrides",
    "batches_of",
    "check",
    "gather",
    "install",
    "load",
    "micro_batches",
    "names_of",
    "num_samples",
    "plan_model",
    "plan_state_dict",
    "run_batch",
]
