"""`transquant verify`: every byte of a file decoded and checked, with the compiled decoder and without torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from transquant.errors import FileError
from transquant.records import GRAPH, Limits

NOTE = "Checksums find damage, not malice: compare the SHA-256 with one from a source you trust."


def verify_file(path: Path, max_decoded_bytes: int | None, max_expansion: int | None) -> dict[str, Any]:
    """What a good file holds: format version, tensors, parameters, bytes, SHA-256. Raises FileError, InputError."""
    from transquant import bitstream
    from transquant.accounting import parameters_of
    from transquant.container import read_container, read_file
    from transquant.entropy.lanes import decode_planes

    given = {"max_decoded_bytes": max_decoded_bytes, "max_expansion": max_expansion}
    limits = Limits(**{k: v for k, v in given.items() if v is not None})
    data = read_file(path, limits)
    try:
        container = read_container(data, limits)
        coded = bitstream.decode(container, lambda sections: [[decode_planes(*job)[0] for job in s] for s in sections])
        tensors = sum(name != GRAPH for name in bitstream.values(container, coded))
    except FileError as error:
        error.args = (f"{path}: {error}",)  # one of several files
        raise
    return {
        "file": str(path),
        "format_version": data[4],  # FORMAT.md section 1
        "tensors": tensors,
        "parameters": parameters_of(container),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def line(result: dict[str, Any]) -> str:
    """One line for a person."""
    return (
        f"{result['file']}: OK, format version {result['format_version']}, {result['tensors']:,} tensors, "
        f"{result['parameters']:,} parameters, {result['bytes']:,} bytes, SHA-256 {result['sha256']}"
    )
