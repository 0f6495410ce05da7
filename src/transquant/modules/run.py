"""How a batch is run through a model, and how calibration data becomes fixed micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from transquant.errors import InputError, TransquantError

Forward = Callable[[nn.Module, Any], Any]
Output = Callable[[Any], Tensor]

SMALL_INPUT = 3 * 64 * 64  # values a sample up to which 32 samples make a micro-batch; above, 8


def run_batch(
    model: nn.Module, batch: Any, forward: Forward | None = None, output: Output | None = None, finite: bool = True
) -> Tensor:
    """The output that counts, for one batch: a floating tensor (N, ...).

    A tensor, or the first element of a tuple or list, is the input; a mapping gives keyword inputs (without "labels").
    `forward(model, batch)` and `output(result)` override. Raises InputError where the model refuses the batch or gives
    no floating tensor, or, with `finite`, one with NaN or infinite values."""
    try:
        if forward is not None:
            result = forward(model, _moved(batch, model))
        elif isinstance(batch, Mapping):
            result = model(**{k: v for k, v in _moved(batch, model).items() if k != "labels"})
        else:
            result = model(_moved(batch[0] if isinstance(batch, tuple | list) else batch, model))
    except TransquantError:
        raise
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"the model refuses a calibration batch of shape {_shape(batch)}: {first_line}") from error
    tensor = output(result) if output is not None else _tensor(result)
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.ndim == 0:
        raise InputError(
            f"the model returned {type(result).__name__} with no floating tensor of samples in it; "
            "pass output= to say which tensor counts"
        )
    if finite and not bool(torch.isfinite(tensor.detach()).all()):
        raise InputError("the model's output has NaN or infinite values on a calibration batch")
    return tensor


def batches_of(calibration: Iterable[Any], whole: bool = False) -> list[Any]:
    """The batches of an iterable, checked not to be empty; of tuples and lists the first element, unless `whole` (the
    caller's `forward` takes them as they are). Raises InputError."""
    if isinstance(calibration, Tensor | np.ndarray):
        calibration = [calibration]
    if isinstance(calibration, str | bytes | Mapping):
        raise InputError(f"calibration is a {type(calibration).__name__}, allowed is any iterable of batches, or None")
    try:
        batches = list(calibration)
    except TypeError:
        raise InputError(f"calibration is a {type(calibration).__name__}, allowed is any iterable of batches, or None") from None
    if not whole:
        batches = [b[0] if isinstance(b, tuple | list) and len(b) and isinstance(b[0], Tensor | np.ndarray) else b for b in batches]
    batches = [torch.from_numpy(b) if isinstance(b, np.ndarray) and b.dtype.kind in "fiub" else b for b in batches]
    if not batches:
        raise InputError("calibration has no batches")
    for batch in batches:
        for tensor in _leaves(batch):
            if tensor.ndim > 0 and len(tensor) == 0:
                raise InputError(f"a calibration batch of shape {tuple(tensor.shape)} has no samples")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise InputError("a calibration batch has NaN or infinite values")
    return batches


def micro_batches(batches: Iterable[Any], part: int = 1) -> Iterator[Any]:
    """Split batches along their first dimension into micro-batches whose size depends on the samples alone; smaller by `part`
    for networks that take much memory.

    A batch that is no tensor, nor a mapping of tensors of one length, is passed on whole. Tensors of one shape are
    joined first, so the user's batch size does not matter."""
    held: list[Tensor] = []
    for batch in batches:
        if isinstance(batch, Tensor) and batch.ndim > 0:
            if held and held[0].shape[1:] != batch.shape[1:]:
                yield from _cut(torch.cat(held), part)
                held = []
            held.append(batch)
            continue
        tensors = list(_leaves(batch))
        lengths = {len(t) if t.ndim else -1 for t in tensors}
        if isinstance(batch, Mapping) and len(lengths) == 1 and len(tensors) == len(batch) and lengths != {-1}:
            (length,), size = lengths, _size(tensors[0], part)
            yield from ({k: v[a : a + size] for k, v in batch.items()} for a in range(0, length, size))
        else:
            yield batch
    if held:
        yield from _cut(torch.cat(held), part)


def num_samples(batch: Any) -> int:
    """Samples of a batch: the first dimension of its first tensor."""
    first = next(_leaves(batch), None)
    return len(first) if first is not None and first.ndim else 1


def _cut(tensor: Tensor, part: int) -> list[Tensor]:
    size = max(1, min(_size(tensor, part), len(tensor) // 5))  # few samples: still one in five can be held back
    cuts = list(range(0, len(tensor), size))
    if len(cuts) > 1 and len(tensor) - cuts[-1] == 1:  # a lone sample joins: some layers refuse a batch of one
        cuts.pop()
    return [tensor[a:b] for a, b in zip(cuts, [*cuts[1:], len(tensor)], strict=True)]


def _size(tensor: Tensor, part: int) -> int:
    return (32 if tensor[:1].numel() <= SMALL_INPUT else 8) // part


def _tensor(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result
    if isinstance(result, Mapping):
        return result["logits"] if "logits" in result else next((v for v in result.values() if isinstance(v, Tensor)), None)
    if hasattr(result, "logits"):
        return result.logits
    if isinstance(result, tuple | list):
        return next((v for v in result if isinstance(v, Tensor)), None)
    return None


def _leaves(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _leaves(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from _leaves(value)


def _moved(batch: Any, model: nn.Module) -> Any:
    """The batch on the model's device, floating inputs in the model's dtype."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return batch
    if isinstance(batch, Tensor):
        batch = batch.clone() if batch.is_inference() else batch  # such tensors refuse to take part in gradients
        return batch.to(parameter.device, parameter.dtype if batch.is_floating_point() else None)
    if isinstance(batch, Mapping):
        return {k: _moved(v, model) for k, v in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_moved(v, model) for v in batch) if not hasattr(batch, "_fields") else batch
    return batch


def _shape(batch: Any) -> str:
    shapes = [str(tuple(t.shape)) for t in _leaves(batch)]
    return ", ".join(shapes[:3]) or type(batch).__name__
