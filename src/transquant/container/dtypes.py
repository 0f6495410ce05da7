"""The dtypes of FORMAT.md: bytes an element and numpy type."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class DType:
    """`size` in bytes; `numpy` is the array type a reader returns before widening (uint16 bits for bfloat16)."""

    size: int
    numpy: type[np.generic]


DTYPES = {
    "float32": DType(4, np.float32),
    "float16": DType(2, np.float16),
    "bfloat16": DType(2, np.uint16),
    "float64": DType(8, np.float64),
    "int8": DType(1, np.int8),
    "int16": DType(2, np.int16),
    "int32": DType(4, np.int32),
    "int64": DType(8, np.int64),
    "uint8": DType(1, np.uint8),
    "bool": DType(1, np.bool_),
    "complex64": DType(8, np.complex64),
    "complex128": DType(16, np.complex128),
    "uint16": DType(2, np.uint16),
    "uint32": DType(4, np.uint32),
    "uint64": DType(8, np.uint64),
}
CODED_DTYPES = ("float32", "float16", "bfloat16", "float64")
