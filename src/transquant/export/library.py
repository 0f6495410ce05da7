"""What is asked of the onnx package, in one place: it is optional."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transquant.errors import MissingDependency

MOST_BYTES = (1 << 31) - 1  # of a serialised message


def library(*more: str) -> Any:
    """The package onnx. Raises MissingDependency where it, or one of `more`, is not installed."""
    from importlib.util import find_spec

    for name in ("onnx", *more):
        if find_spec(name) is None:
            raise MissingDependency(f'ONNX files need {name}: pip install "transquant[onnx]"')
    import onnx
    import onnx.checker
    import onnx.numpy_helper

    return onnx


def first_line(error: BaseException) -> str:
    """What an error says first, short enough for a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")


def messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all those inside, outer ones first."""
    stack = [iter([message])]
    while stack:
        item = next(stack[-1], None)
        if item is None:
            stack.pop()
            continue
        yield item
        for field, value in item.ListFields():
            if field.message_type is not None:
                stack.append(iter([value] if hasattr(value, "ListFields") else value))


def clean(model: Any) -> None:
    """Take out comments on nodes and values: they are no part of the network, and exporters put stack traces with paths there."""
    for part in messages(model):
        if part is not model:
            for field in part.DESCRIPTOR.fields:
                if field.name in ("doc_string", "metadata_props"):
                    part.ClearField(field.name)
