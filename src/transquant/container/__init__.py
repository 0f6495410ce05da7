"""Bytes only: magic, header, sections, checks (FORMAT.md sections 1 and 2). Standard library and numpy."""

from transquant.container.file import header_bytes, pack_raw, read_container, unpack_raw, write_container
from transquant.container.header import tensor_shapes
from transquant.container.paths import check_writable, read_file, write_file

__all__ = [
    "check_writable",
    "header_bytes",
    "pack_raw",
    "read_container",
    "read_file",
    "tensor_shapes",
    "unpack_raw",
    "write_container",
    "write_file",
]
