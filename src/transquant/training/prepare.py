"""A module's weights become soft, and hard again.

model ─ compress ─ Template ─ soft weights ─┬─ the model, ready to be trained by whoever trains it
                                            └─ SoftNetwork
model ─ SoftNetwork.file ─ CompressedModel, and the model with the weights that it decodes to
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from transquant import codec, modules
from transquant.errors import InputError, TargetError
from transquant.records import (
    AliasEntry,
    AliasSpec,
    BatchNormEntry,
    BatchNormSpec,
    CodedEntry,
    Plan,
    RawEntry,
    RawSpec,
    VectorSpec,
    WeightSpec,
)
from transquant.targets import parse_target
from transquant.training.equivalent import fewer_columns
from transquant.training.methods import method_of
from transquant.training.network import Schedule, SoftNetwork, originals
from transquant.training.price import Price
from transquant.training.progressive import FINER, SETTLED, ProgressiveNetwork, coders_of
from transquant.training.soft import SoftWeight
from transquant.training.template import Template
from transquant.weights import lagrangian

DEPTHS = 1, 8
MOST_BEGIN = 4.0
DISTORTION = 1e-3  # of the start of a depth, in units of the metric, where its file cannot have that many bits
HALF = "float16", "bfloat16"
GRADUAL = 0.5, 0.1, 0.9  # shares of the training: the size is reached, symbols begin to settle, and have settled


def prepare(
    model: nn.Module,
    calibration: Iterable[Any] | None = None,
    *,
    method: str = "transform",
    bits: float | None = None,
    size: int | str | None = None,
    steps: int = 0,
    begin: float = 1.0,
    transform: str = "auto",
    axis: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    effort: int = 3,
    seed: int = 0,
    start: codec.CompressedModel | None = None,
    equivalent: bool = True,
    progress: codec.Progress | None = None,
    **options: Any,
) -> SoftNetwork:
    """Make the weights of a network soft, in place, so that it can be trained for a small file; `harden` makes the file.

    `model` is compressed once, as `compress` does (`calibration`, `transform`, `axis`, `overrides`, `forward`, `output`, `effort`,
    `seed`, `progress` are its arguments), which gives steps, bases and the size of vectors' steps; `start` is such a result from
    before, of this model, without a trellis. Its weights become parametrizations (torch.nn.utils.parametrize), whose parameters
    are in steps: make the optimizer afterwards, best of `SoftNetwork.parameter_groups()`, and add `SoftNetwork.penalty()` to the
    loss at every step. `steps`: how many steps the training will take, for its schedule; 0: not known, everything stays as it
    begins. `equivalent`: without a `start`, weights may become others with which the network computes the same and that take
    fewer bits: those that read an embedding of fewer tokens than columns, and the embedding, whose rows are then a linear map of
    what they were. `method`: "transform", "progressive", "diffq", "crq": `bits` (8 · bytes of the file / parameters) or `size`
    (bytes, or "64KB") is what the file will take; "qat", "lsq": `bits` is the depth of a weight, 1 to 8. `begin`, 1 to 4: training
    starts at so many times that size and is at it half-way. `options` of the methods: docs/training.md.

    Raises InputError, TargetError."""
    chosen, own = method_of(method, options)
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}, allowed is an nn.Module")
    if start is not None and not isinstance(start, codec.CompressedModel):
        raise InputError(f"start is a {type(start).__name__}, allowed is a CompressedModel, or None")
    if soft_network(model) is not None:
        raise InputError("the model is prepared already: harden it first, or take a fresh copy")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise InputError(f"steps is {steps!r}, allowed are integers from 0")
    plan = modules.apply_overrides(modules.plan_model(model), overrides)
    _check_weights(plan)
    given = {"bits": bits, "size": size}
    if not chosen.sized and (size is not None or bits not in range(DEPTHS[0], DEPTHS[1] + 1)):
        raise InputError(f"method {method!r} needs a depth: bits is {bits!r}, allowed are integers {DEPTHS[0]} to {DEPTHS[1]}")
    target = parse_target(plan, given)
    if isinstance(begin, bool) or not isinstance(begin, int | float) or not 1 <= begin <= MOST_BEGIN:
        raise InputError(f"begin is {begin!r}, allowed are numbers from 1 to {MOST_BEGIN}")
    if not chosen.sized and begin != 1:
        raise InputError(f"begin is {begin}: method {method!r} has a depth and no size to begin above")
    if not isinstance(equivalent, bool):
        raise InputError(f"equivalent is {equivalent!r}, allowed are True and False")
    if chosen.by_rows and begin != 1:
        raise InputError(f"begin is {begin}: method {method!r} begins with the float network, and goes down from there")
    if chosen.by_rows and transform not in ("auto", "identity"):
        raise InputError(f"transform is {transform!r}, allowed are 'auto' and 'identity' with method {method!r}")
    calibration = list(calibration) if isinstance(calibration, Iterator) else calibration
    fresh = start is None
    if start is None:
        if equivalent and calibration is not None:
            fewer_columns(model, plan, calibration, forward, output)
        # a file of a depth is only a start, and has other things to hold than weights: those of a tiny network may be most of it
        wanted: list[dict[str, Any]] = (
            [{"size": int(begin * target.value * (FINER if chosen.by_rows else 1))}]
            if chosen.sized
            else [{"bits": bits}, {"distortion": DISTORTION}]
        )
        options_of_start = {
            "trellis": chosen.by_rows, "transform": "identity" if chosen.by_rows else transform, "axis": axis,
            "overrides": overrides, "forward": forward, "output": output, "effort": effort, "seed": seed, "progress": progress,
        }  # fmt: skip
        start = _first_that_fits(model, calibration, wanted, options_of_start)
    schedule = Schedule(steps, begin, *GRADUAL) if own.get("gradual") else Schedule(steps, begin)
    if chosen.by_rows:
        schedule = Schedule(steps, begin, settled=SETTLED)
    coders = None
    if chosen.by_rows and (fresh or calibration is not None):
        coders = coders_of(model, calibration, Template.of(plan, start.data), start, forward, output, seed)
    network = attach(model, plan, start, method, target.value if chosen.sized else None, schedule, seed, bits or 0.0, own)
    if isinstance(network, ProgressiveNetwork) and coders is not None:
        network.give(coders)
    return network


def attach(
    model: nn.Module, plan: Plan, start: codec.CompressedModel, method: str, target: float | None, schedule: Schedule, seed: int,
    bits: float, options: Mapping[str, Any],
) -> SoftNetwork:  # fmt: skip
    """Soft weights for a template, and the network of them."""
    template = Template.of(plan, start.data)
    _same_layout(plan, template)
    template = template.smallest(start.state_dict())
    owners = dict(model.named_modules(remove_duplicate=False))
    specs = {s.name: s for s in plan.specs if isinstance(s, WeightSpec) and s.module is not None}
    chosen, _ = method_of(method, options)
    entries = [template.weights[name].entry for name in specs]
    if any(e.coding == "f" or (e.coding == "t" and not chosen.by_rows) for e in entries):
        raise InputError("start was made with a trellis or with fixed-length codes: compress with trellis=False")
    if chosen.by_rows and any(e.transform != "i" or e.groups == "s" for e in entries):
        raise InputError(f"start has transforms or steps of spans, with which method {method!r} cannot go on: compress anew")
    soft = chosen.soften(template, specs, bits, options)
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for name, weight in soft.items():
        spec = specs[name]
        uses = [(spec.module or "", spec.attribute), *((use.module, use.attribute) for use in spec.tied)]
        # a module may have several names
        places[name] = list({(id(owners[path]), attribute): (owners[path], attribute) for path, attribute in uses}.values())
        value = getattr(*places[name][0]).detach().clone()  # the first registration puts steps into it, where others find them
        for module, attribute in places[name]:
            getattr(module, attribute).data = value.clone()
            weight.to(value.device)
            parametrize.register_parametrization(module, attribute, weight)
        parameters = dict(originals(*places[name][0]))
        for module, attribute in places[name][1:]:  # one tensor before, one tensor after
            for key, parameter in parameters.items():
                module.parametrizations[attribute].register_parameter(key, parameter)  # type: ignore[index, union-attr]
    if not chosen.by_rows:
        take_vectors(model, plan, start.state_dict())
    price = Price(lagrangian(template.size(0)))
    return (ProgressiveNetwork if chosen.by_rows else SoftNetwork)(
        model, template, soft, places, target, price, schedule, method, seed
    )


def _first_that_fits(
    model: nn.Module, calibration: Iterable[Any] | None, targets: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> codec.CompressedModel:
    """The file of the first target that can be reached. Raises TargetError where none can."""
    for target in targets[:-1]:
        try:
            return codec.compress(model, calibration, **target, **options)
        except TargetError:
            continue
    return codec.compress(model, calibration, **targets[-1], **options)


def _check_weights(plan: Plan) -> None:
    """Raises InputError where a weight cannot learn as a soft one."""
    for spec in plan.specs:
        if isinstance(spec, WeightSpec) and spec.dtype in HALF:
            raise InputError(f"weight {spec.name!r} is {spec.dtype}, in which small steps are lost: train model.float() instead")
        if isinstance(spec, WeightSpec) and spec.rescaled:
            raise InputError(f"weight {spec.name!r} is parametrized already (weight or spectral norm): remove that before")


def _same_layout(plan: Plan, template: Template) -> None:
    """Raises InputError where a template is not of a module of that plan."""
    found = {entry.name: entry for entry in template.container.entries}
    kinds = {
        WeightSpec: CodedEntry,
        VectorSpec: CodedEntry,
        BatchNormSpec: BatchNormEntry,
        RawSpec: RawEntry,
        AliasSpec: AliasEntry,
    }
    for spec in plan.specs:
        entry, shape, count = found.pop(spec.name, None), getattr(spec, "shape", None), getattr(spec, "channels", None)
        if (
            not isinstance(entry, kinds[type(spec)])
            or getattr(entry, "shape", shape) != shape
            or getattr(entry, "channels", count) != count
        ):
            size = "" if shape is None else f" of shape {shape}"
            raise InputError(f"start is a file of another model or of other overrides: it has no such {spec.name!r}{size}")
    if found:
        raise InputError(f"start is a file of another model or of other overrides: it also has {next(iter(found))!r}")


def _alone(module: nn.Module) -> None:
    """Give a parametrized module a class of its own: copies of it share one, and removing a parametrization changes the class."""
    kind = type(module)
    own = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, kind.__bases__, own)


def _in_order(model: nn.Module, network: SoftNetwork) -> None:
    """Parameters of modules in the order that the plan knows: what was parametrized has come last."""
    names = [name.rpartition(".") for name in modules.names_of(network.template.plan)]
    for module, _ in (use for uses in network.places.values() for use in uses):
        path = next(p for p, m in model.named_modules() if m is module)
        for key in [last for owner, _, last in names if owner == path and last in module._parameters]:
            module._parameters[key] = module._parameters.pop(key)


def take_vectors(model: nn.Module, plan: Plan, decoded: Mapping[str, Tensor]) -> None:
    """Give a module the vectors of a file: they make up for some of what its weights have lost. A BatchNorm keeps its running
    statistics; its weight and bias become what gives the file's scale and shift with those."""
    own = model.state_dict()
    with torch.no_grad():
        for spec in plan.specs:
            if isinstance(spec, VectorSpec):
                own[spec.name].copy_(decoded[spec.name])
            elif isinstance(spec, BatchNormSpec):
                scale, shift = decoded[spec.key("weight")].double(), decoded[spec.key("bias")].double()
                deviation = (own[spec.key("running_var")].double() + spec.eps).sqrt()
                scale, shift = scale.to(deviation.device), shift.to(deviation.device)
                own[spec.key("weight")].copy_(scale * deviation)
                own[spec.key("bias")].copy_(shift + own[spec.key("running_mean")].double() * scale)


