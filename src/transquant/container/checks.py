"""Typed access to values that come from a file: every check names the field, what was found and what is allowed."""

from __future__ import annotations

import json
from typing import Any

from transquant.errors import CorruptFile, UnsupportedVersion

MAX_DEPTH = 8


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN, or nesting deeper than MAX_DEPTH. Raises CorruptFile."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise CorruptFile("the header is not UTF-8") from None
    if _depth(text) > MAX_DEPTH:
        raise CorruptFile(f"the header is nested deeper than {MAX_DEPTH} levels")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except CorruptFile:
        raise
    except (ValueError, RecursionError):  # also integers of thousands of digits
        raise CorruptFile("the header is not valid JSON") from None
    if not isinstance(value, dict):
        raise CorruptFile(f"the header is a JSON {type(value).__name__}, expected an object")
    return value


def integer(value: Any, low: int, high: int, what: str) -> int:
    """`value` as an int within [low, high]; booleans and floats are refused."""
    if type(value) is not int or not low <= value <= high:
        raise CorruptFile(f"{what} is {short(value)}, allowed are integers {low} to {high}")
    return value


def items(value: Any, what: str, length: int | None = None, most: int | None = None) -> list[Any]:
    """`value` as a list, of a given or a largest length."""
    if not isinstance(value, list):
        raise CorruptFile(f"{what} is {short(value)}, expected a list")
    if length is not None and len(value) != length:
        raise CorruptFile(f"{what} has {len(value)} items, expected {length}")
    if most is not None and len(value) > most:
        raise CorruptFile(f"{what} has {len(value)} items, allowed are at most {most}")
    return value


def string(value: Any, what: str, most: int = 512, empty: bool = False) -> str:
    """`value` as text of at most `most` bytes of UTF-8 without control characters."""
    if not isinstance(value, str):
        raise CorruptFile(f"{what} is {short(value)}, expected text")
    try:
        size = len(value.encode("utf-8"))
    except UnicodeEncodeError:  # a lone surrogate, written as an escape
        raise CorruptFile(f"{what} is not valid UTF-8") from None
    if size > most or (size == 0 and not empty) or any(c < " " or "\x7f" <= c <= "\x9f" for c in value):
        raise CorruptFile(f"{what} is {short(value)}, allowed are 1 to {most} bytes without control characters")
    return value


def known(value: Any, allowed: tuple[str, ...], what: str) -> str:
    """`value` as one of the names that this version knows; others need a newer version."""
    if not isinstance(value, str):
        raise CorruptFile(f"{what} is {short(value)}, expected text")
    if value not in allowed:
        raise UnsupportedVersion(f"{what} is {short(value)}, which needs a newer version of transquant")
    return value


def keys(value: Any, required: str, optional: str, what: str) -> dict[str, Any]:
    """`value` as an object with the required one-letter keys and no unknown ones."""
    if not isinstance(value, dict):
        raise CorruptFile(f"{what} is {short(value)}, expected an object")
    unknown = [k for k in value if k not in tuple(required + optional)]
    if unknown:
        raise UnsupportedVersion(f"{what} has the key {short(unknown[0])}, which needs a newer version of transquant")
    missing = [k for k in required if k not in value]
    if missing:
        raise CorruptFile(f"{what} lacks the key {missing[0]!r}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise CorruptFile("the header has a duplicate key")
    return result


def _no_constant(name: str) -> None:
    raise CorruptFile(f"the header has the number {name}, allowed are finite numbers")


def _depth(text: str) -> int:
    """Deepest nesting of brackets outside strings, without recursion."""
    depth = deepest = 0
    inside = escaped = False
    for c in text:
        if inside:
            if escaped:
                escaped = False
            elif c == "\\":
                escaped = True
            elif c == '"':
                inside = False
        elif c == '"':
            inside = True
        elif c in "[{":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > MAX_DEPTH:
                break
        elif c in "]}":
            depth -= 1
    return deepest


def short(value: Any) -> str:
    """`value` for a message: its repr, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer too long to print
        return "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."
