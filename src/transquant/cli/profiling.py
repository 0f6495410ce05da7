"""What running a compressed network costs, beside the float one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from transquant.cli.calibration import Data
from transquant.codec import CompressedModel, load
from transquant.errors import InputError
from transquant.inference import measure
from transquant.modules import batches_of, num_samples, run_batch
from transquant.running import installed, weight_bytes


def profile_file(file: Path, model: nn.Module | Any, data: Data, mode: str, memory: str | None, repeats: int) -> dict[str, Any]:
    """Multiply–adds, weights in memory and milliseconds on the first batch, of the float network and as `mode` says."""
    if not isinstance(model, nn.Module):
        raise InputError("profile needs --model")
    compressed: CompressedModel = load(file, lazy=True)
    model.eval()
    net = compressed.install(copy.deepcopy(model), mode=mode, memory=memory)
    batch = batches_of(data.batches)[0]
    costs = measure({"before": model, "after": net}, batch, run_batch, {"before": weight_bytes(model), "after": 0}, repeats)
    before, after = costs["before"], costs["after"]
    return {
        "file": str(file), "mode": mode, "file_bytes": len(compressed.data),
        "batch": num_samples(batch),
        "macs": after.macs, "float_macs": before.macs,
        "weight_bytes": weight_bytes(net), "peak_weight_bytes": weight_bytes(net, True), "float_weight_bytes": before.weight_bytes,
        "milliseconds": after.milliseconds, "float_milliseconds": before.milliseconds,
        "layers": installed(net).layers,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The same as text."""
    rows = (
        ("multiply–adds", "macs", ","),
        ("weights in memory, bytes", "weight_bytes", ","),
        ("milliseconds a batch", "milliseconds", ".2f"),
    )
    head = "batch of " + str(result["batch"])
    lines = [f"{head:<28}{'float':>16}{result['mode']:>16}{'ratio':>8}"]
    for title, key, form in rows:
        was, now = result[f"float_{key}"], result[key]
        lines.append(f"{title:<28}{was:>16{form}}{now:>16{form}}{now / was if was else float('nan'):>8.3f}")
    if result["peak_weight_bytes"] > result["weight_bytes"]:
        lines.append(f"{'  at most':<28}{'':>16}{result['peak_weight_bytes']:>16,}")
    lines += ["", *(f"{name:<40} {how}" for name, how in result["layers"].items())]
    return "\n".join(lines)
