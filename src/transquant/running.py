"""Ways to run a compressed model: container → sections → a module whose weights are one of

float       tensors
transform   tensors; where a layer has a transform, those of two layers
packed      fixed-length codes as they are in the file; a weight is unpacked when its layer runs
lazy        sections as they are in the file; a weight is decoded when its layer runs, and kept while it fits a limit
activations tensors, and inputs of layers are rounded to the codes that the file gives ranges of: what int8 is compared with
int8        integers: the same codes, and weights of eight bits an output channel
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from transquant import bitstream, inference, modules, packing, pruning
from transquant.container import tensor_shapes
from transquant.container.dtypes import DTYPES
from transquant.dequantizer import dequantize
from transquant.entropy.lanes import decode_planes
from transquant.errors import InputError
from transquant.modules.kinds import kind_of, place
from transquant.records import (
    GRAPH,
    Activation,
    AliasEntry,
    BatchNormEntry,
    Coded,
    CodedEntry,
    CodedTensor,
    Container,
    Entry,
    FloatArray,
    is_packed,
)
from transquant.stats.inputs import takes_input
from transquant.transforms.exact import dct_basis
from transquant.unpacker import read_codes

M = TypeVar("M", bound=nn.Module)
MODES = ("float", "transform", "packed", "lazy", "activations", "int8")
KEPT_LAYERS = 3  # what is in memory beside the file may take as much as the largest ones do in float, or as decoding a section does


@dataclass(slots=True)
class Installed:
    """How a model runs. `layers`: by weight, as what. `coded_bytes`: codes and sections that stay in memory. `cache`: decoded
    weights that are kept, of a lazy model."""

    mode: str
    layers: dict[str, str] = field(default_factory=dict)
    coded_bytes: int = 0
    cache: inference.TensorCache | None = None


def install(
    model: M, container: Container, state: Callable[[], Mapping[str, Tensor]], mode: str = "float", memory: int | None = None
) -> M:
    """Put a file's weights into a model, to run as `mode` says; `state` decodes them all. Raises InputError."""
    if mode not in MODES:
        raise InputError(f"mode is {mode!r}, allowed are {', '.join(map(repr, MODES))}")
    if memory is not None and mode != "lazy":
        raise InputError(f"memory limits what mode 'lazy' keeps decoded; mode is {mode!r}")
    how = Installed(mode)
    quantized = _quantized(container, mode) if mode in ("activations", "int8") else {}
    inference.release_inputs(model)
    pruning.fit(model, container.kept, tensor_shapes(container.entries))
    if mode == "float":
        modules.install(model, state())
        how.layers = dict.fromkeys(_weights(container), "decoded")
    elif mode == "transform":
        model = _in_transform_domain(modules.install(model, state()), container, how)
    elif quantized:
        model = _with_quantized_inputs(modules.install(model, state()), container, quantized, how)
    else:
        sources = _packed(container, how) if mode == "packed" else _lazy(container, how, memory)
        _put_on_demand(model, container, sources, how)
    model.__dict__["_transquant"] = how  # an attribute, no part of the state
    return model


def installed(model: nn.Module) -> Installed:
    """How a model runs into which a file has been installed. Raises InputError for any other."""
    how = model.__dict__.get("_transquant")
    if not isinstance(how, Installed):
        raise InputError(f"no compressed file has been installed into this {type(model).__name__}")
    return how


def weight_bytes(model: nn.Module, peak: bool = False) -> int:
    """Bytes that a model's weights take in memory: its tensors, codes, and decoded ones that are kept, now or (`peak`) at most so
    far, with what decoding took."""
    how: Installed = model.__dict__.get("_transquant", Installed("float"))
    kept = 0 if how.cache is None else (how.cache.peak if peak else how.cache.resident)
    return inference.tensor_bytes(model) + how.coded_bytes + kept


# ----------------------------------------------------------------------------------------- transform domain


def _in_transform_domain(model: M, container: Container, how: Installed) -> M:
    """The model with two layers in place of each that has a transform."""
    aliases = [e for e in container.entries if isinstance(e, AliasEntry)]
    shared = {e.of for e in aliases} | {e.name for e in aliases}
    owners, paths = _paths(model)
    for piece in bitstream.pieces(container):
        weights = _weights(piece)
        how.layers |= dict.fromkeys(weights, "decoded: no transform")
        if all(e.transform == "i" for e in weights.values()):
            continue
        for name, tensor in _decoded(piece).items():
            if name not in weights or weights[name].transform == "i" or not isinstance(tensor, CodedTensor):
                continue
            owner, _, attribute = name.rpartition(".")
            made = _two_layers(owners.get(owner), attribute, tensor, container.step, name in shared)
            if isinstance(made, str):
                how.layers[name] = f"decoded: {made}"
                continue
            how.layers[name] = f"two layers, {made.kept} of {tensor.entry.bands} bands"
            model = _replaced(model, owners, paths[id(owners[owner])], made)
    return model


