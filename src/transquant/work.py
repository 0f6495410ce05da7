"""A work folder: finished parts of a compression, kept so that a run that was killed goes on from them.

    key ─ fingerprint of all that a part depends on ─ FOLDER/kind-key.part

Everything is deterministic, so the same command walks the same way again and finds what is there. A part is read only if it is
whole and made for its very key; anything else in the folder is passed over. Parts hold numbers, never code:

    magic | length of the header | digest of the header | header (JSON) | arrays | digest of the arrays
"""

from __future__ import annotations

import json
import logging
import os
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from hashlib import blake2b
from os import PathLike
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, TypeVar

import numba
import numpy as np
import torch

from transquant import __version__
from transquant.errors import InputError, OutputError
from transquant.fingerprint import fingerprint

T = TypeVar("T")

MOST_BYTES = 16 << 30  # of a folder; what is finished later is not kept
MARK = "made-by-transquant"  # a file in folders that are deleted at the end
SUFFIX = ".part"
_MAGIC = b"\x93TQwork1"
SIGNED = (np.int8, np.int16, np.int32, np.int64)
_DIGEST = 32
_FIXED = struct.Struct(f"<8sQ{_DIGEST}s")
_log = logging.getLogger("transquant")


class _Unusable(Exception):
    """Why a file is no part that can be used."""


def make_folder(path: Path, mark: str | None = None) -> None:
    """Make a folder where there is none, with an empty file in it that says so. Raises InputError for a path that is no folder,
    OutputError where none can be made."""
    if path.exists() and not path.is_dir():
        raise InputError(f"work is {path}, which is no folder; allowed is a folder, or a path where one can be made")
    try:
        if not path.exists():
            path.mkdir(parents=True, exist_ok=True)  # another process may be faster
            if mark is not None:
                (path / mark).touch()
    except OSError as error:
        raise OutputError(f"cannot make the work folder {path}: {error.strerror}") from None


class WorkFolder:
    """`records` are the classes that parts may hold. `taken` and `computed` count parts by kind.

    A folder that does not exist is made, and deleted by `finish`; one that does exist is kept. Raises InputError for a path
    that is no folder, OutputError where none can be made."""

    def __init__(self, path: str | PathLike[str], records: Sequence[type]) -> None:
        self.path = Path(path)
        self.records = {record.__name__: record for record in records}
        self.taken: Counter[str] = Counter()
        self.computed: Counter[str] = Counter()
        self._lock = Lock()
        make_folder(self.path, MARK)
        try:
            self._free = MOST_BYTES - sum(p.stat().st_size for p in self.path.glob(f"*{SUFFIX}"))
        except OSError as error:
            raise OutputError(f"cannot make the work folder {self.path}: {error.strerror}") from None

    def keep(self, kind: str, parts: object, compute: Callable[[], T]) -> T:
        """The part that depends on `parts`: from the folder, or computed and put there."""
        key = self.key(kind, parts)
        found: T | None = self.find(kind, key)
        if found is not None:
            with self._lock:
                self.taken[kind] += 1
            return found
        value = compute()
        with self._lock:
            self.computed[kind] += 1
        self.put(kind, key, value)
        return value

    def key(self, kind: str, parts: object) -> str:
        """The name of what depends on `parts` and on this software."""
        return fingerprint(kind, _software(), parts).hex()

    def find(self, kind: str, key: str) -> Any:
        """The part of a key, or None."""
        try:
            with self._file(kind, key).open("rb") as file:
                return _read(file, [kind, key], self.records)
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever is wrong with it: it can be computed
            _log.warning("%s is not used: %s", self._file(kind, key), error)
            return None

    def put(self, kind: str, key: str, value: object) -> None:
        """Keep a part. It appears whole or not at all; a full disk is no error."""
        header, arrays = _packed([kind, key], value)
        size = _FIXED.size + len(header) + sum(a.nbytes for a in arrays) + _DIGEST
        with self._lock:
            full, was_full = size > self._free, self._free <= 0
            self._free = 0 if full else self._free - size
        if full:
            if not was_full:
                _log.warning("the work folder %s is full (%d bytes); nothing more is kept", self.path, MOST_BYTES)
            return
        name = ""
        try:
            handle, name = tempfile.mkstemp(suffix=SUFFIX, prefix=".", dir=self.path)
            with os.fdopen(handle, "wb") as file:
                _write(file, header, arrays)
            os.replace(name, self._file(kind, key))
        except BaseException as error:
            if name and os.path.exists(name):
                os.unlink(name)
            if not isinstance(error, OSError):
                raise
            _log.warning("cannot keep finished work in %s: %s; going on without", self.path, error.strerror)
            self._free = 0

    def finish(self) -> None:
        """Delete the folder if it was made for this run, or for one that was killed; never a file of somebody else."""
        if not (self.path / MARK).exists():
            return
        try:
            for part in (*self.path.glob(f"*{SUFFIX}"), *self.path.glob(f".*{SUFFIX}"), self.path / MARK):
                part.unlink(missing_ok=True)
            self.path.rmdir()
        except OSError as error:
            _log.warning("the work folder %s was not deleted: %s", self.path, error.strerror)

    def _file(self, kind: str, key: str) -> Path:
        return self.path / f"{kind}-{key}{SUFFIX}"


