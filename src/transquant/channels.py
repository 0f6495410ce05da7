"""Where channels lie in tensors: what pruning finds in a network, and what a file says was kept (FORMAT.md section 10)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slice:
    """Where channels lie in a tensor: channel i has the indices start + i·span … start + (i + 1)·span − 1 along `axis` of the
    tensor with the state-dict key `key`."""

    key: str
    axis: int
    start: int
    span: int