def _replaced(model: M, owners: Mapping[str, nn.Module], paths: list[str], made: nn.Module) -> M:
    """The model with a module in other's place, under all its paths; the module itself where it was the whole model."""
    for path in paths:
        if not path:
            return made  # type: ignore[return-value]
        parent, _, child = path.rpartition(".")
        owners[parent].add_module(child, made)
    return model


def _paths(model: nn.Module) -> tuple[dict[str, nn.Module], dict[int, list[str]]]:
    """Modules by path, and all paths of each by its id."""
    owners = dict(model.named_modules(remove_duplicate=False))
    paths: dict[int, list[str]] = {}
    for path, module in owners.items():
        paths.setdefault(id(module), []).append(path)
    return owners, paths


def _two_layers(
    layer: nn.Module | None, attribute: str, tensor: CodedTensor, step: tuple[int, int], shared: bool
) -> inference.TransformDomain | str:
    kind = kind_of(layer)
    if layer is None or kind is None:
        return "it is not the weight of a layer that is known"
    if attribute != "weight":
        return f"layers of kind {kind} have no form of two layers"
    if shared:
        return "it is shared with another layer"
    coeffs = bitstream.coefficients(tensor, step, dequantize)
    return inference.two_layers(layer, kind, tensor.entry, coeffs, _synthesis(tensor))


def _synthesis(tensor: CodedTensor) -> FloatArray:
    """What synthesis multiplies coefficients with, float64 (r, r)."""
    if tensor.basis is None:
        return dct_basis(tensor.entry.shape[2:]).astype(np.float64)
    return tensor.basis.astype(np.float64)


# ----------------------------------------------------------------------------------------- quantized inputs


def _quantized(container: Container, mode: str) -> dict[str, Activation]:
    """What a file says of inputs, by weight, where this mode can run. Raises InputError."""
    found = {name: e.activation for name, e in _weights(container).items() if e.activation is not None}
    if not found:
        raise InputError(f"mode {mode!r} runs files with ranges of inputs (compress(..., activations=8.0)); this one has none")
    if mode == "int8" and not inference.has_exact_kernels():
        raise InputError("mode 'int8' needs oneDNN's integer kernels of PyTorch for x86 processors; here mode 'activations' runs")
    return found


def _with_quantized_inputs(model: M, container: Container, quantized: Mapping[str, Activation], how: Installed) -> M:
    """The model with layers whose inputs are quantized, in integers where there are such layers and the mode is int8."""
    owners, paths = _paths(model)
    aliases = bitstream.decoded_aliases(container)
    how.layers = dict.fromkeys(_weights(container), "decoded")
    for name in [*quantized, *(a for a, of in aliases.items() if of in quantized)]:
        activation, where = quantized[aliases.get(name, name)], place(name, owners)
        module = where.module
        if module is None or id(module) not in paths or not takes_input(kind_of(module) or "", where.attribute):
            continue
        own = paths.pop(id(module))
        reason = "decoded" if how.mode == "activations" else inference.why_not_int8(module)
        if reason is None:
            made = inference.int8_layer(module, activation)
            how.coded_bytes += made.num_weights  # packed ones, beside those that are stored
            how.layers[aliases.get(name, name)] = f"int8, input of {activation.bits} bits"
            model = _replaced(model, owners, own, made)
        else:
            how.layers[aliases.get(name, name)] = f"{reason}, input of {activation.bits} bits"
            inference.quantize_input(module, activation)
    return model


# ----------------------------------------------------------------------------------------- weights on demand


def _put_on_demand(model: nn.Module, container: Container, sources: Mapping[str, Callable[[], Tensor]], how: Installed) -> None:
    """Put small tensors, and weights without a source, into a model, and sources in place of the others."""
    aliases = bitstream.decoded_aliases(container)
    sources = {**sources, **{name: sources[of] for name, of in aliases.items() if of in sources}}
    for name, _ in model.named_buffers(remove_duplicate=False):  # of a state dict all matrices are coded; buffers stay tensors
        sources.pop(name, None)
    entries = _weights(container)
    placeholders = {n: torch.empty(entries[aliases.get(n, n)].shape, device="meta") for n in sources}
    small = _small(container, sources)
    small.pop(GRAPH, None)
    modules.check(model, {**small, **placeholders})
    modules.load(model, small)
    inference.put_on_demand(model, sources)
    how.layers = {name: "decoded" if name not in sources else how.mode for name in entries}


def _small(container: Container, sources: Mapping[str, object]) -> dict[str, Tensor]:
    """Tensors of a file that have no source, decoded section by section."""
    coded: dict[str, Coded] = {}
    for piece in bitstream.pieces(container):
        if any(e.name not in sources for e in piece.entries):
            coded |= {name: tensor for name, tensor in _decoded(piece).items() if name not in sources}
    kept = tuple(e for e in container.entries if e.name not in sources)
    kept = tuple(e for e in kept if not (isinstance(e, AliasEntry) and e.of in sources))
    rest = Container(container.step, kept, tuple(s for s in container.sections if s.kind == "r"))
    return tensors(bitstream.values(rest, coded, dequantize), container)


