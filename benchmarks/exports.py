"""Decoded networks in ONNX Runtime: how far from torch, how large, with float, int8 and int4 weights; and .onnx files in and out.

    python benchmarks/exports.py                     # everything; needs the extras "onnx", "zoo" and ONNX Runtime
    python benchmarks/exports.py resnet18 gpt2       # some of it

The trained networks of networks.py on their kind of data (random images and text where no data are needed: only the same
function is asked for), and those of zoo.py with random weights and normalisations. Each is compressed to 6 bits a parameter without
calibration at effort 1. "float", "int8", "int4" compare the exported file with the decoded module in torch: ‖Δy‖ / ‖y‖; "again" is
the float network as an ONNX file, that file compressed to 6 bits a parameter and written back, and the two compared. Writes
benchmarks/exports.json.
"""

from __future__ import annotations

import copy
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

import transquant as tq
from networks import network
from transquant.export import export_module
from zoo import IMAGES, declare_vision_ops, scramble, waves

BITS = 6.0
BOUND = 1e-4  # of the float file
TRAINED = {"resnet20": 32, "squeezenet": 224, "mobilenet": 224, "charrnn": None}
FORMS = ("float", "int8", "int4")


def trained(name: str) -> tuple[nn.Module, Any]:
    side = TRAINED[name]
    inputs = (
        torch.randint(0, 65, (3, 100), generator=torch.Generator().manual_seed(0)) if side is None else waves(3, (side,) * 2, 3, 1)
    )
    return network(name), inputs


@torch.no_grad()
def disguise(model: nn.Module) -> None:
    """Normalisations that begin at one and zero, and branches that begin cut off, would hide what an export does to them."""
    scramble(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)


def image_network(name: str) -> tuple[nn.Module, Any]:
    declare_vision_ops()
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    disguise(model)
    return model, waves(3, (IMAGES[name],) * 2, 3, 1)


def language_network(name: str) -> tuple[nn.Module, Any]:
    declare_vision_ops()
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_positions=64, n_embd=128, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    words = torch.randint(0, 512, (3, 48), generator=torch.Generator().manual_seed(0))
    return GPT2LMHeadModel(config).eval(), {"input_ids": words, "use_cache": False}


NETWORKS: dict[str, Callable[[str], tuple[nn.Module, Any]]] = {
    **dict.fromkeys(TRAINED, trained), **dict.fromkeys(IMAGES, image_network), "gpt2": language_network
}  # fmt: skip


def in_runtime(path: Path, inputs: Any) -> Tensor:
    """First output of an .onnx file. Products with int4 weights get float inputs, which ONNX Runtime would round otherwise."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    tensors = [v for v in (inputs.values() if isinstance(inputs, dict) else [inputs]) if isinstance(v, Tensor)]
    given = {i.name: t.numpy() for i, t in zip(session.get_inputs(), tensors, strict=True)}
    return torch.from_numpy(np.asarray(session.run([session.get_outputs()[0].name], given)[0]))


@torch.no_grad()
def in_torch(model: nn.Module, inputs: Any) -> Tensor:
    result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return getattr(result, "logits", result)


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def run(name: str, forms: tuple[str, ...] = FORMS) -> dict[str, Any]:
    """Compress, export in each form, run, compare; then the float file compressed and back: one row."""
    model, inputs = NETWORKS[name](name)
    compressed = tq.compress(model, bits=BITS, effort=1)
    reference = in_torch(compressed.install(copy.deepcopy(model)), inputs)
    row: dict[str, Any] = {
        "network": name, "parameters": compressed.report.num_parameters, "file_bytes": len(compressed.data),
        "away_from_float_network": far(reference, in_torch(model, inputs)), "exports": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for form in forms:
            path = Path(folder) / f"{form}.onnx"
            start = time.perf_counter()
            records = compressed.export_onnx(model, inputs, path, weights=form)
            row["exports"][form] = {
                "bytes": path.stat().st_size, "seconds": time.perf_counter() - start, "weights": len(records),
                "largest_weight_error": max(r.relative_error for r in records), "output": far(in_runtime(path, inputs), reference),
            }  # fmt: skip
    row["again"] = again(model, inputs)
    return row


def again(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """The float network as an ONNX file, that compressed, and written back."""
    with tempfile.TemporaryDirectory() as folder:
        path, back = Path(folder) / "float.onnx", Path(folder) / "back.onnx"
        path.write_bytes(export_module(copy.deepcopy(model), inputs)[0])
        compressed = tq.compress(path, bits=BITS, effort=1)
        compressed.save_onnx(back)
        onnx.checker.check_model(str(back), full_check=True)
        return {
            "onnx_bytes": path.stat().st_size, "file_bytes": len(compressed.data), "coded": len(compressed.report.layers),
            "output": far(in_runtime(back, inputs), in_runtime(path, inputs)),
        }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as docs/onnx.md shows them."""
    lines = ["| network | float, bytes | int8 | int4 | float, ‖Δy‖/‖y‖ | int8 | int4 | in and out again |", "|---" * 8 + "|"]
    for row in rows:
        forms = [row["exports"][form] for form in FORMS]
        sizes = " | ".join(f"{form['bytes']:,}" for form in forms)
        errors = " | ".join(f"{form['output']:.1g}" for form in forms)
        lines.append(f"| {row['network']} | {sizes} | {errors} | {row['again']['output']:.1g} |")
    return "\n".join(lines)


def main() -> None:
    path = Path(__file__).with_suffix(".json")
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for name in sys.argv[1:] or NETWORKS:
        row = run(name)
        rows = [r for r in rows if r["network"] != name] + [row]
        print(json.dumps(row), file=sys.stderr, flush=True)
        assert row["exports"]["float"]["output"] <= BOUND, name
    rows.sort(key=lambda r: list(NETWORKS).index(r["network"]))
    versions = {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), **versions}
    path.write_text(json.dumps({"command": "python benchmarks/exports.py", "machine": machine, "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
