"""The file that training starts from, and files of the same layout with what it has learned.

compress ─ file ─ Template ─┬─ steps, bases, symbols ─ soft weights ─ training ─ symbols ─┐
                            └─ entries, steps of vectors ─────────────────────────────────┴─ bitstream.encode ─ file
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from transquant import bitstream, modules
from transquant.bitstream import Part
from transquant.container import read_container
from transquant.entropy.lanes import decode_planes, encode_planes
from transquant.errors import InputError
from transquant.grid import MAX_QP, steps
from transquant.metadata import ACTIVATIONS
from transquant.records import (
    AliasEntry,
    BatchNormEntry,
    Coded,
    CodedBatchNorm,
    CodedEntry,
    CodedTensor,
    Coder,
    Container,
    FloatArray,
    IntArray,
    Limits,
    Plan,
)
from transquant.training.soft import DIVERGED
from transquant.weights import quarter_octaves

VECTOR_QUARTERS = 4  # quarter octaves
ADAPTIVE: tuple[Coder, ...] = ("m", "s")  # tokens, and binary decisions


@dataclass(frozen=True, slots=True)
class Template:
    """A compressed network: `data` are its bytes, `coded` by entry, `plan` of the module it was made of, `coder` how its symbols
    are coded."""

    plan: Plan
    data: bytes
    container: Container
    coded: Mapping[str, Coded]
    coder: Coder

    @classmethod
    def of(cls, plan: Plan, data: bytes) -> Template:
        """The template that a file is."""
        container = read_container(data, Limits(1 << 62, 1 << 62))
        coded = bitstream.decode(container, lambda sections: [[decode_planes(*job)[0] for job in s] for s in sections])
        coder: Coder = next((s.kind for s in container.sections if s.kind not in "pr"), ADAPTIVE[0])  # type: ignore[misc]
        return cls(plan, data, container, coded, coder)

    def smallest(self, state: Mapping[str, Tensor]) -> Template:
        """The same with that adaptive coder whose file is smaller (tables that stay are their owner's choice). Binary decisions
        have more contexts, tokens are fewer: either may take two per cent less than the other; tokens are decoded faster."""
        if self.coder not in ADAPTIVE:
            return self
        tried = [replace(self, coder=coder) for coder in ADAPTIVE]
        return min(tried, key=lambda t: len(t.file(t.weights, state, {})))

    @property
    def weights(self) -> dict[str, CodedTensor]:
        """Coded matrices by name."""
        entries = (e for e in self.container.entries if isinstance(e, CodedEntry) and len(e.shape) > 1)
        return {e.name: t for e in entries if isinstance(t := self.coded[e.name], CodedTensor)}

    def file(self, weights: Mapping[str, CodedTensor], state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
        """The file of these weights, and of the vectors and raw tensors of a state dict with the template's steps."""
        values, raw = modules.gather(self.plan, state)
        parts = self._parts(weights, values, state)
        told = {key: text for key, text in self.container.metadata.items() if key == ACTIVATIONS}  # which stays true
        told |= metadata
        done = bitstream.encode(
            self.container.step, parts, raw, lambda jobs: (encode_planes(*job) for job in jobs), self.coder, lambda: told,
            self.container.kept,
        )  # fmt: skip
        return done.data

    def _parts(
        self, weights: Mapping[str, CodedTensor], values: Mapping[str, FloatArray], state: Mapping[str, Tensor]
    ) -> Iterator[Part]:
        for entry in self.container.entries:
            if entry.name in weights:
                yield weights[entry.name].entry, weights[entry.name]
            elif isinstance(entry, CodedEntry):
                qp, symbols = self._vector(entry.name, values[entry.name], entry.qp)
                yield (own := replace(entry, qp=qp)), CodedTensor(own, symbols.reshape(entry.rows, entry.columns))
            elif isinstance(entry, BatchNormEntry):
                scale = self._vector(entry.name, values[f"{entry.name}.scale"], entry.qps[0])
                shift = self._vector(entry.name, values[f"{entry.name}.shift"], entry.qps[1])
                tracked = entry.batches_tracked if entry.batches_tracked is None else int(state[entry.key("num_batches_tracked")])
                norm = replace(entry, qps=(scale[0], shift[0]), batches_tracked=tracked)
                yield norm, CodedBatchNorm(norm, scale[1], shift[1])
            else:
                yield entry, None

    def _vector(self, name: str, vector: FloatArray, qp: int) -> tuple[int, IntArray]:
        """Step index and symbols int32 (C,) of a vector, as in `Encoder`, but finer: what has been trained bears less. Raises
        InputError where it is no longer a number."""
        if not np.isfinite(vector).all():
            raise InputError(f"{name!r} is no longer a finite number: {DIVERGED}")
        qp = max(qp - VECTOR_QUARTERS, -MAX_QP)
        qp += quarter_octaves(np.abs(vector) / self.size(qp))
        return qp, np.rint(vector.reshape(-1) / self.size(qp)).astype(np.int32)

    def size(self, qp: int) -> float:
        """The step of an index."""
        return float(steps(self.container.step, np.array([[qp]]))[0, 0])

    def stepped(self, step: tuple[int, int]) -> Template:
        """The same with another global step."""
        return replace(self, container=replace(self.container, step=step))

    def aliases(self) -> dict[str, str]:
        """Second names of tensors, and whose."""
        return {e.name: e.of for e in self.container.entries if isinstance(e, AliasEntry)}
