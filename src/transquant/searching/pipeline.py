"""The whole search on one page: pruning and quantization as one problem (AJPQ, Tang, Wei and Li, arXiv 2011.06231).

    collect → groups → removals, tables → [propose → budget → predict → observe] → best few for real → compress

A channel of zero bits is a channel that is removed, so one policy says both. Every episode is predicted, in about a millisecond;
some are tried for real; what is measured decides among the best.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transquant import modules
from transquant.calibrating import calibrate
from transquant.choices import Choice, Method
from transquant.codec import STATE_BITS, CompressedModel, compress
from transquant.copying import deep_copy
from transquant.encoder import Encoder, Source
from transquant.errors import InputError
from transquant.fingerprint import fingerprint
from transquant.guard import unchanged
from transquant.inference.cost import measure
from transquant.searching.budget import Budget
from transquant.searching.candidates import CRITERIA
from transquant.searching.correction import correct
from transquant.searching.episodes import Episode, Record
from transquant.searching.hunt import Hunt, Progress
from transquant.searching.policy import MOST, Policy
from transquant.searching.prediction import Predictor
from transquant.searching.result import SearchResult, Summary
from transquant.searching.searchers import METHODS
from transquant.searching.survey import groups_of, survey, usable
from transquant.searching.trial import Trials
from transquant.stats import Reference, copy_model
from transquant.targets import parse_target
from transquant.workers import Workers, workers

_log = logging.getLogger("transquant")

ANCHORS = (3.0, 7.0)  # mean bits of the files that predictions are fitted to
CHECK_EVERY = 100  # episodes between two real evaluations of the best so far
LATENCY_RUNS = 20


def search(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    size: int | str | None = None,
    bits: float | None = None,
    ratio: float | None = None,
    macs: float | None = None,
    precision: str | int = "mixed",
    method: str = "auto",
    episodes: int = 300,
    criterion: str = "sensitivity",
    evaluate: Callable[[nn.Module], float] | None = None,
    check_every: int = CHECK_EVERY,
    metric: str = "auto",
    effort: int = 5,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
    work: str | PathLike[str] | None = None,
    progress: Progress | None = None,
    watch: Callable[[Episode], None] | None = None,
) -> SearchResult:
    """Find how many channels each layer of a network loses and how many bits the others get, within a budget, and compress it so.

    `model`, which is never changed, and `calibration` as of `compress`. Budgets: at most one of `size` (bytes of the file), `bits`
    (8 · bytes of the file / parameters of the *original* network) and `ratio` (bytes of its tensors / bytes of the file); and
    `macs`, the largest share (0 to 1) of its multiply–adds. At least one of them.
    `precision`: "mixed", bits of each row are searched for too; or 2 to 8, one depth for all rows, and channels alone are.
    `method`: "lagrange" (prices of bytes and multiply–adds, then small steps), "random", "tpe", "cma-es" (Optuna), "ddpg" (an
    agent), or "auto", the one that wins in benchmarks/search.py; each looks at `episodes` policies. `criterion` of importance, for
    channels and rows: "sensitivity" of the output, or "norm", L1 of the weights. `evaluate(model) -> float`, higher is better,
    decides among the best policies, on whatever data it has; None: minus the distance of the outputs on held-back calibration
    samples. `check_every`: episodes after which the best so far is tried for real. `metric`, `effort`, `forward`, `output` as of
    `compress`, which makes the file. `work`: a folder for the record of episodes (episodes.jsonl) and finished parts, from which
    the same call goes on after it was killed; it stays. `progress(stage, done, total)` and `watch(episode)` are called as work
    goes on.

    Where the network's graph cannot be followed, removed channels stay as zeros (`masked`; a warning says so), and `macs` is
    refused. Files of policies are as `compress` makes them, of at most the asked size; with one depth for all rows they have that
    very depth, and may be smaller.
    The same input, options and seed give the same result. Raises InputError, TargetError (with the smallest that is feasible),
    MissingDependency."""
    say = progress or (lambda stage, done, total: None)
    fixed = _check(precision, method, episodes, criterion, macs, check_every, effort, seed)
    plan = modules.plan_model(model)
    sizes = {"bits": bits, "size": size, "ratio": ratio}
    given = {k: v for k, v in sizes.items() if v is not None}
    if not given and macs is None:
        raise InputError("a search needs a budget: give one of size, bits and ratio, or macs, or both")
    most = parse_target(plan, {**sizes}).value if given else None
    batches = modules.batches_of(calibration, whole=forward is not None)

    known = fingerprint(
        plan, model.state_dict(), batches, most, macs, fixed, method, episodes, criterion, metric, seed, evaluate is None
    )
    record = Record(work, known.hex())

    with torch.inference_mode(False), unchanged(model), workers() as pool:
        found = ready(
            model, batches, most, macs, fixed, pool, say, criterion=criterion, metric=metric, forward=forward, output=output,
            seed=seed, evaluate=evaluate,
        )  # fmt: skip
        predictor, trials = found.predictor, found.trials
        hunt = Hunt(predictor, found.budget, trials, record, say, watch)
        hunt.walk(method, episodes, check_every, seed)
        chosen = hunt.choose()
        network = trials.network(trials.kept(predictor, chosen.policy))
        depths = trials.depths(predictor, chosen.policy)
        reference = trials.value(model)
    options = {"metric": metric, "effort": effort, "forward": forward, "output": output, "seed": seed, "progress": progress,
               "work": None if work is None else Path(work) / "file", "depths": depths}  # fmt: skip
    compressed = _file(network, batches, most, fixed, options)
    small = compressed.install(deep_copy(network))
    assert chosen.measured is not None

    def run(network: nn.Module, batch: Any) -> Tensor:
        return modules.run_batch(network, batch, forward, output)

    one = _one_sample(trials.reference.batches[0])
    twins = {"whole": copy_model(model), "small": copy_model(small)}  # in eval mode, and theirs is what a run leaves behind
    costs = measure(twins, one, run, {"whole": 0, "small": 0}, LATENCY_RUNS)
    report = Summary(
        (plan.original_bytes, len(compressed.data)), (plan.num_parameters, sum(p.numel() for p in small.parameters())),
        (costs["whole"].macs, costs["small"].macs), (costs["whole"].milliseconds, costs["small"].milliseconds),
        chosen.costs, chosen.measured, trials.value(small), reference,
    )  # fmt: skip
    _log.info("%s", report)
    ordered = [record.known[k] for k in range(episodes)]
    return SearchResult(small, compressed, chosen.policy, ordered, report, network, predictor.space.groups, not trials.physical)


@dataclass(frozen=True, slots=True)
class Ready:
    """What a search knows before its first episode."""

    predictor: Predictor
    budget: Budget
    trials: Trials


def ready(
    model: nn.Module, batches: list[Any], most: float | None, macs: float | None, fixed: int | None, pool: Workers,
    say: Progress, *, criterion: str = "sensitivity", metric: str = "auto", forward: Callable[[nn.Module, Any], Any] | None = None,
    output: Callable[[Any], Tensor] | None = None, seed: int = 0, evaluate: Callable[[nn.Module], float] | None = None,
) -> Ready:  # fmt: skip
    """Statistics, groups, and predictions that are fitted to real files and outputs. `most`: bytes; `fixed`: the depth of all rows,
    or None; the others as of `search`. Raises InputError, TargetError."""
    plan = modules.plan_model(model)
    source = Source(*modules.gather(plan, model.state_dict()))
    seen = calibrate(
        model, batches, plan, source, metric, forward, output, seed, pool, say, 0, None, False, False, False,
    )  # fmt: skip
    if seen.reference is None:
        raise InputError("a search needs calibration data, and a metric of the output")
    how = Method(transform="identity", state_bits=STATE_BITS)
    encoder = Encoder(plan, source, seen.stats, pool, how)
    example = seen.reference.batches[0]

    def run(network: nn.Module, batch: Any) -> Tensor:
        return modules.run_batch(network, batch, forward, output)

    found, physical = groups_of(model, example, run)
    if not physical and macs is not None:
        raise InputError("macs needs a network whose graph can be followed: here channels can only be made zero")
    groups = usable(found, encoder)
    predictor = survey(model, groups, encoder, example, run, criterion, fixed)
    trials = Trials(model, groups, seen.stats, seen.reference, pool, how, physical, evaluate)
    _fit(predictor, encoder, seen.reference)
    whole = predictor.costs(predictor.space.with_bits(dict.fromkeys(predictor.space.groups, 0), _same_bits(predictor, MOST)))
    budget = Budget(most, None if macs is None else macs * whole.macs)
    budget.check(predictor, lambda policy: trials.draft(predictor, policy, None)[1])
    correct(predictor, budget, trials, say)
    return Ready(predictor, budget, trials)


def _fit(predictor: Predictor, encoder: Encoder, reference: Reference) -> None:
    """Fit predictions of bytes and of rounding to real files of the whole network."""
    points = []
    for bits in dict.fromkeys((float(predictor.space.fixed),) if predictor.space.fixed else ANCHORS):
        policy = Policy(dict.fromkeys(predictor.space.groups, 0), _same_bits(predictor, bits))
        twin = Encoder(encoder.plan, encoder.source, encoder.stats, encoder.pool, encoder.method, depths=predictor.depths(policy))
        draft = twin.draft(twin.unit, Choice())
        points.append((policy, len(twin.encode(draft).data), reference.distortion(draft.state())))
    predictor.fitted(points)


def _same_bits(predictor: Predictor, bits: float) -> dict[str, float]:
    return dict.fromkeys(predictor.space.weights, float(bits))


def _file(
    network: nn.Module, batches: list[Any], most: float | None, fixed: int | None, options: dict[str, Any]
) -> CompressedModel:
    """The file of the network that was found: of the size that is allowed; or with the very depths, where they are fixed or no size
    is given, and the file is not too large."""
    if most is not None:
        most = min(most, modules.plan_model(network).original_bytes - 1)  # what is left may take less as it is
    if fixed is not None or most is None:
        compressed = compress(network, batches, step=1.0, **options)
        if most is None or len(compressed.data) <= most:
            return compressed
        _log.info("at the very depths the file has %d bytes: steps are a little larger", len(compressed.data))
    return compress(network, batches, size=int(most or 0), **options)


def _one_sample(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch[:1] if batch.ndim else batch
    if isinstance(batch, Mapping):
        return {k: _one_sample(v) for k, v in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(map(_one_sample, batch))
    return batch


def _check(
    precision: Any, method: str, episodes: Any, criterion: str, macs: Any, check_every: Any, effort: Any, seed: Any
) -> int | None:
    if method not in ("auto", *METHODS):
        raise InputError(f"method is {method!r}, allowed are 'auto', {', '.join(map(repr, METHODS))}")
    if criterion not in CRITERIA:
        raise InputError(f"criterion is {criterion!r}, allowed are {', '.join(map(repr, CRITERIA))}")
    for name, value in (("episodes", episodes), ("check_every", check_every)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} is {value!r}, allowed are integers from 1")
    if isinstance(effort, bool) or not isinstance(effort, int) or not 1 <= effort <= 9:
        raise InputError(f"effort is {effort!r}, allowed are integers 1 to 9")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed is {seed!r}, allowed are integers from 0")
    if macs is not None and (isinstance(macs, bool) or not isinstance(macs, int | float) or not 0 < macs <= 1):
        raise InputError(f"macs is {macs!r}, allowed are shares of the network's multiply–adds above 0, up to 1")
    if precision == "mixed":
        return None
    if isinstance(precision, bool) or not isinstance(precision, int) or not 2 <= precision <= MOST:
        raise InputError(f"precision is {precision!r}, allowed are 'mixed' and integers 2 to {MOST}")
    return precision