def soft_network(model: nn.Module) -> SoftNetwork | None:
    """The soft network of a prepared model, None of any other."""
    return next((m.owner for m in model.modules() if isinstance(m, SoftWeight)), None)


def harden(model: nn.Module) -> codec.CompressedModel:
    """The file of a prepared model, at the size that was asked for (at most 1 % below); the model gets the weights that the file
    decodes to, and its parametrizations are gone.

    Raises InputError where it is not prepared or has been changed since, TargetError where the size cannot be reached."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}, allowed is a module that `prepare` was given")
    network = soft_network(model)
    if network is None:
        raise InputError("the model is not prepared: call training.prepare before training, then harden")
    network.check(model)
    compressed = codec.load_bytes(network.file())
    for module in {id(m): m for uses in network.places.values() for m, _ in uses}.values():
        _alone(module)
    for (first, attribute), *others in network.places.values():
        learns = originals(first, attribute)[0][1].requires_grad
        parametrize.remove_parametrizations(first, attribute)
        if attribute in first._buffers:  # torch's choice for what is fixed and was made of several parameters
            first.register_parameter(attribute, nn.Parameter(first._buffers.pop(attribute), learns))  # type: ignore[arg-type]
        first.get_parameter(attribute).requires_grad_(learns)
        for module, name in others:
            parametrize.remove_parametrizations(module, name)
            module.register_parameter(name, first.get_parameter(attribute))
    _in_order(model, network)
    modules.install(model, compressed.state_dict())
    return compressed
