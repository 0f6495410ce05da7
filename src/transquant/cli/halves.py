"""A network cut in two, as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from transquant.container import write_file
from transquant.errors import InputError, OutputError
from transquant.features.codec import UNCODED, FeatureCodec
from transquant.features.split import Device, Server

DEVICE, SERVER, CODEC, ABOUT = "device.safetensors", "server.safetensors", "point.codec", "split.json"
FILES = (DEVICE, SERVER, CODEC, ABOUT)


def make_folder(folder: Path) -> None:
    """Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror}") from None


def write_halves(codec: FeatureCodec, device: Device, server: Server, at: str, folder: Path) -> dict[str, Any]:
    """Weights of both halves under their names in the whole network, a codec of the one point that is sent, and what they are.

    Raises InputError, OutputError."""
    point, coder = device.coded.point, device.coded.coder
    others = sorted({*(p.name for p in codec.points if p != point), *codec.settings.get(UNCODED, ())})
    alone = FeatureCodec({point: coder}, {**codec.settings, UNCODED: others})
    contents = {
        DEVICE: _weights(device.network.state_dict()),
        SERVER: _weights(server.network.state_dict()),
        CODEC: alone.data,
    }
    about = {
        "at": at, "point": point.name, "channels": point.channels, "fingerprint": alone.fingerprint.hex(),
        "files": {name: len(data) for name, data in contents.items()},
    }  # fmt: skip
    for name, data in contents.items():
        write_file(folder / name, data)
    write_file(folder / ABOUT, (json.dumps(about, indent=1) + "\n").encode())
    return about


def _weights(state: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    try:
        data: bytes = save({k: v.detach().clone().contiguous() for k, v in state.items()})  # the format knows no shared memory
    except KeyError as error:
        raise InputError(f"the network has tensors of {error.args[0]}, which .safetensors cannot hold") from None
    return data