def _packed(container: Container, how: Installed) -> dict[str, Callable[[], Tensor]]:
    """Sources that unpack codes."""
    codes = _codes(container)
    if not codes:
        raise InputError(
            "mode 'packed' runs files with fixed-length codes (coding='fixed'); this one is entropy-coded: take 'lazy'"
        )
    how.coded_bytes = sum(len(data) for _, data in codes.values())
    return {name: partial(_unpacked, entry, data, container.step) for name, (entry, data) in codes.items()}


def _codes(container: Container) -> dict[str, tuple[CodedEntry, bytes]]:
    """Entries with fixed-length codes, and their part of the packed section."""
    result: dict[str, tuple[CodedEntry, bytes]] = {}
    for piece in bitstream.pieces(container):
        start = 0
        for entry in piece.entries:
            if isinstance(entry, CodedEntry) and is_packed(entry):
                end = packing.unpack_tensor(piece.sections[0].data, start, entry, read_codes)[1]
                result[entry.name] = entry, piece.sections[0].data[start:end]
                start = end
    return result


def _unpacked(entry: CodedEntry, data: bytes, step: tuple[int, int]) -> Tensor:
    return _tensor(packing.unpack_tensor(data, 0, entry, read_codes)[0], step)


def _lazy(container: Container, how: Installed, memory: int | None) -> dict[str, Callable[[], Tensor]]:
    """Sources that decode sections and keep what fits."""
    codes = _codes(container)
    of_symbols = [p for p in bitstream.pieces(container) if p.sections[0].kind not in "pr"]
    of_weight = {name: piece for piece in of_symbols for name in _weights(piece)}
    entries = _weights(container)
    if memory is None:
        sections = [list(_weights(p).values()) for p in of_symbols]
        taken = [sum(4 * prod(e.shape) for e in own) + max(map(_bytes, own), default=0) for own in sections]
        small = sum(_bytes(e) for e in container.entries if e.name not in entries)
        memory = max(sum(sorted(map(_bytes, entries.values()))[-KEPT_LAYERS:]) - small, *taken, 0)
    how.coded_bytes = sum(len(data) for _, data in codes.values()) + sum(len(p.sections[0].data) for p in of_symbols)

    def produce(name: str) -> tuple[int, Iterator[tuple[str, Tensor, int]]]:
        if name in codes:
            return 8 * prod(entries[name].shape), iter([(name, _unpacked(*codes[name], container.step), 0)])
        own = list(_weights(of_weight[name]))
        order = own[own.index(name) :] + own[: own.index(name)]
        symbols = 4 * sum(prod(entries[n].shape) for n in own)
        return symbols + _bytes(entries[name]), in_order(of_weight[name], order, symbols)

    def in_order(piece: Container, order: list[str], beside: int) -> Iterator[tuple[str, Tensor, int]]:
        symbols = _decoded(piece)
        for name in order:
            beside -= 4 * prod(entries[name].shape)
            yield name, _tensor(symbols.pop(name), container.step), beside

    how.cache = cache = inference.TensorCache(produce, memory)
    return {name: partial(cache.get, name) for name in {**codes, **of_weight}}


def _decoded(piece: Container) -> dict[str, Coded]:
    """Symbols of one section, by name."""
    return bitstream.decode(piece, lambda sections: [[decode_planes(*job)[0] for job in s] for s in sections])


def _tensor(tensor: Coded, step: tuple[int, int]) -> Tensor:
    assert isinstance(tensor, CodedTensor)
    entry = tensor.entry
    return as_tensor(bitstream.to_dtype(bitstream.tensor_values(tensor, step, dequantize), entry.dtype), entry.shape, entry.dtype)


# ----------------------------------------------------------------------------------------- tensors


def tensors(arrays: Mapping[str, NDArray[np.generic]], container: Container) -> dict[str, Tensor]:
    """Torch tensors of decoded arrays, in the file's dtypes; aliases share memory."""
    dtypes, aliases = bitstream.dtypes(container), bitstream.decoded_aliases(container)
    result: dict[str, Tensor] = {}
    for key, array in arrays.items():
        result[key] = result[aliases[key]] if key in aliases else as_tensor(array, array.shape, dtypes[key])
    return result


def as_tensor(array: NDArray[np.generic], shape: tuple[int, ...], dtype: str) -> Tensor:
    """A tensor of an array's memory; a copy only where it takes one."""
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    return tensor.reshape(shape).to(getattr(torch, dtype))


def _weights(container: Container) -> dict[str, CodedEntry]:
    """Entries of weights by name."""
    return {e.name: e for e in container.entries if isinstance(e, CodedEntry) and len(e.shape) > 1}


def _bytes(entry: Entry) -> int:
    """Bytes of the tensors that an entry stands for; none of an alias."""
    if isinstance(entry, BatchNormEntry):
        return 4 * entry.channels * DTYPES[entry.dtype].size
    return 0 if isinstance(entry, AliasEntry) else prod(entry.shape) * DTYPES[entry.dtype].size
