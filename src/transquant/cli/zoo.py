"""Networks of other libraries by name: timm:NAME, torchvision:NAME, hf:FOLDER_OR_NAME."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from transquant.errors import InputError, MissingDependency, TransquantError


def from_library(source: str, pretrained: bool) -> nn.Module | None:
    """The network that "LIBRARY:NAME" names, with the library's own weights or, without them, only its shape; None where no such
    library is known. Raises InputError, MissingDependency."""
    library, _, name = source.partition(":")
    if library not in LIBRARIES:
        return None
    if not name:
        raise InputError(f"--model is {source!r}, expected {library}:NAME")
    try:
        make = LIBRARIES[library]()
    except MissingDependency:
        raise
    except Exception as error:  # beside a torch that it was not built for a library fails in ways of its own
        why = "" if isinstance(error, ModuleNotFoundError) else f", which cannot be imported here ({_line(error)})"
        raise MissingDependency(f'--model {source} needs {_PACKAGES[library]}{why}: pip install "transquant[zoo]"') from None
    try:
        return make(name, pretrained)
    except TransquantError:
        raise
    except Exception as error:
        what = "the weights of" if pretrained else "the network of"
        hint = "; give weights that you have with --weights" if pretrained else ""
        raise InputError(f"{what} --model {source} cannot be had ({_line(error)}){hint}") from None


def _timm() -> Callable[[str, bool], nn.Module]:
    import timm

    def make(name: str, pretrained: bool) -> nn.Module:
        model: nn.Module = timm.create_model(name, pretrained=pretrained)
        return model

    return make


def _torchvision() -> Callable[[str, bool], nn.Module]:
    from torchvision import models

    def make(name: str, pretrained: bool) -> nn.Module:
        options = {"weights": "DEFAULT" if pretrained else None}
        if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
            options["weights_backbone"] = None  # detectors would fetch a part of themselves even so
        model: nn.Module = models.get_model(name, **options)
        return model

    return make


def _transformers() -> Callable[[str, bool], nn.Module]:
    import transformers

    import transquant.integrations.transformers  # noqa: F401  (so that compressed folders load too)

    def make(name: str, pretrained: bool) -> nn.Module:
        config = transformers.AutoConfig.from_pretrained(name)
        kind: Any = getattr(transformers, (config.architectures or [""])[0], None)
        if kind is None:
            raise InputError(f"config.json of hf:{name} names the classes {config.architectures}, expected one of transformers")
        model: nn.Module = kind.from_pretrained(name) if pretrained else kind(config).to(config.dtype or torch.float32)
        return model

    return make


LIBRARIES = {"timm": _timm, "torchvision": _torchvision, "hf": _transformers}
_PACKAGES = {"timm": "timm", "torchvision": "torchvision", "hf": "transformers"}


def _line(error: Exception) -> str:
    """The first line of what a library says."""
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
