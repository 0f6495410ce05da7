"""Checkpoints of a training: whole or not there at all, the last two of them, and never code.

tree of mappings, lists, numbers, texts, tensors and bytes ─┬─ tensors ─ safetensors ─┐
                                                            └─ the rest ─ JSON ───────┴─ FOLDER/step-00001234.safetensors
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from transquant.container import write_file
from transquant.errors import InputError, OutputError
from transquant.fingerprint import fingerprint
from transquant.work import MARK, make_folder

FORMAT = "1"
KEPT = 2  # a kill while the newest is written, or damage to it, costs what came after the one before
_log = logging.getLogger("transquant")


class _Damaged(Exception):
    """A file that is whole but not what was written."""


class Checkpoints:
    """A folder of checkpoints. One that does not exist is made, and deleted by `finish`; one that does exist is kept.

    Raises InputError for a path that is no folder, OutputError where none can be made."""

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        make_folder(self.path, MARK)

    def save(self, step: int, content: Mapping[str, Any]) -> None:
        """Keep a tree under the number of a step. A full disk is a warning, not an error."""
        tensors: dict[str, Tensor] = {}
        outline = json.dumps(_outline(content, "", tensors))
        digest = _digest(outline, tensors)
        try:
            write_file(self._file(step), save(tensors, {"format": FORMAT, "content": outline, "digest": digest}))
        except OutputError as error:
            _log.warning("no checkpoint of step %d: %s", step, error)
            return
        for old in self.steps()[:-KEPT]:
            self.drop(old)

    def newest(self) -> Any:
        """The newest tree that is whole, None where there is none."""
        for step in reversed(self.steps()):
            try:
                return self._read(self._file(step))
            except (OSError, SafetensorError, ValueError, KeyError, _Damaged) as error:
                if isinstance(error, InputError):
                    raise
                _log.warning("%s is not used: %s", self._file(step), error)
        return None

    def steps(self) -> list[int]:
        """Of which steps there are checkpoints, ascending."""
        names = (p.stem.removeprefix("step-") for p in self.path.glob("step-*.safetensors"))
        return sorted(int(name) for name in names if name.isdecimal())

    def drop(self, step: int) -> None:
        """Delete a checkpoint, if it is there."""
        self._file(step).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete all checkpoints, and the folder if nothing else is in it."""
        try:
            for path in (*map(self._file, self.steps()), *self.path.glob(".step-*.safetensors.*"), self.path / MARK):
                path.unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()
        except OSError as error:
            _log.warning("the work folder %s was not deleted: %s", self.path, error.strerror)

    def finish(self) -> None:
        """`clear`, if the folder was made for this training, or for one that was killed."""
        if (self.path / MARK).exists():
            self.clear()

    def _file(self, step: int) -> Path:
        return self.path / f"step-{step:08d}.safetensors"

    def _read(self, path: Path) -> Any:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            # tensors of their own, aligned as any other: where numbers lie may decide how they are summed up
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        if meta.get("format", FORMAT) != FORMAT:
            raise InputError(f"{path} is a checkpoint of another version of transquant ({meta['format']}, expected {FORMAT})")
        if _digest(meta["content"], tensors) != meta["digest"]:
            raise _Damaged("it is damaged")
        return _value(json.loads(meta["content"]), tensors)


def _digest(outline: str, tensors: Mapping[str, Tensor]) -> str:
    return fingerprint(outline, dict(sorted(tensors.items()))).hex()


def _outline(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of a tree; tensors go elsewhere."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": path}
    if isinstance(value, bytes):
        tensors[path] = torch.frombuffer(bytearray(value), dtype=torch.uint8)
        return {"bytes": path}
    if isinstance(value, Mapping):
        return {"map": {str(key): _outline(item, f"{path}/{key}", tensors) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return [_outline(item, f"{path}/{k}", tensors) for k, item in enumerate(value)]
    return value


def _value(outline: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(outline, list):
        return [_value(item, tensors) for item in outline]
    if not isinstance(outline, dict):
        return outline
    if "tensor" in outline:
        return tensors[outline["tensor"]]
    if "bytes" in outline:
        return tensors[outline["bytes"]].numpy().tobytes()
    return {key: _value(item, tensors) for key, item in outline["map"].items()}
