"""Accuracy and distance to the float network, for the verbs that score."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transquant.cli.calibration import Data
from transquant.codec import CompressedModel
from transquant.errors import InputError
from transquant.modules import batches_of, micro_batches, run_batch
from transquant.stats.metric import distance, resolve

_log = logging.getLogger("transquant")


def outputs(model: nn.Module, data: Data) -> Tensor:
    """Outputs (N, ...) of a model in eval mode on all data."""
    model.eval()
    with torch.no_grad():
        return torch.cat([run_batch(model, b).float().cpu() for b in micro_batches(batches_of(data.batches))])


def top1(output: Tensor, data: Data) -> float:
    """Top-1 accuracy in per cent. Raises InputError where labels are missing or do not fit."""
    if data.labels is None or output.ndim != 2:
        raise InputError("accuracy needs labelled data (a folder a class, or y in the .npz) and outputs of shape (N, C)")
    if len(data.labels) != len(output) or int(data.labels.max()) >= output.shape[1] or int(data.labels.min()) < 0:
        raise InputError(
            f"the labels are {len(data.labels)} numbers up to {int(data.labels.max())}, the outputs {tuple(output.shape)}"
        )
    return 100 * (output.argmax(1) == data.labels).float().mean().item()


def evaluator(data: Data | None) -> Callable[[nn.Module], float]:
    """evaluate(model) for max_drop. Raises InputError where there is nothing to score on."""
    if data is None or data.labels is None:
        raise InputError("--max-drop needs --data with labels: a folder a class, or an .npz with x and y")
    return lambda model: top1(outputs(model, data), data)


def compare(
    model: nn.Module | Any, compressed: CompressedModel, data: Data, has_weights: bool, mode: str = "float"
) -> dict[str, float]:
    """Scores of the network, run as `mode` says, and beside the float one where its weights are known."""
    if not isinstance(model, nn.Module):
        raise InputError("evaluate needs --model, not only weights")
    output = outputs(compressed.install(copy.deepcopy(model), mode=mode), data)
    return scores(output, outputs(model, data) if has_weights else None, data)


def scores(output: Tensor, reference: Tensor | None, data: Data) -> dict[str, float]:
    """Top-1 of outputs where the data have labels; beside `reference`, those of the float network, also how far they differ."""
    result: dict[str, float] = {"samples": len(output)}
    if data.labels is None:
        _log.warning("the data have no labels, so there is no accuracy: expected a folder a class, or x and y in the .npz")
    else:
        result["top1"] = top1(output, data)
    if reference is not None:
        metric = resolve("auto", reference)
        total, count = distance(reference, output, metric)
        result[metric] = total / count
        if data.labels is not None:
            result["float_top1"] = top1(reference, data)
        if reference.ndim == 2:
            result["agreement"] = 100 * (reference.argmax(1) == output.argmax(1)).float().mean().item()
    return result
