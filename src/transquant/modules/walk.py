"""Which tensors of a model are coded, and how; nothing is traced, module classes and names are enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from transquant.channels import MARK, MAX_SLICES, KeptChannels, shapes_before, steps_of
from transquant.errors import InputError
from transquant.modules.files import TensorFile
from transquant.modules.kinds import BATCHNORMS, KINDS, Place, groups_of, is_vector, is_weight, kind_of, place, refuse_soft
from transquant.records import AliasSpec, BatchNormSpec, Plan, RawSpec, Spec, Use, VectorSpec, WeightSpec

LOSSY_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
RAW_DTYPES = (
    *LOSSY_DTYPES, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool,
    torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
NONE: Mapping[str, str] = {}


def plan_model(model: nn.Module) -> Plan:
    """The plan of a module's state dict.

    Raises InputError for anything but a module, NaN or infinite weights, lazy parameters, tensors that no file can hold,
    and a model without a weight to code."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model is a {type(model).__name__}, allowed are an nn.Module, a state dict, a path to one, or an .onnx file"
        )
    refuse_soft(model)
    owners = dict(model.named_modules(remove_duplicate=False))
    specs: list[Spec] = []
    first_names: dict[object, str] = {}
    batchnorms: set[str] = set()
    total = 0
    state = dict(_tensors(model.state_dict(keep_vars=True)))
    users: dict[object, set[int]] = {}  # modules that hold a tensor
    for key, value in state.items():
        users.setdefault(_identity(value), set()).add(id(owners.get(key.rpartition(".")[0])))
    for key, value in state.items():
        owner, _, attribute = key.rpartition(".")
        if owner in batchnorms and attribute in (
            "weight",
            "bias",
            "running_mean",
            "running_var",
            "num_batches_tracked",
        ):
            continue
        module = owners.get(owner)
        if (first := first_names.get(_identity(value))) is not None:
            specs = [_tied(s, place(key, owners)) if s.name == first else s for s in specs]
            specs.append(AliasSpec(key, first))
            continue
        if module is not None and attribute == "weight" and _has_equivalent_set(module, users):
            for name in ("weight", "bias", "running_mean", "running_var"):
                tensor = getattr(module, name)
                first_names[_identity(tensor)] = f"{owner}.{name}" if owner else name
                total += tensor.numel() * tensor.element_size()
            if module.num_batches_tracked is not None:
                first_names[_identity(module.num_batches_tracked)] = f"{owner}.num_batches_tracked".removeprefix(".")
                total += 8
            batchnorms.add(owner)
            specs.append(_batchnorm(owner, module))
            continue
        first_names[_identity(value)] = key
        total += value.numel() * value.element_size()
        specs.append(_spec(key, place(key, owners), value))
    return replace(_plan(specs, sum(p.numel() for p in model.parameters()), total), kept=_kept(model, state))


