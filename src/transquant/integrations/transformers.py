"""Hugging Face transformers: folders whose weights are one compressed file.

    from_pretrained(float folder, quantization_config=TransquantConfig(bits=4.0))   compresses what was loaded
    compress(model, calibration, bits=4.0)                                          the same of a model in memory
    save_pretrained(folder)          config.json with a quantization_config; model.safetensors with one tensor, the file's bytes
    from_pretrained(folder)          the decoded model: ordinary float weights

Importing this module registers it with transformers; a folder can only be read where that has been done. The tensor of bytes
has the name of a real, larger parameter, so that a transformers without this module stops at its shape: with a name of its
own it would be ignored, and the model left with random weights.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from transquant import codec, modules
from transquant.codec import CompressedModel
from transquant.errors import InputError, MissingDependency
from transquant.records import Limits

try:
    from transformers import PreTrainedModel, WeightConverter
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except Exception as error:  # beside a torchvision of another torch it fails in ways of its own
    why = f"{type(error).__name__}: {error}".splitlines()[0]
    raise MissingDependency(f'this needs transformers 5.23 or newer ({why}): pip install "transquant[zoo]"') from None

METHOD = "transquant"
OPTIONS = tuple(n for n in inspect.signature(codec.compress).parameters if n not in ("model", "calibration"))
BYTES_A_VALUE = 32  # what may be decoded for each value of the model that config.json describes: twice what the limits count

M = TypeVar("M", bound=torch.nn.Module)


@register_quantization_config(METHOD)
class TransquantConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What to pass to from_pretrained as `quantization_config`: the options of `transquant.compress`, one target among them.

    `calibration` is used and forgotten; the options are written to config.json, for people: reading needs none of them."""

    def __init__(self, calibration: Iterable[Any] | None = None, **options: Any) -> None:
        options.pop("quant_method", None)
        self.quant_method = METHOD
        self.calibration = calibration
        self.options = options

    def to_dict(self) -> dict[str, Any]:
        """What config.json gets."""
        return {"quant_method": METHOD, **copy.deepcopy(self.options)}

    def __deepcopy__(self, memo: dict[int, Any]) -> TransquantConfig:
        return TransquantConfig(self.calibration, **copy.deepcopy(self.options))  # samples may be a generator


@register_quantizer(METHOD)
class TransquantQuantizer(HfQuantizer):  # type: ignore[misc]
    """Stands between transformers' hooks and the codec. `compressed`: the file that the model's weights came from."""

    quantization_config: TransquantConfig
    compressed: CompressedModel | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Before anything is loaded. Raises InputError."""
        unknown = [n for n in self.quantization_config.options if n not in OPTIONS]
        if unknown and not self.pre_quantized:
            raise InputError(f"TransquantConfig has no option {unknown[0]!r}, allowed are {', '.join(OPTIONS)}")
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise InputError("device_map has 'disk', allowed are devices: the whole model is decoded into memory")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """That of the model; where config.json does not say, transformers has found that of bytes."""
        return dtype if dtype.is_floating_point else torch.get_default_dtype()

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any) -> None:
        if self.pre_quantized:
            self.compressed = codec.load_bytes(_bytes_in(checkpoint_files), _limits(model))

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """From the one tensor of a folder to all that it decodes to. Raises InputError where that is another model's."""
        if not self.pre_quantized:
            return weight_conversions
        assert self.compressed is not None
        state = _renamed(self.compressed.state_dict(), model)
        if not state:
            raise InputError(f"the folder's weights are those of another network than {type(model).__name__}: no name fits")
        return [WeightConverter("^.+$", next(iter(state)), [_Decoded(state)], force_cpu=True)]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            model._weight_conversions = None  # saved as floats later on, its tensors have names of their own again
            return model
        config = self.quantization_config
        self.compressed = codec.compress(model, config.calibration, **config.options)
        config.calibration = None
        return modules.install(model, self.compressed.state_dict(_limits(model)))

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What save_pretrained writes. Raises InputError where the model's weights are no longer those of the file."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # adapters alone are saved
        assert self.compressed is not None
        _check_unchanged(model, self.compressed.state_dict(_limits(model)))
        data = torch.frombuffer(bytearray(self.compressed.data), dtype=torch.uint8)
        name = next(n for n, p in model.named_parameters() if p.ndim > 1)
        return {name: data}, {}  # one word more would come in random order, and no two folders would be the same

    def _dequantize(self, model: M, dtype: Any = None) -> M:
        return model  # its weights are floats already

    def is_serializable(self, **kwargs: Any) -> bool:
        """A folder holds the whole model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside the weights are; where the weights themselves are trained, transformers refuses as it stands."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The modules are the ordinary ones."""
        return True


