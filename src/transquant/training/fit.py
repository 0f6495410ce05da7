"""A whole training in one call, that goes on where it was when it is killed.

model ─ a copy ─ prepare ─┬─ Loop ─ harden ─ file
     checkpoint, or none ─┘   └─ checkpoints
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from transquant import codec
from transquant.errors import InputError
from transquant.fingerprint import fingerprint
from transquant.guard import unchanged
from transquant.processes import processes
from transquant.training import distributed
from transquant.training.checkpoint import Checkpoints
from transquant.training.feed import Augment, Feed
from transquant.training.history import FitResult, Moment
from transquant.training.loop import Loop
from transquant.training.methods import METHODS
from transquant.training.network import RATE
from transquant.training.prepare import harden, prepare, soft_network
from transquant.training.recipe import Recipe, function, names, whole

FREE = ("rate", "vector_rate", "clip", "patience", "evaluate")  # what may be another when a training goes on
Progress = Callable[[str, int, int], None]
_log = logging.getLogger("transquant")


def fit(
    model: nn.Module,
    data: Any,
    *,
    method: str = "transform",
    bits: float | None = None,
    size: int | str | None = None,
    begin: float = 1.0,
    epochs: int = 10,
    batch: int = 128,
    rate: float = RATE,
    vector_rate: float | None = None,
    clip: float | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    teacher: nn.Module | str | None = None,
    distill: float = 0.5,
    temperature: float = 1.0,
    hints: Sequence[str] = (),
    hint: float = 10.0,
    augment: Augment | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    patience: int | None = None,
    autocast: str | None = None,
    micro_batches: int = 1,
    channels_last: bool = False,
    calibration_samples: int = 2048,
    start: codec.CompressedModel | None = None,
    equivalent: bool = True,
    transform: str = "auto",
    axis: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    effort: int = 3,
    seed: int = 0,
    work: str | PathLike[str] | None = None,
    progress: Progress | None = None,
    watch: Callable[[Moment], None] | None = None,
    **options: Any,
) -> FitResult:
    """Train a network for a file of a given size. `model` is never changed: `result.compressed.install(model)` does that.

    `data`: two tensors (inputs, labels), shuffled anew each epoch and cut into batches of `batch` (what does not fill the last
    is left for other epochs); or an iterable of batches (inputs, labels), or mappings with "labels", such as a DataLoader, that
    gives as many in each epoch; torch, numpy and random are seeded for it in each. `augment(inputs, labels, generator)` gives
    back both, changed. `method`, `bits`, `size`, `begin`, `start`, `equivalent`, `transform`, `axis`, `overrides`, `forward`,
    `output`, `effort` and `options` are those of `prepare`, `equivalent` where there are no hints; it is calibrated on about
    `calibration_samples` of the inputs, without `augment`.

    Adam goes over the weights, in their steps, at `rate`, and over all else at `vector_rate` (None: a tenth of that), both along
    one cosine to zero; `clip`: the largest norm of the gradient. `loss(outputs, labels)`: a mean over samples, None: cross-entropy.
    `teacher`: "self", the float network, or another module, whose outputs at `temperature` T have the share `distill` of the loss,
    as T² · KL(teacher ‖ network). `hints`: names of layers that shall put out what the teacher's layers of these names do; `hint`
    is the weight in the loss of their mean squared difference, in units of the variance, at first: it falls with the rate.
    `evaluate(model)`, higher is better, is called at the end of each epoch, with a model in eval mode that it must leave as it is;
    after `patience` epochs at the asked size without a better score the training ends. `autocast`: "bfloat16" computes layers in
    that, weights stay in float32. `micro_batches`: into so many each batch is cut, whose gradients and BatchNorm statistics are
    averaged; it takes less memory. `channels_last`: images in that memory format.

    `work`: a folder for checkpoints, from which the same call goes on after it was killed, to the same bits (with as many
    threads, on the same machine); made if there is none, and then deleted at the end. Of the arguments only `rate`,
    `vector_rate`, `clip`, `patience` and `evaluate` may then be others. `progress(stage, done, total)` is called as in
    `compress`, `watch(moment)` after each step.

    Where torch.distributed has been initialised, all its processes must call with the same arguments; they share the
    micro-batches, whose number is a multiple of theirs, process 0 alone evaluates and keeps checkpoints, and each returns the
    whole result.

    Raises InputError for bad arguments and data, checkpoints of another training, and a loss that is no longer a number;
    TargetError for a size that cannot be reached; OutputError where the folder cannot be made."""
    recipe = Recipe(
        epochs, rate, vector_rate, clip, loss, distill, temperature, names(hints), hint, evaluate, patience, autocast,
        micro_batches, channels_last, seed, forward, output,
    )  # fmt: skip
    for name, value, least in (("batch", batch, 1), ("calibration_samples", calibration_samples, 1)):
        whole(name, value, least)
    for name, given in (("augment", augment), ("progress", progress), ("watch", watch)):
        function(name, given)
    if isinstance(model, nn.Module) and soft_network(model) is not None:
        raise InputError("the model is prepared already: harden it first, or take a fresh copy")
    say = progress or (lambda stage, done, total: None)
    with torch.inference_mode(False), torch.enable_grad(), unchanged(None), processes() as job, job.together():
        distributed.check(micro_batches, job)
        feed = Feed(data, batch, augment, seed)
        taught = _teacher(model, teacher, bool(recipe.hints))
        about: dict[str, Any] = {
            "method": method, "bits": bits, "size": size, "begin": begin, "transform": transform, "axis": axis,
            "overrides": None if overrides is None else dict(overrides), "effort": effort, "options": options,
            "equivalent": equivalent, "start": None if start is None else fingerprint(start.data).hex(),
            "calibration_samples": calibration_samples, "augment": _name(augment),
            "teacher": None if taught is None else _weights(taught),
            **{key: _name(getattr(recipe, key)) for key in recipe.__slots__}, **feed.identity(),
        }  # fmt: skip
        about = {"model": _weights(model), **{key: repr(value) for key, value in about.items()}}
        job.agree("models, data or options", about)
        checkpoints = None if work is None else job.first(lambda: Checkpoints(work))
        found = job.once(lambda: checkpoints.newest() if checkpoints else None)
        if found is not None and checkpoints is not None:
            _same(found["about"], about, checkpoints)
            start = codec.load_bytes(found["start"])
        twin = copy.deepcopy(model)
        # a checkpoint has what a method knows of the samples
        seen = start is None or (found is None and method in METHODS and METHODS[method].by_rows)
        network = prepare(
            twin, feed.calibration(calibration_samples) if seen else None, method=method, bits=bits, size=size,
            steps=epochs * feed.count, begin=begin, transform=transform, axis=axis, overrides=overrides, forward=forward,
            output=output, effort=effort, seed=seed, start=start,
            equivalent=False if recipe.hints else equivalent, progress=say, **options,
        )  # fmt: skip
        network.fate.kept = True  # nobody waits for the file of a training that fails, but who calls
        loop = Loop(twin, network, taught, feed, recipe, job, checkpoints, _both(say, watch))

        def save() -> None:
            if checkpoints is not None and job.rank == 0:
                checkpoints.save(network.step, {"about": about, "start": network.template.data, **loop.state()})

        if found is None:
            save()
        else:
            loop.load(found)
            _log.info("going on from step %d", network.step)
        stopped = loop.run(save)
        compressed = harden(twin)
    if checkpoints is not None and job.rank == 0:
        checkpoints.finish()
    return FitResult(compressed, tuple(loop.history), stopped)


def _teacher(model: nn.Module, teacher: nn.Module | str | None, hinted: bool) -> nn.Module | None:
    """A copy that learns nothing. Raises InputError."""
    if teacher is None:
        if hinted:
            raise InputError("hints come from a teacher: give teacher='self', or a module")
        return None
    if isinstance(teacher, str) and teacher == "self":
        teacher = model
    if not isinstance(teacher, nn.Module):
        raise InputError(f"teacher is {teacher!r:.50}, allowed are 'self', a module, or None")
    return copy.deepcopy(teacher).eval().requires_grad_(False)


def _weights(model: nn.Module) -> str:
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}, allowed is an nn.Module")
    return fingerprint(model.state_dict()).hex()


def _name(value: Any) -> Any:
    """A function's name, all else as it is."""
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else value


def _same(found: Mapping[str, str], given: Mapping[str, str], checkpoints: Checkpoints) -> None:
    """Raises InputError where a checkpoint is of another training than this."""
    for key in given:
        if found.get(key) == given[key]:
            continue
        if key in FREE:
            _log.warning("going on with %s %s instead of %s", key, given[key], found.get(key))
            continue
        hashed = key in ("model", "data", "teacher", "start")
        what = "" if hashed else f", which is {given[key]}; the checkpoint has {found.get(key)}"
        raise InputError(
            f"the checkpoints in {checkpoints.path} are of another training: they differ in {key}{what}; "
            "give what they were made with, or another folder"
        )


def _both(say: Progress, watch: Callable[[Moment], None] | None) -> Callable[[Moment], None]:
    def told(moment: Moment) -> None:
        say("training", moment.step, moment.steps)
        if watch is not None:
            watch(moment)

    return told
