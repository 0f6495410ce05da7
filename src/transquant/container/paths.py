"""Files on disk: bounded reads, and writes that leave either the whole file or nothing."""

from __future__ import annotations

import os
import tempfile
from os import PathLike
from pathlib import Path

from transquant.errors import InputError, LimitExceeded, OutputError
from transquant.records import Limits

_PIECE = 1 << 20  # bytes read at a time: a read takes the memory it is asked for, however short the file


def read_file(path: str | PathLike[str], limits: Limits | None = None) -> bytes:
    """Bytes of a file. Raises InputError where it cannot be read, LimitExceeded where it is larger than may be decoded."""
    limit = (limits or Limits()).max_decoded_bytes
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = bytearray()
            while size <= limit and (piece := file.read(min(_PIECE, limit + 1 - len(data)))):
                data += piece  # bounded: a device or a pipe has no size
            if size > limit or len(data) > limit:
                raise LimitExceeded(
                    f"{path} has {max(size, len(data))} bytes, the limit is {limit}; raise Limits(max_decoded_bytes=...)"
                )
            return bytes(data)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def check_writable(path: str | PathLike[str]) -> None:
    """Make sure, before long work, that a file can be written at `path`. Raises OutputError."""
    target = Path(path)
    if target.is_dir():
        raise OutputError(f"cannot write {target}: it is a folder")
    if target.exists() and not target.is_file():
        raise OutputError(f"cannot write {target}: it is no ordinary file")
    if not target.parent.is_dir():
        raise OutputError(f"cannot write {target}: the folder {target.parent} does not exist")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from None
    os.close(handle)
    os.unlink(name)


def write_file(path: str | PathLike[str], data: bytes) -> None:
    """Write to a temporary sibling, flush to disk, rename. A failure or an interruption leaves what was there before.

    Raises OutputError."""
    target = Path(path)
    if not target.parent.is_dir() or (target.exists() and not target.is_file()):
        check_writable(target)
    name = ""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes private files; an output is an ordinary one
        os.replace(name, target)
    except BaseException as error:
        if name and os.path.exists(name):
            os.unlink(name)
        if isinstance(error, OSError):
            raise OutputError(f"cannot write {target}: {error.strerror or error}") from None
        raise