class _Decoded(ConversionOps):  # type: ignore[misc]
    """Puts the decoded tensors where transformers expects what it read from the folder."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def __deepcopy__(self, memo: dict[int, Any]) -> _Decoded:
        return self  # transformers copies its conversions for each tensor; here there is one, and it is large

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The tensors, once."""
        state, self.state = self.state, {}
        return state


def compress(model: M, calibration: Iterable[Any] | None = None, **options: Any) -> M:
    """A copy of a transformers model with decoded weights, which `save_pretrained` writes as a compressed folder.

    `calibration` and `options` are those of `transquant.compress`; the model itself is not changed. The copy's
    `hf_quantizer.compressed` is the file and its report. Raises InputError, TargetError."""
    _check(model)
    return attach(copy.deepcopy(model), codec.compress(model, calibration, **options))


def attach(model: M, compressed: CompressedModel) -> M:
    """Install a compressed file in a transformers model, which is changed, and have `save_pretrained` write that file.

    Raises InputError where it does not fit, errors.FileError where it is bad."""
    _check(model)
    modules.install(model, compressed.state_dict(_limits(model)))
    config = TransquantConfig(**compressed.report.settings.get("target", {}))
    quantizer = TransquantQuantizer(config, pre_quantized=True)
    quantizer.compressed = compressed
    hooks: Any = model
    hooks.hf_quantizer, hooks.is_quantized, hooks.quantization_method = quantizer, True, METHOD
    hooks.config.quantization_config = config
    return model


def _check(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"model is a {type(model).__name__}, allowed are models of transformers (PreTrainedModel)")
    method = getattr(model, "quantization_method", METHOD)
    if method != METHOD:
        raise InputError(f"the model is quantized already, by {getattr(method, 'value', method)}; give the float model")


def _bytes_in(files: list[str] | None) -> bytes:
    """The compressed file in a folder's model.safetensors."""
    path = files[0] if files and len(files) == 1 and files[0].endswith(".safetensors") else None
    if path is None:
        raise InputError(f"the folder has {files or 'no weights'}, expected one model.safetensors, as save_pretrained wrote it")
    try:
        with safe_open(path, "np") as file:
            names = list(file.keys())
            values = [file.get_tensor(n) for n in names[:1]]
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if len(names) != 1 or values[0].dtype != "uint8" or values[0].ndim != 1:
        raise InputError(f"{path} has {len(names)} tensors, expected one of bytes: it is no compressed model, as config.json says")
    data: bytes = values[0].tobytes()
    return data


def _limits(model: torch.nn.Module) -> Limits:
    """config.json says how large the model is, and no more is decoded; but for small ones the usual limits."""
    values = sum(prod(t.shape) for t in model.state_dict().values())
    return Limits(max_decoded_bytes=max(Limits().max_decoded_bytes, BYTES_A_VALUE * values))


def _renamed(state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Tensors under the names and in the dtypes of a model on the meta device, as far as it has them; without the second names
    of those that transformers ties. A model with a head reads the folder of one without, and the other way round."""
    own, prefix = model.state_dict(), f"{model.base_model_prefix}."
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ()), *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        key = next((k for k in (name, name.removeprefix(prefix), prefix + name) if k in own), None)
        if key is not None:
            precise = tensor.dtype == torch.float32 and any(part in key for part in kept)
            found[key] = tensor.to(own[key].dtype) if tensor.is_floating_point() and not precise else tensor
    return {k: v for k, v in found.items() if model.all_tied_weights_keys.get(k) not in found}


def _check_unchanged(model: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    names = [*own, *(k for k in state if k not in own)]
    same = (k in own and k in state and torch.equal(own[k].cpu(), state[k].to(own[k].dtype)) for k in names)
    changed = next((k for k, equal in zip(names, same, strict=True) if not equal), None)
    if changed is not None:
        raise InputError(
            f"{changed!r} is no longer what the compressed file holds: model.dequantize() makes an ordinary float model of this "
            "one, to be saved as it is or compressed again"
        )
