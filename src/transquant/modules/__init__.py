"""Meets nn.Module: which tensors are coded, as which matrices; how a batch is run; how decoded weights go back."""

from transquant.modules.install import install
from transquant.modules.run import batches_of, micro_batches, run_batch
from transquant.modules.source import gather
from transquant.modules.walk import plan_model, plan_state_dict

__all__ = ["batches_of", "gather", "install", "micro_batches", "plan_model", "plan_state_dict", "run_batch"]
