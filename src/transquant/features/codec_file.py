"""The codec file: one .safetensors file. Arrays are named "number of the point/name"; all else is one line of JSON in its metadata.

    {"transquant": {"kind": "feature codec", "version": 1, "sha256": …, "content": {"points": […], "settings": {…}}}}

An array that several points share is stored with the first of them; "shared" of the content has {name: where it is}. The hash is
over the content and the arrays: it finds damage, and its first four bytes are in every packet.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from transquant.container.checks import integer, items, parse_json, short, string
from transquant.errors import CorruptFile, FileError, InputError, UnsupportedVersion
from transquant.features.records import Arrays, MapCoder, Point
from transquant.features.registry import from_state

KIND, VERSION = "feature codec", 1
MAX_POINTS, MAX_CHANNELS, MAX_HEADER = 4096, 1 << 20, 16 << 20
_POINT = ("name", "activation", "axis", "channels", "low", "high")
_FIELDS = (*_POINT, "kind", "settings")
_ARRAY = re.compile(r"(0|[1-9][0-9]{0,3})/(\S{1,100})")
_DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "b1")  # with one way to be written each


def codec_bytes(coders: Sequence[tuple[Point, MapCoder]], settings: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """The file, and the SHA-256 of what is in it. The same codec gives the same bytes. Raises InputError for settings that JSON
    cannot hold."""
    points: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {}
    for number, (point, coder) in enumerate(coders):
        own, state = coder.state()
        points.append({**{k: getattr(point, k) for k in _POINT}, "kind": coder.kind, "settings": own})
        arrays |= {f"{number}/{name}": np.ascontiguousarray(value) for name, value in state.items()}
        for name, value in state.items():
            if value.dtype.str[1:] not in _DTYPES or _ARRAY.fullmatch(f"{number}/{name}") is None:
                raise InputError(f"array {name!r} of the coder at {point.name!r} is {value.dtype}, which a codec file cannot hold")
    shared = _take_out_shared(arrays)
    try:
        content = json.loads(_canonical({"points": points, "settings": settings, "shared": shared}))
    except (TypeError, ValueError) as error:
        raise InputError(f"the settings of a codec must be what JSON can hold: {error}") from None
    digest = _digest(content, arrays)
    text = _canonical({"kind": KIND, "version": VERSION, "sha256": digest.hex(), "content": content})
    data: bytes = save(arrays, {"transquant": text})
    return data, digest


def read_codec(data: bytes) -> tuple[list[tuple[Point, MapCoder]], dict[str, Any]]:
    """Points with their coders, and the settings. Raises CorruptFile, UnsupportedVersion."""
    arrays = _arrays(data)
    metadata = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("transquant"), str):
        raise CorruptFile("this is no codec file of transquant: its metadata have no 'transquant'")
    top = parse_json(metadata["transquant"].encode("utf-8", "replace"))
    if top.get("kind") != KIND:
        raise CorruptFile(f"this is no codec file: it is of kind {short(top.get('kind'))}, expected {KIND!r}")
    version = integer(top.get("version"), 1, 2**31, "the version of a codec file")
    if version > VERSION:
        raise UnsupportedVersion(
            f"the codec file has version {version}, which needs a newer version of transquant; this one knows {VERSION}"
        )
    content = top.get("content")
    if not isinstance(content, dict) or top.get("sha256") != _digest(content, arrays).hex():
        raise CorruptFile("the codec file is damaged: its hash does not match")
    parts = [content.get(name) for name in ("settings", "shared")]
    if not all(isinstance(part, dict) for part in parts) or set(content) != {"points", "settings", "shared"}:
        raise CorruptFile("the content of a codec file must be points, settings and shared arrays")
    for name, place in content["shared"].items():
        if name in arrays or not isinstance(place, str) or place not in arrays:
            raise CorruptFile(f"array {short(name)} of a codec file is said to be {short(place)}, which it cannot be")
    arrays |= {name: arrays[place] for name, place in content["shared"].items()}
    by_point: dict[int, dict[str, np.ndarray]] = {}
    rows = items(content["points"], "the list of points", most=MAX_POINTS)
    for name, value in arrays.items():
        match = _ARRAY.fullmatch(name)
        if match is None or int(match[1]) >= len(rows):
            raise CorruptFile(f"array {short(name)} belongs to none of the {len(rows)} points")
        by_point.setdefault(int(match[1]), {})[match[2]] = value
    coders = [_coder(row, by_point.get(number, {})) for number, row in enumerate(rows)]
    return coders, content["settings"]


def _take_out_shared(arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """Remove arrays that are there already, and say by name where."""
    places: dict[tuple[str, tuple[int, ...], bytes], str] = {}
    shared = {}
    for name, value in list(arrays.items()):
        place = places.setdefault((value.dtype.str, value.shape, value.tobytes()), name)
        if place != name:
            shared[name] = place
            del arrays[name]
    return shared


def _arrays(data: bytes) -> dict[str, np.ndarray]:
    if len(data) < 8 or int.from_bytes(data[:8], "little") > min(MAX_HEADER, len(data)):
        raise CorruptFile("this is no codec file: it is no .safetensors file, or truncated")
    try:
        arrays: dict[str, np.ndarray] = load(data)
    except (SafetensorError, KeyError, ValueError, TypeError, OverflowError) as error:
        raise CorruptFile(f"this is no codec file: {type(error).__name__} {error}") from None
    return arrays


def _coder(row: Any, arrays: Arrays) -> tuple[Point, MapCoder]:
    if not isinstance(row, dict) or set(row) != set(_FIELDS):
        raise CorruptFile(f"a point is {short(row)}, expected an object with {', '.join(_FIELDS)}")
    bounds = [row["low"], row["high"]]
    if any(b is not None and (isinstance(b, bool) or not isinstance(b, int | float)) for b in bounds):
        raise CorruptFile(f"a point clips at {short(bounds)}, allowed are numbers and null")
    low, high = (None if b is None else float(b) for b in bounds)
    point = Point(
        string(row["name"], "a point's name"), string(row["activation"], "a point's activation"),
        integer(row["axis"], 0, 8, "a point's axis"), integer(row["channels"], 1, MAX_CHANNELS, "a point's channels"), low, high,
    )  # fmt: skip
    kind = string(row["kind"], "the kind of a coder")
    if not isinstance(row["settings"], dict):
        raise CorruptFile(f"the settings of the coder at {point.name!r} are {short(row['settings'])}, expected an object")
    try:
        coder = from_state(kind, row["settings"], arrays)
        zeros = np.zeros((point.channels, 1, 1), np.float32)
        symbols = coder.quantize(zeros)
        back = coder.dequantize(symbols)
    except FileError:
        raise
    except Exception as error:  # whatever a coder's own arithmetic says of arrays that do not fit
        raise CorruptFile(f"the coder at {point.name!r} cannot be made again: {type(error).__name__}: {error}") from None
    if back.shape != zeros.shape or symbols.shape[1:] != (1, 1) or (coder.before and not point.clips):
        raise CorruptFile(f"the coder at {point.name!r} does not fit its {point.channels} channels and its {point.activation}")
    return point, coder


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(content: Any, arrays: Mapping[str, np.ndarray]) -> bytes:
    digest = hashlib.sha256(_canonical(content).encode())
    for name, value in sorted(arrays.items()):
        little = value.astype(value.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{name} {little.dtype.str} {little.shape}".encode() + little.tobytes())
    return digest.digest()
