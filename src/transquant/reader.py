"""Reads compressed files with numpy alone: no torch, no numba. Gives the same float32 values, bit for bit."""

from __future__ import annotations

from os import PathLike

import numpy as np
from numpy.typing import NDArray

from transquant.bitstream import decode, values
from transquant.container import read_container, read_file
from transquant.entropy.portable import decode_planes
from transquant.records import GRAPH, Limits


def load(path: str | PathLike[str], limits: Limits | None = None) -> dict[str, NDArray[np.generic]]:
    """All tensors of a file by state-dict key, in their shapes and dtypes (bfloat16 as float32).

    Raises errors.FileError for a bad file, errors.InputError where there is none."""
    return loads(read_file(path, limits), limits)


def loads(data: bytes, limits: Limits | None = None) -> dict[str, NDArray[np.generic]]:
    """Like `load`, from the bytes of a file."""
    container = read_container(data, limits)
    coded = decode(container, lambda sections: [[decode_planes(*job) for job in s] for s in sections])
    return {name: array for name, array in values(container, coded).items() if name != GRAPH}
