"""Where the bits of a file went, and the report of it. Every number in bytes comes from the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from transquant import grid
from transquant.bitstream import EncodedFile, split_bits
from transquant.channels import KeptChannels, count_channels
from transquant.container import header_bytes, tensor_shapes
from transquant.container.dtypes import DTYPES
from transquant.metadata import read_activations, read_distortions
from transquant.records import (
    BatchNormEntry,
    CodedEntry,
    Container,
    Entry,
    Plan,
    RawEntry,
    RawSpec,
    Statistics,
    TensorBits,
    is_packed,
)
from transquant.report import LayerReport, Report

if TYPE_CHECKING:  # torch comes with it
    from transquant.encoder import Draft

KIND_NAMES = {"i": "identity", "d": "dct", "k": "klt", "e": "elt"}
AXIS_NAMES = {"r": "rows", "c": "channels", "k": "kernel", "j": "joint"}  # of the tensor as it is stored


def report_of(
    plan: Plan,
    stats: Statistics,
    draft: Draft,
    encoded: EncodedFile,
    measured: float | None,
    settings: Mapping[str, Any],
    gains: Mapping[str, float],
    verification: tuple[Any, ...] = (),
    activations: tuple[float, float] | None = None,
) -> Report:
    """The report of a compression that has just been done; `gains` of its transforms, in bits a value; `activations`: mean
    bits a value of inputs, and the predicted distortion of that."""
    total = max(draft.predicted, 1e-300)
    shares = {name: d / total for name, d in draft.distortions.items()}
    rows = tuple(_rows(draft.entries, encoded.bits, draft.step, shares, gains))
    raw = tuple((s.name, s.reason) for s in plan.specs if isinstance(s, RawSpec))
    return _report(
        rows, encoded.data, encoded.raw_bytes, plan.original_bytes, plan.num_parameters, stats.metric,
        draft.predicted, measured, raw, settings, verification, activations, _kept(plan.kept, draft.entries),
    )  # fmt: skip


def file_report(container: Container, data: bytes, plane_bits: Sequence[float], packed_bits: Mapping[str, TensorBits]) -> Report:
    """The report that a file gives of itself; `plane_bits` as decoding counted them, and those of packed tensors."""
    coded = [e for e in container.entries if isinstance(e, CodedEntry | BatchNormEntry)]
    in_symbols = [e for e in coded if not is_packed(e)]
    bits = {**split_bits(in_symbols, plane_bits), **packed_bits}
    raw_bytes = sum(len(s.data) for s in container.sections if s.kind == "r")
    metric, predicted, shares = read_distortions(container.metadata, [e.name for e in coded])
    parameters = original = 0
    for entry in container.entries:
        values, size = _original(entry)
        parameters += values
        original += size
    rows = tuple(_rows(container.entries, bits, container.step, shares))
    raw = tuple((e.name, "exact") for e in container.entries if isinstance(e, RawEntry))
    return _report(
        rows,
        data,
        raw_bytes,
        original,
        parameters,
        metric,
        predicted,
        None,
        raw,
        {},
        activations=read_activations(container.metadata),
        kept=_kept(container.kept, container.entries),
    )


def parameters_of(container: Container) -> int:
    """Parameters of a file, as the report counts them."""
    return sum(_original(entry)[0] for entry in container.entries)


def _report(
    rows: tuple[LayerReport, ...], data: bytes, raw_bytes: int, original: int, parameters: int, metric: str,
    predicted: float | None, measured: float | None, raw: tuple[tuple[str, str], ...], settings: Mapping[str, Any],
    verification: tuple[Any, ...] = (), activations: tuple[float, float] | None = None, kept: tuple[int, int] | None = None,
) -> Report:  # fmt: skip
    payload = round(sum(r.payload_bits for r in rows if r.kind == "weight") / 8)
    side = round(sum(r.payload_bits for r in rows if r.kind != "weight") / 8) + raw_bytes
    header = header_bytes(data)
    return Report(
        file_bytes=len(data), payload_bytes=payload, side_parameter_bytes=side,
        side_info_bytes=len(data) - header - payload - side, header_bytes=header, original_bytes=original,
        num_parameters=parameters, metric=metric, predicted_distortion=predicted, measured_distortion=measured,
        layers=rows, raw=raw, settings=settings, verification=verification,
        activations=activations, kept_channels=kept,
    )  # fmt: skip


def _kept(steps: Sequence[KeptChannels], entries: Sequence[Entry]) -> tuple[int, int] | None:
    """Channels that were kept, and all, of layers that had lost some."""
    return count_channels(steps, tensor_shapes(entries)) if steps else None


def _rows(
    entries: Sequence[Entry],
    bits: Mapping[str, TensorBits],
    step: tuple[int, int],
    shares: Mapping[str, float],
    gains: Mapping[str, float] | None = None,
) -> Iterator[LayerReport]:
    for entry in entries:
        if isinstance(entry, CodedEntry):
            kind = "weight" if len(entry.shape) > 1 else "vector"
            transform = _transform_name(entry)
            size = None if entry.coding == "f" else float(grid.steps(step, np.array([[entry.qp]]))[0, 0])
            count, shape = prod(entry.shape), entry.shape
        elif isinstance(entry, BatchNormEntry):
            kind, size, count, shape = "batchnorm", None, 2 * entry.channels, (entry.channels,)
            transform = "identity"
        else:
            continue
        yield LayerReport(
            entry.name,
            shape,
            kind,
            transform,
            count,
            bits[entry.name].payload,
            bits[entry.name].side,
            step=size,
            distortion_share=shares.get(entry.name),
            basis_bits=bits[entry.name].basis,
            transform_gain=None if gains is None else gains.get(entry.name),
            activation_bits=getattr(getattr(entry, "activation", None), "bits", None),
        )


def _transform_name(entry: CodedEntry) -> str:
    name = KIND_NAMES[entry.transform]
    if entry.transform != "i":
        name += f" {AXIS_NAMES[entry.axis]}"
    return name + (" fixed" if entry.coding == "f" else "")


def _original(entry: Entry) -> tuple[int, int]:
    """(parameters, bytes) of the tensors an entry stands for; raw floating tensors count as parameters."""
    if isinstance(entry, BatchNormEntry):
        counter = 0 if entry.batches_tracked is None else 8
        return 2 * entry.channels, 4 * entry.channels * DTYPES[entry.dtype].size + counter
    if isinstance(entry, CodedEntry | RawEntry):
        count = prod(entry.shape)
        return count * ("float" in entry.dtype), count * DTYPES[entry.dtype].size
    return 0, 0