@cache
def _software() -> tuple[object, ...]:
    """Whatever computes: versions, this package's source, the instructions that arithmetic uses."""
    source = sorted(p for p in Path(__file__).parent.rglob("*.py"))
    versions = (__version__, torch.__version__, np.__version__, numba.__version__, torch.backends.cpu.get_cpu_capability())
    return (*map(str, versions), fingerprint([p.read_bytes() for p in source]))


# ----------------------------------------------------------------------------------------------- a part as bytes


def _packed(name: list[str], value: object) -> tuple[bytes, list[np.ndarray]]:
    """Header, and arrays as they are stored: integers in the smallest type that holds them, deflated."""
    arrays: list[np.ndarray] = []
    table: list[tuple[Any, ...]] = []

    def add(array: np.ndarray) -> dict[str, int]:
        stored = array = np.asarray(array, order="C")
        if array.dtype.kind == "i" and array.size:
            small = np.dtype(next(t for t in SIGNED if np.iinfo(t).min <= array.min() and array.max() <= np.iinfo(t).max))
            stored = np.frombuffer(zlib.compress(np.ascontiguousarray(array.astype(small)).tobytes(), 1), np.uint8)
            table.append((array.dtype.str, array.shape, small.str, stored.nbytes))
        else:
            table.append((array.dtype.str, array.shape, "", stored.nbytes))
        arrays.append(stored)
        return {"array": len(arrays) - 1}

    structure = _outline(value, add)
    return json.dumps({"name": name, "arrays": table, "value": structure}).encode(), arrays


def _outline(value: object, add: Callable[[np.ndarray], Any]) -> Any:
    """JSON of a value; arrays go elsewhere."""
    if value is None or isinstance(value, bool | str) or type(value) in (int, float):
        return value
    if isinstance(value, bytes):
        return {"bytes": add(np.frombuffer(value, np.uint8))}
    if isinstance(value, np.ndarray):
        return add(value)
    if isinstance(value, np.generic):
        return {"number": add(np.asarray(value))}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_outline(v, add) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[k, _outline(v, add)] for k, v in value.items()]}
    assert is_dataclass(value), type(value)
    return {"record": type(value).__name__, "fields": {f.name: _outline(getattr(value, f.name), add) for f in fields(value)}}


def _write(file: BinaryIO, header: bytes, arrays: Sequence[np.ndarray]) -> None:
    file.write(_FIXED.pack(_MAGIC, len(header), blake2b(header, digest_size=_DIGEST).digest()))
    file.write(header)
    hasher = blake2b(digest_size=_DIGEST)
    for array in arrays:
        data = _bytes(array)
        hasher.update(data)
        file.write(data)
    file.write(hasher.digest())


def _read(file: BinaryIO, name: list[str], records: dict[str, type]) -> Any:
    """The value of a part. Raises _Unusable, or what comes of bad JSON."""
    size = os.fstat(file.fileno()).st_size
    magic, length, digest = _FIXED.unpack(file.read(_FIXED.size))
    if magic != _MAGIC or length > size:
        raise _Unusable("it is no part of finished work")
    header = file.read(length)
    if blake2b(header, digest_size=_DIGEST).digest() != digest:
        raise _Unusable("it is damaged")
    content = json.loads(header)
    table = content["arrays"]
    if content["name"] != name or _FIXED.size + length + sum(row[3] for row in table) + _DIGEST != size:
        raise _Unusable("it is not what its name says")
    hasher, arrays = blake2b(digest_size=_DIGEST), []
    for dtype, shape, small, num_bytes in table:
        # arrays of their own, aligned as any other: where numbers lie may decide how they are summed up
        stored = np.empty(num_bytes, np.uint8) if small else np.empty(shape, dtype)
        data = _bytes(stored)
        if data.nbytes != num_bytes or file.readinto(data) != num_bytes:  # type: ignore[attr-defined]
            raise _Unusable("it is cut off")
        hasher.update(data)
        arrays.append(stored)
    if file.read() != hasher.digest():
        raise _Unusable("it is damaged")
    whole = [_inflated(a, row) if row[2] else a for a, row in zip(arrays, table, strict=True)]
    return _value(content["value"], whole, records)


def _inflated(stored: np.ndarray, row: Sequence[Any]) -> np.ndarray:
    dtype, shape, small, _ = row
    return np.frombuffer(zlib.decompress(_bytes(stored)), small).reshape(shape).astype(dtype)


def _value(outline: Any, arrays: Sequence[np.ndarray], records: dict[str, type]) -> Any:
    if not isinstance(outline, dict):
        return outline
    if "array" in outline:
        return arrays[outline["array"]]
    if "bytes" in outline:
        return arrays[outline["bytes"]["array"]].tobytes()
    if "number" in outline:
        return arrays[outline["number"]["array"]][()]
    if "record" in outline:
        values = {k: _value(v, arrays, records) for k, v in outline["fields"].items()}
        return records[outline["record"]](**values)
    if "dict" in outline:
        return {k: _value(v, arrays, records) for k, v in outline["dict"]}
    (kind, items), *_ = outline.items()
    sequence = [_value(v, arrays, records) for v in items]
    return tuple(sequence) if kind == "tuple" else sequence


def _bytes(array: Any) -> memoryview:
    """The array's own memory."""
    return memoryview(array.reshape(-1).view(np.uint8))
