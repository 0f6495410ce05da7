"""What is asked of both readers on any bytes at all: equal arrays, or the same documented exception, in one short line."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import transquant as tq
from transquant import reader
from transquant.errors import FileError

MAX_MESSAGE = 400  # characters


class Violation(AssertionError):
    """A reader did what no file may make it do."""


@dataclass(frozen=True)
class Outcome:
    """`error`: name of the exception, or "decoded". Seconds of the compiled reader, and of the numpy one (0: not run)."""

    error: str
    compiled: float
    portable: float


def check(data: bytes, scratch: Path, portable: bool = True) -> Outcome:
    """Read `data` (by way of the file `scratch`) with both readers. Raises Violation."""
    scratch.write_bytes(data)
    start = time.perf_counter()
    first, error = _read(lambda: _torch_arrays(scratch))
    middle = time.perf_counter()
    if not portable:
        return Outcome(error, middle - start, 0.0)
    second, other = _read(lambda: {k: (v.shape, str(v.dtype), v.tobytes()) for k, v in reader.load(scratch).items()})
    end = time.perf_counter()
    if error != other:
        raise Violation(f"the readers disagree: compiled {error}, numpy {other}")
    if first != second or (first and list(first) != list(second or {})):
        raise Violation("the readers give different arrays")
    return Outcome(error, middle - start, end - middle)


def _read(read) -> tuple[dict | None, str]:
    try:
        return read(), "decoded"
    except FileError as error:
        text = str(error)
        if not text or len(text) > MAX_MESSAGE or not text.isprintable():
            raise Violation(f"a message of {len(text)} characters: {text[:500]!r}") from error
        return None, type(error).__name__
    except Exception as error:
        raise Violation(f"{type(error).__name__}: {str(error)[:300]}") from error


def _torch_arrays(path: Path) -> dict[str, tuple[tuple[int, ...], str, bytes]]:
    """By state-dict key: shape, numpy dtype and bytes, as the numpy reader gives them."""
    model = tq.load(path)
    assert str(model.report)
    arrays = {}
    for key, tensor in model.state_dict().items():
        wide = tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor
        array = np.asarray(wide.numpy())
        arrays[key] = array.shape, str(array.dtype), array.tobytes()
    return arrays
