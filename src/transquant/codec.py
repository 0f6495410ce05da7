"""The whole story on one page.

    compress:   plan → collect → (ranks) → (tune) → search on c: [metric → steps → feedback → symbols → encode] → write
                                          (at last layer by layer: paired inputs → targets → metric → …)
    load:       read → decode → dequantize → state dict → install

One scalar c sets every step in the model (Δ = c/√sensitivity), so a target of any kind is a one-dimensional search on it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from transquant import bitstream, modules, packing
from transquant.accounting import file_report, report_of
from transquant.activations import parse_activations, plan_activations
from transquant.calibrating import calibrate
from transquant.choices import CODERS, KINDS, Choice, LayerTransform, Method
from transquant.container import check_writable, read_container, read_file, write_file
from transquant.dequantizer import dequantize
from transquant.distillation import FROM as DISTILL_FROM
from transquant.encoder import Encoder, Source
from transquant.entropy.lanes import decode_planes
from transquant.errors import InputError
from transquant.guard import unchanged
from transquant.inputs import load_weights, plan_of
from transquant.progressive import Fixed
from transquant.rank_choice import choose_ranks
from transquant.records import (
    GRAPH,
    BandCodes,
    Coded,
    CodedEntry,
    CodedTensor,
    Container,
    InputStats,
    LayerStats,
    Limits,
    Plan,
    Statistics,
    TensorBits,
)
from transquant.refinement import live_in_order, samples_in_order
from transquant.report import Report
from transquant.row_depths import parse_depths
from transquant.running import install as run_as
from transquant.running import tensors
from transquant.stats import Reference
from transquant.stats.copies import wide_copy
from transquant.stats.metric import METRICS
from transquant.target_search import TargetSearch
from transquant.targets import parse_size, parse_target
from transquant.transform_choice import ChosenTransform
from transquant.verification import verify as verify_groups
from transquant.weights import CodedWeight
from transquant.work import WorkFolder
from transquant.workers import spread, workers

if TYPE_CHECKING:
    from transquant.export import ExportedWeight

_log = logging.getLogger("transquant")

Progress = Callable[[str, int, int], None]
M = TypeVar("M", bound=nn.Module)

STATE_BITS = 3  # log2 of the number of states of a trellis
MORE_STATE_BITS = {6: 4, 7: 5, 8: 5, 9: 6}  # by effort
KEPT = (  # what a work folder may hold
    Statistics, LayerStats, InputStats, CodedWeight, CodedTensor, CodedEntry, BandCodes, ChosenTransform, LayerTransform, Fixed,
)  # fmt: skip
WORTH_THREADS = 1 << 17  # bytes of symbol sections that are decoded in threads


@dataclass(frozen=True, slots=True)
class CompressedModel:
    """A compressed file in memory: `data` are its bytes, `report` says where they went."""

    data: bytes
    report: Report
    limits: Limits | None = None  # what `load` was given
    decoded: list[Mapping[str, np.ndarray]] = field(default_factory=list, repr=False, compare=False)  # by `load`, until it is taken

    def __repr__(self) -> str:
        return f"CompressedModel({len(self.data):,} bytes, {self.report.bits_per_parameter:.3f} bits a parameter)"

    def save(self, path: str | PathLike[str]) -> None:
        """Write the file; it appears whole or not at all. Raises errors.OutputError."""
        write_file(path, self.data)

    def state_dict(self, limits: Limits | None = None) -> dict[str, Tensor]:
        """All keys of the original state dict, decoded, in their dtypes; tied tensors share memory.

        Raises errors.FileError."""
        return {k: v for k, v in self._tensors(limits).items() if k != GRAPH}

    def _tensors(self, limits: Limits | None = None) -> dict[str, Tensor]:
        container = read_container(self.data, limits or self.limits)
        # what loading has decoded goes to the first who asks: tensors are the caller's to change, so it is given once
        arrays = self.decoded.pop() if self.decoded else bitstream.values(container, _decode(container)[0], dequantize)
        return tensors(arrays, container)

    def install(self, model: M, mode: str = "float", *, memory: int | str | None = None) -> M:
        """Put the weights into a module, strictly, and return it (where the module itself is replaced, what replaces it).

        Where channels were removed from the network that was compressed (docs/pruning.md), a module of its original class loses
        them first, in place: layers get new, smaller parameters. A module of the smaller shapes takes the weights as they are.

        `mode`: "float"; "transform": layers with a transform run as two, basis and transformed kernels; "packed": fixed-length
        codes stay packed in memory, and a weight is unpacked when its layer runs; "lazy": a weight is decoded when its layer runs,
        and kept while all that is kept takes at most `memory` (bytes, or "64MB"; None: as much as the three largest weights in
        float, or as decoding a section takes anyway); "activations": inputs of layers are rounded to what the file says of them
        (`compress(activations=)`); "int8": the same in integers, weights with eight bits an output channel. Packed, lazy and int8
        weights have no gradients, and `state_dict()` has no packed and lazy ones. A module on the meta device takes the decoded
        tensors themselves. `running.weight_bytes(model)` says what is in memory.

        Raises InputError where the weights do not fit or the file has nothing to run in this mode."""
        limit = None if memory is None else parse_size(memory, "memory")
        return run_as(model, read_container(self.data, self.limits), self.state_dict, mode, limit)

    def export_onnx(
        self, model: nn.Module, example_input: Any, path: str | PathLike[str], weights: str = "float"
    ) -> tuple[ExportedWeight, ...]:
        """Write a module with the decoded weights as an .onnx file of standard operators, with an open batch axis.

        `model` is copied, never changed; a network in half precision is exported in float32. `example_input`: a tensor, a tuple of
        positional inputs, or a mapping of keyword inputs. `weights`: "float"; or "int8" with a scale an output channel, or
        "int4" (operator set 21) with one for 32 inputs, which round the decoded weights once more, to the nearest integers
        (relative errors of about 0.01 and 0.1 on trained networks). Returns a record for each weight, with its
        relative error. Raises InputError, MissingDependency, OutputError, errors.FileError."""
        from transquant import export

        export.check_form(weights)
        check_writable(path)
        twin = self.install(wide_copy(model)).cpu()
        data, records = export.export_module(twin, example_input, weights)
        write_file(path, data)
        return records

    def save_onnx(self, path: str | PathLike[str]) -> None:
        """Write the .onnx file that was compressed, with decoded values for its weights.

        Raises InputError where the file was not made from one, MissingDependency, OutputError, errors.FileError."""
        from transquant import export

        check_writable(path)
        tensors = self._tensors()
        graph = tensors.pop(GRAPH, None)
        if graph is None:
            raise InputError("the file holds no ONNX graph, since it was not made from an .onnx file; export_onnx takes the model")
        limits = self.limits or Limits()
        room = min(limits.max_decoded_bytes, max(limits.free_expansion_bytes, limits.max_expansion * len(self.data)))
        write_file(path, export.restored(graph, tensors, room))


def compress(
    model: nn.Module | Mapping[str, Tensor] | str | PathLike[str],
    calibration: Iterable[Any] | None = None,
    *,
    bits: float | None = None,
    size: int | str | None = None,
    ratio: float | None = None,
    distortion: float | None = None,
    step: float | None = None,
    max_drop: tuple[Callable[[Any], float], float] | None = None,
    activations: float | None = None,
    depths: Mapping[str, Any] | None = None,
    metric: str = "auto",
    transform: str = "auto",
    axis: str | None = None,
    coding: str = "entropy",
    coder: str = "adaptive",
    feedback: bool = True,
    trellis: bool = True,
    objective: str = "bytes",
    macs: float | None = None,
    effort: int = 5,
    overrides: Mapping[str, Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
    verify: bool = False,
    work: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> CompressedModel:
    """Compress a trained network to a file of a given size.

    `model`: a module, a state dict, a path to one (.safetensors, .pt, .pth, .bin) or to an .onnx file; it is never changed.
    `calibration`: any iterable of batches (tensor; tuple or list whose first element is the input; mapping of keyword inputs), or
    None: then the relative squared error of the weights is the metric. Exactly one target: `bits` (8 · bytes of the file /
    parameters), `size` (bytes, or "64KB", "64KiB"), `ratio` (bytes of the tensors / bytes of the file), `distortion` (measured, in
    units of the metric), `step` (the scalar c; no search), or `max_drop=(evaluate, points)`, where `evaluate(model) -> float`,
    higher is better.
    `activations`: bits a value, 2 to 8 on average over all inputs of coded layers, to which modes "activations" and "int8" of
    `install` quantize them (docs/activations.md); None: not.
    `depths`: {weight: bits a row, (O,) or one for all, 0 to 16} says how the steps of rows compare: R·2^(1−bits), R the row's
    largest magnitude, times a factor for the whole file that the target sets, or `step` itself (1: the very depths); a row of 0
    bits is zero. Without transforms.
    `metric`: "kl", "mse", "weights" or "auto". `transform`: "auto" takes for each layer what costs least, its basis included;
    "identity", "dct", "klt", "elt" force one wherever it fits, over `axis` "kernel", "input", "output" or "joint" (None: the
    best of them). `coding`: "entropy", or "fixed" for bit depths a group of bands, packed (Young et al.). `coder`: "adaptive", or
    "static" for tables that come with the weights and stay: decodes up to four times as fast, at most about 1 % larger.
    `feedback`: closed loop, or plain rounding of each coefficient. `trellis`: entropy-coded weights in the closed loop go along the
    best path of a trellis, or else each is rounded with a dead zone. `objective`: "macs" looks for layers that can be the product
    of two thin ones at little distortion, so that `install(model, mode="transform")` runs with at most the share `macs` of the
    network's multiply–adds (0 to 1; needs calibration). `overrides`: {name pattern: "exact"} stores matching tensors exactly.
    Above 2²⁴ weights sizes are searched for on a sample of each layer's rows, then met in one or two passes; without calibration
    such a model may be larger than memory, if it is a path. `effort` 1 or 2: nothing is tuned on held-back samples; 3 to 9: all
    is. From 5 on layers are quantized in execution order at last, each making up for the errors of those before (below 7 on at
    most 512 samples, and not in very large networks). From 6 on biases and BatchNorms learn the float network's outputs at the
    end, and trellises have 16, 32, 32 and 64 states instead of 8 (64 take three times as long). From 8 on, for a file
    of a given size, rows are fixed group by group while the others, still float, learn the float network's outputs: the held-back
    samples decide whether that is better. `forward(model, batch)` and `output(result)` override how a batch is run and what
    counts. `verify`: measure the closed-form distortion group by group, for the report.
    `work`: a folder for finished parts (`work.WorkFolder`), from which the same call goes on after it was killed; made if
    there is none, and then deleted at the end. `progress(stage, done, total)` is called as work goes on.

    Where torch.distributed has been initialised, all its processes must call with the same arguments; they share the work, and
    each returns the whole result.

    Files are at most the asked size and at most 1 % (or 64 bytes) smaller, down to steps of 1/130,000 of a tensor's largest
    value: no file is finer. The same input, options and seed give the same
    file, whatever the number of threads and processes. Raises InputError, TargetError.
    """
    _check_options(metric, objective, macs, effort, seed)
    method = _method(transform, axis, coding, coder, feedback, trellis, effort)
    plain = transform == "auto" and coding == "entropy" and feedback
    if macs is not None and not (plain and calibration is not None and metric != "weights"):
        raise InputError(
            "objective 'macs' needs calibration data, a metric of the output, transform 'auto', coding 'entropy' and feedback"
        )
    if depths is not None and (macs is not None or coding != "entropy" or transform not in ("auto", "identity")):
        raise InputError("depths need coding 'entropy', objective 'bytes', and transform 'identity' or 'auto'")
    if macs is not None or depths is not None:  # any other transform would cost some, or change what a row is
        method = replace(method, transform="identity")
    say = progress or (lambda stage, done, total: None)
    given = {"bits": bits, "size": size, "ratio": ratio, "distortion": distortion, "step": step, "max_drop": max_drop}
    module, state, plan = _open(model, overrides)
    target = parse_target(plan, given)
    if module is None and (calibration is not None or target.kind == "drop"):
        raise InputError("calibration and max_drop need the model itself (--model), not only its weights")
    if verify and calibration is None:
        raise InputError("verify needs calibration data: without it there is nothing to measure")
    if calibration is None and metric in ("kl", "mse"):
        raise InputError(f"metric {metric!r} needs calibration data; without it the metric is 'weights'")
    rows = parse_depths(plan, depths)
    input_bits = parse_activations(activations, calibration is not None and metric != "weights")

    folder = None if work is None else lambda: WorkFolder(work, KEPT)
    with torch.inference_mode(False), unchanged(module), workers(folder) as pool:
        asked_for = given if max_drop is None else "max_drop"
        options = asked_for, method, macs, metric, effort, seed, verify, work is None, input_bits, rows
        pool.processes.agree("models or options", options, plan, state)
        source = Source(*modules.gather(plan, state))
        most = samples_in_order(plan, effort) if method.feedback else 0
        learns = effort >= DISTILL_FROM and method.feedback
        seen = calibrate(
            module, calibration, plan, source, metric, forward, output, seed, pool, say, most, live_in_order(effort), learns,
            macs is not None, input_bits is not None,
        )  # fmt: skip
        stats, reference = seen.stats, seen.reference
        inputs = None if input_bits is None else plan_activations(stats, input_bits, pool)
        encoder = Encoder(plan, source, stats, pool, method, activations=inputs, depths=rows)
        if rows and target.kind == "step":
            target = replace(target, value=target.value * encoder.unit)
        if macs is not None and seen.calls is not None:
            ranks, share = choose_ranks(plan, encoder.layers, source.values, seen.calls, macs)
            encoder = encoder.transformed(ranks)
        search = TargetSearch(encoder, reference, module, target, effort, say, seen.paired, seen.teacher)
        draft, choice = search.run()
        measured = reference.distortion(draft.state()) if reference else None
        encoded = search.encoder.encode(draft)
        points = _verified(search, reference, draft.c, choice, say) if verify else ()
        taken, computed = pool.counts("layer")
    if pool.folder is not None and pool.processes.rank == 0:
        pool.folder.finish()
    _log.info("%d bytes; chosen on held-back samples: %s; c = %.4g", len(encoded.data), choice, draft.c)
    asked = {k: v for k, v in given.items() if v is not None and k != "max_drop"}
    settings: dict[str, Any] = {
        "target": asked,
        "seed": seed,
        "effort": effort,
        "choice": choice,
        "in_order": search.in_order,
        "progressive": search.progressive,
        "distilled": search.distilled,
        "c": draft.c,
        "samples": stats.samples,
    }
    if macs is not None:
        settings["macs"] = {"share": share, "bands": {name: rank.kept for name, rank in ranks.items()}}
    if rows:
        settings["factor"] = draft.c / encoder.unit
    if work is not None:
        settings["work"] = {"layers_taken": taken, "layers_computed": computed}
    if search.scores:
        settings["score"] = {"float": search.scores[0], "compressed": search.scores[1]}
    quantized = None if inputs is None else (inputs.mean_bits, inputs.predicted)
    gains = {name: t.gain for name, t in search.transforms.items()}
    report = report_of(plan, stats, draft, encoded, measured, settings, gains, points, quantized)
    return CompressedModel(encoded.data, report)


def load(path: str | PathLike[str], limits: Limits | None = None, *, lazy: bool = False) -> CompressedModel:
    """Read a compressed file and check it whole: read → decode → dequantize, the mirror of compress.

    `lazy`: section by section, so that no more than one is decoded in memory; for models that will be installed packed or lazy.
    Raises InputError where it cannot be read, errors.FileError where it is bad."""
    return load_bytes(read_file(path, limits), limits, lazy=lazy)


def load_bytes(data: bytes, limits: Limits | None = None, *, lazy: bool = False) -> CompressedModel:
    """The same of a file in memory. Raises errors.FileError where it is bad."""
    container = read_container(data, limits)
    kept: list[Mapping[str, np.ndarray]] = []
    bits: list[float] = []
    packed: dict[str, TensorBits] = {}
    for part in bitstream.pieces(container) if lazy else [container]:
        coded, own = _decode(part)
        arrays = bitstream.values(part, coded, dequantize)
        bits += own
        packed |= {n: packing.tensor_bits(t) for n, t in coded.items() if isinstance(t, CodedTensor) and t.codes is not None}
        if not lazy:
            kept.append(arrays)
    return CompressedModel(data, file_report(container, data, bits, packed), limits, kept)


def _decode(container: Container) -> tuple[dict[str, Coded], list[float]]:
    """Symbols of all coded entries, and the information content of all planes in file order."""
    bits: list[float] = []

    def decoder(sections: Sequence[Sequence[bitstream.StreamJob]]) -> None:
        jobs = [job for section in sections for job in section]
        done = iter(spread(lambda job: decode_planes(*job), jobs, sum(len(job[0]) for job in jobs) >= WORTH_THREADS))
        for section in sections:
            bits.extend(sum(each) for each in zip(*(next(done)[1] for _ in section), strict=True))

    return bitstream.decode(container, decoder), bits


def _verified(search: TargetSearch, reference: Reference | None, c: float, choice: Choice, say: Progress) -> tuple[Any, ...]:
    if reference is None:
        return ()
    return verify_groups(search.encoder, reference, c, choice, lambda done, total: say("verification", done, total))


def _method(transform: str, axis: str | None, coding: str, coder: str, feedback: bool, trellis: bool, effort: int) -> Method:
    for name, value, allowed in (
        ("transform", transform, ("auto", *KINDS)),
        ("axis", axis, (None, "input", "output", "kernel", "joint")),
        ("coding", coding, ("entropy", "fixed")),
        ("coder", coder, tuple(CODERS)),
        ("feedback", feedback, (True, False)),
        ("trellis", trellis, (True, False)),
    ):
        if value not in allowed:
            raise InputError(f"{name} is {value!r}, allowed are {', '.join(map(repr, allowed))}")
    if transform == "dct" and axis not in (None, "kernel"):
        raise InputError(f"axis is {axis!r}, allowed is 'kernel' with transform 'dct'")
    state_bits = MORE_STATE_BITS.get(effort, STATE_BITS) if trellis and feedback and coding == "entropy" else 0
    return Method(transform, axis, coding, feedback, state_bits, CODERS[coder])


def _check_options(metric: str, objective: str, macs: float | None, effort: int, seed: int) -> None:
    if metric not in ("auto", *METRICS):
        raise InputError(f"metric is {metric!r}, allowed are 'auto', {', '.join(map(repr, METRICS))}")
    if objective not in ("bytes", "macs"):
        raise InputError(f"objective is {objective!r}, allowed are 'bytes', 'macs'")
    if macs is not None and (isinstance(macs, bool) or not isinstance(macs, int | float) or not 0 < macs <= 1):
        raise InputError(f"macs is {macs!r}, allowed are shares of the network's multiply–adds above 0, up to 1")
    if (objective == "macs") != (macs is not None):
        raise InputError(
            f"objective is {objective!r} and macs is {macs!r}: give both objective='macs' and macs=0.9, say, or neither"
        )
    if isinstance(effort, bool) or not isinstance(effort, int) or not 1 <= effort <= 9:
        raise InputError(f"effort is {effort!r}, allowed are integers 1 to 9")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed is {seed!r}, allowed are integers from 0")


def _open(model: Any, overrides: Mapping[str, Any] | None) -> tuple[nn.Module | None, Mapping[str, Tensor], Plan]:
    """(module or None, state dict, plan) of what the caller gave."""
    if isinstance(model, str | PathLike):
        model = load_weights(model)
    if isinstance(model, Mapping):
        return None, model, modules.apply_overrides(plan_of(model), overrides)
    plan = modules.plan_model(model)
    return model, model.state_dict(), modules.apply_overrides(plan, overrides)
