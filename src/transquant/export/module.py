"""A module as an ONNX graph of standard operators, through torch's exporter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from transquant.errors import InputError
from transquant.export.graphs import STANDARD, nested
from transquant.export.integers import ExportedWeight, with_integers
from transquant.export.library import MOST_BYTES, clean, first_line, library

FORMS = {"float": 18, "int8": 18, "int4": 21}  # forms of weights, and the operator set that has what they need


def check_form(weights: str) -> None:
    """Raises InputError for a form of weights that there is not, MissingDependency without the packages."""
    if weights not in FORMS:
        raise InputError(f"weights is {weights!r}, allowed are {', '.join(map(repr, FORMS))}")
    library("onnxscript")


def export_module(model: nn.Module, example: Any, weights: str = "float") -> tuple[bytes, tuple[ExportedWeight, ...]]:
    """The bytes of the .onnx file of a module (in eval mode, on the CPU), and a record for each weight.

    `example`: a tensor, a tuple of positional inputs, or a mapping of keyword inputs. The first axis of tensors is the batch and is
    left open, as "batch", where it is as long as the first tensor's; an example of one sample is taken twice.
    Raises InputError where torch cannot export the module or the file would be larger than 2 GiB, MissingDependency."""
    check_form(weights)
    onnx = library("onnxscript")
    arguments, keywords = _arguments(example)
    batch = next((len(t) for t in _tensors((arguments, keywords)) if t.ndim), 0)
    if batch == 0:
        raise InputError("the example input has no tensor with samples, expected a tensor, a tuple, or a mapping of keyword inputs")
    arguments, keywords = _doubled(arguments, batch), _doubled(keywords, batch)
    batch = max(batch, 2)
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                model, arguments, kwargs=keywords, dynamo=True, verbose=False, opset_version=FORMS[weights],
                dynamic_shapes=_axes(keywords, batch) if keywords else _axes(arguments, batch),
            )  # fmt: skip
            assert program is not None
            proto = program.model_proto
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if "user-specified ranges" in str(cause) or "Constraints violated" in str(cause):
            raise InputError(
                f"the model fixes the number of samples ({batch} here), allowed are models that take any number"
            ) from error
        raise InputError(f"torch cannot export the model to ONNX: {type(cause).__name__}: {first_line(cause)}") from error
    strange = sorted({n.domain for graph in nested(proto.graph) for n in graph.node} - set(STANDARD))
    if strange:
        raise InputError(f"the model needs operators of {', '.join(strange)}, allowed are ONNX's standard ones")
    clean(proto)
    records = with_integers(proto, weights)
    if proto.ByteSize() > MOST_BYTES:
        raise InputError(f"the ONNX file would have {proto.ByteSize():,} bytes, allowed are at most 2 GiB")
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise InputError(f"what torch exports of the model fails ONNX's checker: {first_line(error)}") from error
    return proto.SerializeToString(deterministic=True), records


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs."""
    if isinstance(example, Mapping):
        return (), {str(k): _mapped(v, _here) for k, v in example.items()}
    if isinstance(example, Tensor | tuple | list):
        given = (example,) if isinstance(example, Tensor) else tuple(example)
        return tuple(_mapped(v, _here) for v in given), {}
    raise InputError(
        f"the example input is a {type(example).__name__}, allowed are a tensor, a tuple of inputs, or a mapping of keyword inputs"
    )


def _mapped(value: Any, change: Callable[[Tensor], Any], other: Callable[[Any], Any] = lambda v: v) -> Any:
    """The same structure with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {k: _mapped(v, change, other) for k, v in value.items()}
    if isinstance(value, tuple | list):
        parts = [_mapped(v, change, other) for v in value]
        return parts if isinstance(value, list) else tuple(parts)
    return other(value)


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(value, found.append)
    return found


def _here(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _is_batch(tensor: Tensor, batch: int) -> bool:
    return tensor.ndim > 0 and len(tensor) == batch


def _doubled(inputs: Any, batch: int) -> Any:
    """One sample twice: the exporter takes an axis of length one for a constant."""
    return _mapped(inputs, lambda t: torch.cat([t, t]) if batch == 1 and _is_batch(t, 1) else t)


def _axes(inputs: Any, batch: int) -> Any:
    """What the exporter is to leave open."""
    return _mapped(inputs, lambda t: {0: "batch"} if _is_batch(t, batch) else {}, lambda v: None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes to its own developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
