"""The output measures and the random direction whose one backward pass stands for all of them.

kl    nats a prediction: KL(float ‖ quantized) of the predicted distributions, outputs (N, C) or (N, T, V).
      Direction: v = √p·ε − p·Σ√p·ε with random signs ε, so that E[v vᵀ] = diag(p) − p pᵀ, the Fisher matrix of the logits,
      and KL ≈ ½ E[(v · Δ)²]. Labels drawn from the model give the same mean with more noise: a confident network draws
      the same label nearly always, and a rare other one with a large gradient.
mse   mean squared error an output value. Direction: a random ±1 a value, E[(v · JΔ)²] = ‖JΔ‖².
"""

from __future__ import annotations

import torch
from torch import Tensor

from transquant.errors import InputError

METRICS = ("kl", "mse", "weights")


def resolve(metric: str, output: Tensor) -> str:
    """ "kl" or "mse" for an output (N, ...). Raises InputError where KL has no meaning."""
    fits = output.ndim in (2, 3) and output.shape[-1] >= 2
    if metric == "kl" and not fits:
        raise InputError(f"metric 'kl' needs an output of shape (N, C) or (N, T, V), the model's is {tuple(output.shape)}")
    return ("kl" if fits else "mse") if metric == "auto" else metric


def direction(output: Tensor, metric: str, generator: torch.Generator) -> Tensor:
    """Scalar whose gradient is the random direction; output (N, ...)."""
    output = output.float()
    if metric == "mse":
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output.device) * 2 - 1
        return (output * signs).sum()
    p = output.detach().softmax(-1)
    signed = p.sqrt() * (torch.randint(0, 2, p.shape, generator=generator).to(p.device) * 2 - 1)
    return (output * (signed - p * signed.sum(-1, keepdim=True))).sum()


def unit(output: Tensor, metric: str) -> float:
    """Factor from E‖direction · Δ‖² a sample to the metric's unit."""
    values = output[0].numel()
    return 0.5 / (values // output.shape[-1]) if metric == "kl" else 1.0 / values


def distance(reference: Tensor, output: Tensor, metric: str) -> tuple[float, int]:
    """Sum of the metric over predictions (kl) or values (mse), and their number."""
    total, count = loss(reference.double(), output.double(), metric)
    return float(total), count


def loss(reference: Tensor, output: Tensor, metric: str) -> tuple[Tensor, int]:
    """The same sum as a scalar with a gradient, in the dtype of the outputs."""
    if metric == "mse":
        return ((output - reference) ** 2).sum(), output.numel()
    log_p = reference.reshape(-1, reference.shape[-1]).log_softmax(1)
    log_q = output.reshape(-1, output.shape[-1]).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(), len(log_p)
