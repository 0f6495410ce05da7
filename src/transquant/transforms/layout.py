"""A weight W[o, i, k] of O rows and n = I·K columns, seen as bands along one of its axes (FORMAT.md section 6). numpy only.

    axis          r    X, of the weight           T, in the coded matrix C
    "r" rows      O    X[o, (i,k)] = W[o, i, k]   T[b, (i,k)] = C[b, (i,k)]
    "c" channels  I    X[i, (o,k)] = W[o, i, k]   T[b, (o,k)] = C[o, (b,k)]
    "k" kernel    K    X[k, (o,i)] = W[o, i, k]   T[b, (o,i)] = C[o, (b,i)]
    "j" joint     n    X[(i,k), o] = W[o, i, k]   T[b, o]     = C[o, b]

Only the kernel axis reorders columns: its bands stay together, so that step exponents and contexts see a band as a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transquant.records import CodedEntry

Matrix = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Layout:
    """Shape letters of one weight, and the axis of its bands."""

    axis: str
    rows: int
    channels: int
    taps: int

    @classmethod
    def of(cls, entry: CodedEntry) -> Layout:
        """The layout of a coded matrix."""
        return cls(entry.axis, entry.rows, entry.shape[1], entry.taps)

    def bands(self, weight: Matrix) -> Matrix:
        """X (r, m) of a weight (O, n)."""
        if self.axis == "k":
            return np.ascontiguousarray(weight.reshape(-1, self.taps).T)
        return self.coded_bands(weight)

    def weight(self, x: Matrix) -> Matrix:
        """The weight (O, n) of X (r, m)."""
        if self.axis == "k":
            return np.ascontiguousarray(x.T).reshape(self.rows, self.channels * self.taps)
        return self.coded(x)

    def coded_bands(self, coded: Matrix) -> Matrix:
        """T (r, m) of a coded matrix (O, n)."""
        if self.axis == "r":
            return coded
        if self.axis == "j":
            return np.ascontiguousarray(coded.T)
        first, second = self._split
        return np.ascontiguousarray(coded.reshape(self.rows, first, second).transpose(1, 0, 2)).reshape(first, self.rows * second)

    def coded(self, t: Matrix) -> Matrix:
        """The coded matrix (O, n) of T (r, m)."""
        if self.axis == "r":
            return t
        if self.axis == "j":
            return np.ascontiguousarray(t.T)
        first, second = self._split
        return np.ascontiguousarray(t.reshape(first, self.rows, second).transpose(1, 0, 2)).reshape(self.rows, first * second)

    def per_band(self, values: Matrix) -> Matrix:
        """Values (r,) as an array that broadcasts against the coded matrix (O, n)."""
        if self.axis == "r":
            return values[:, None]
        return np.repeat(values, 1 if self.axis == "j" else self._split[1])[None, :]

    @property
    def _split(self) -> tuple[int, int]:
        """The two parts of a coded column index: bands, and what stays together in a band."""
        return (self.taps, self.channels) if self.axis == "k" else (self.channels, self.taps)