def _kept(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[KeptChannels, ...]:
    """The steps that have made parts of a model, and then the model, smaller. Raises InputError where it is no longer what they
    have made it."""
    steps = [step for path, module in reversed(list(model.named_modules())) for step in steps_of(module, path)]
    reason = shapes_before(steps, {key: value.shape for key, value in state.items()})
    if sum(len(step.slices) for step in steps) > MAX_SLICES:
        reason = f"they have more than {MAX_SLICES} places"
    if isinstance(reason, str):
        raise InputError(
            f"channels were removed from the model, and it has been changed since: {reason}; where it is to be a network of its "
            f"own, delete its attribute {MARK!r}"
        )
    return tuple(steps)


def plan_state_dict(state: Mapping[str, Tensor], exact: Mapping[str, str] = NONE) -> Plan:
    """The plan of a state dict without its modules: matrices are coded, but those of which `exact` says why not; all else is
    exact. Tensors are looked at one by one;
    those of a `TensorFile` are gone again before the next comes. Raises InputError."""
    specs: list[Spec] = []
    first_names: dict[object, str] = {}
    total = parameters = 0
    for key, value in _tensors(state):
        identity = key if isinstance(state, TensorFile) else _identity(value)
        if (first := first_names.get(identity)) is not None:
            specs.append(AliasSpec(key, first))
            continue
        first_names[identity] = key
        total += value.numel() * value.element_size()
        if value.is_floating_point() and key.rpartition(".")[2] not in ("running_mean", "running_var"):
            parameters += value.numel()
        if key in exact:
            specs.append(RawSpec(key, tuple(value.shape), dtype_name(value), exact[key]))
        elif value.dtype in LOSSY_DTYPES and value.ndim >= 2 and value.numel():
            specs.append(WeightSpec(key, None, "matrix", tuple(value.shape), dtype_name(value)))
        else:
            specs.append(RawSpec(key, tuple(value.shape), dtype_name(value), "no matrix, and no module is known"))
    return _plan(specs, parameters, total)


def names_of(plan: Plan) -> list[str]:
    """State-dict keys of a plan, in order."""
    names: list[str] = []
    for spec in plan.specs:
        if isinstance(spec, BatchNormSpec):
            parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
            names += [spec.key(part) for part in (parts if spec.batches_tracked is not None else parts[:4])]
        else:
            names.append(spec.name)
    return names


def dtype_name(tensor: Tensor) -> str:
    """The dtype as FORMAT.md names it."""
    return str(tensor.dtype).removeprefix("torch.")


def _plan(specs: list[Spec], parameters: int, total: int) -> Plan:
    if not any(isinstance(s, WeightSpec) for s in specs):
        kinds = ", ".join(t.__name__ for t in KINDS)
        raise InputError(f"the model has no weight to code: coded are weights of {kinds}")
    return Plan(tuple(specs), parameters, total)


def _spec(key: str, place: Place, value: Tensor) -> Spec:
    shape, dtype, module, attribute = tuple(value.shape), dtype_name(value), place.module, place.attribute
    kind = kind_of(module)
    if not isinstance(value, nn.Parameter):
        return RawSpec(key, shape, dtype, "a buffer")
    if value.dtype not in LOSSY_DTYPES or value.numel() == 0:
        return RawSpec(key, shape, dtype, "no values" if value.numel() == 0 else "not a real floating-point tensor")
    if kind and is_weight(kind, attribute) and place.part == "length":
        return VectorSpec(key, shape, dtype)
    if kind and is_weight(kind, attribute) and value.ndim >= 2:
        if place.part == "free":
            return WeightSpec(key, place.path, "matrix", shape, dtype, 1, attribute)
        groups = groups_of(module, attribute)
        return WeightSpec(key, place.path, kind, shape, dtype, groups, attribute, place.part == "direction")
    if place.part == "whole" and is_vector(module, attribute, value.ndim):
        return VectorSpec(key, shape, dtype)
    return RawSpec(key, shape, dtype, f"no coder for {type(module).__name__}.{attribute}")


def _tied(spec: Spec, other: Place) -> Spec:
    """The spec of a weight that is used in another place too.

    An embedding whose weights are a linear layer's is coded as that layer: errors there reach every prediction."""
    kind = kind_of(other.module)
    if not isinstance(spec, WeightSpec) or not kind or not is_weight(kind, other.attribute) or other.part != "whole":
        return spec
    if groups_of(other.module, other.attribute) != spec.groups:
        return spec
    if spec.kind == "embedding" and kind == "linear":
        first = Use(spec.module or "", spec.kind, spec.attribute)
        return replace(spec, module=other.path, kind=kind, attribute=other.attribute, tied=(*spec.tied, first))
    return replace(spec, tied=(*spec.tied, Use(other.path, kind, other.attribute)))


def _has_equivalent_set(module: nn.Module, users: Mapping[object, set[int]]) -> bool:
    """A BatchNorm that in eval mode is a scale and a shift a channel, whose four vectors may come back as others.

    Not where another module holds one of them too; and a negative or tiny variance would not survive the conversion."""
    if not isinstance(module, BATCHNORMS) or not module.affine or module.running_mean is None or module.running_var is None:
        return False
    plain = all(isinstance(getattr(module, n), Tensor) for n in ("weight", "bias")) and 0 <= module.eps < 0.5
    if not plain or module.weight.dtype not in LOSSY_DTYPES:
        return False
    vectors = (module.weight, module.bias, module.running_mean, module.running_var)
    alone = all(len(users.get(_identity(v), ())) == 1 for v in vectors)
    return alone and bool((module.running_var.double() + module.eps > 0).all())


def _batchnorm(name: str, module: nn.Module) -> BatchNormSpec:
    tracked = module.num_batches_tracked
    count = None if tracked is None else int(tracked)  # type: ignore[arg-type]
    return BatchNormSpec(name, module.num_features, dtype_name(module.weight), float(module.eps), count)  # type: ignore[arg-type]


def _tensors(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The state dict's tensors by name, checked."""
    for key, value in state.items():
        if not isinstance(key, str) or not 0 < len(key.encode("utf-8", "replace")) <= 512 or not key.isprintable():
            raise InputError(f"a tensor is named {key!r:.100}, allowed are 1 to 512 bytes of printable text")
        if not isinstance(value, Tensor):
            raise InputError(f"the state dict's entry {key!r} is a {type(value).__name__}, allowed are tensors")
        if isinstance(value, UninitializedParameter | UninitializedBuffer):
            raise InputError(f"parameter {key!r} is not initialised yet: run the model once before compressing it")
        if value.layout != torch.strided or value.is_quantized or value.dtype not in RAW_DTYPES or value.is_meta:
            raise InputError(
                f"tensor {key!r} is {value.layout}, {value.dtype}, on {value.device}: only dense tensors can be stored"
            )
        if value.ndim > 8:
            raise InputError(f"tensor {key!r} has {value.ndim} dimensions, allowed are at most 8")
        if (value.is_floating_point() or value.is_complex()) and not bool(torch.isfinite(value.detach()).all()):
            raise InputError(f"tensor {key!r} has NaN or infinite values; weights must be finite")
        yield key, value


def _identity(tensor: Tensor) -> object:
    """Equal for tensors that are the same memory seen the same way; unequal for everything empty."""
    if tensor.numel() == 0:
        return object()
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
