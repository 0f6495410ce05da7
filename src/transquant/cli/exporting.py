"""Other formats on the command line: what `export` is given, and `decompress` to .safetensors or .onnx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from transquant.cli.models import returned
from transquant.codec import CompressedModel
from transquant.container import write_file
from transquant.errors import InputError

SUFFIXES = (".safetensors", ".onnx")


def example_input(function: str | None, shape: str | None) -> Any:
    """What --example returns, or normally distributed float32 numbers of --input-shape. Raises InputError."""
    if (function is None) == (shape is None):
        raise InputError("give one example input: --example FILE.py:FUNCTION or --input-shape, such as 1,3,32,32")
    if function is not None:
        return returned(function, "--example")
    assert shape is not None
    parts = shape.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts) or len(parts) > 8:
        raise InputError(f"--input-shape is {shape!r}, expected positive integers such as 1,3,32,32, samples first")
    return torch.randn([int(part) for part in parts], generator=torch.Generator().manual_seed(0))


def write_decoded(compressed: CompressedModel, file: Path, output: Path) -> dict[str, Any]:
    """Write the decoded tensors, or the ONNX network they belong to; what was written. Raises InputError, OutputError,
    FileError, MissingDependency."""
    state = compressed.state_dict()
    if output.suffix == ".onnx":
        compressed.save_onnx(output)
    else:
        from safetensors.torch import save

        try:
            payload = save({k: v.clone().contiguous() for k, v in state.items()})  # clones: the format knows no shared memory
        except KeyError as error:
            raise InputError(f"{file} has tensors of {error.args[0]}, which .safetensors cannot hold") from None
        write_file(output, payload)
    return {"output": str(output), "bytes": output.stat().st_size, "tensors": len(state)}
