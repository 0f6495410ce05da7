"""Speed of coding feature maps on one core, what a ledger costs, and what three cuts of each network send.

    python benchmarks/feature_speed.py            # some minutes; quiet machine, one thread

Throughput: values of all maps a second through quantize + encode, and through decode + dequantize, best of several passes.
Ledger: time of a forward pass on coded maps over that of the float network, one thread each. Cuts: bytes and milliseconds an image
of our packet, beside the same map rounded to 8 bits a value: raw, as PNG (channels side by side, Pillow's best), and under zlib
and, where the module is there, zstd at level 19. encode_ms has the coder's transform in it, and so has folded_network_ms, where it
is folded into the device's network. Codecs are calibrated at the rates of features.py ("auto") on 256 samples.
Writes feature_speed.json and the tables in docs/features.md.
"""

from __future__ import annotations

import io
import json
import platform
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from features import RATES
from main_job import TITLES
from networks import cifar10, imagenet_sample, network
from pages import insert_table
from transquant import features
from transquant.features.points import replacing

CUTS = {
    "resnet20": ("layer1.2#1", "layer2.2#1", "layer3.1#1"),
    "squeezenet": ("features.1#0", "features.6#0", "features.10#0"),
    "mobilenet": ("#2", "#10", "#22"),
}
Row = dict[str, Any]


def best(work: Callable[[], Any], seconds: float = 2.0) -> float:
    """Seconds of the quickest of several runs."""
    work()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def samples(name: str, count: int) -> torch.Tensor:
    """Training images, or of the sample's first half."""
    if name == "resnet20":
        return cifar10("train", limit=count)[0]
    return imagenet_sample("torch" if name == "squeezenet" else "tf")[0][:500:2][:count]


def maps_of(model: torch.nn.Module, codec: features.FeatureCodec, images: torch.Tensor) -> list[np.ndarray]:
    """What each coder is given, by point, float32 (N, C, H, W)."""
    coders = {c.point.name: c for c in codec.coded}
    found = {}

    def keep(point: Any, tensor: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        result = activation(tensor)
        if point.name in coders:
            found[point.name] = coders[point.name].maps(tensor if coders[point.name].coder.before else result)[0]
        return result

    with torch.no_grad(), replacing(model, keep):
        model(images)
    return [found[name] for name in coders]


def throughput(name: str, model: torch.nn.Module, codec: features.FeatureCodec, images: torch.Tensor) -> Row:
    """Over all points of a network, in the proportions in which they occur."""
    maps = maps_of(model, codec, images)
    pairs = [(c.coder, m) for c, own in zip(codec.coded, maps, strict=True) for m in own]
    symbols = [coder.quantize(m) for coder, m in pairs]
    data = [coder.encode(s) for (coder, _), s in zip(pairs, symbols, strict=True)]
    values = sum(m.size for _, m in pairs)
    steps = {
        "quantize": lambda: [coder.quantize(m) for coder, m in pairs],
        "encode": lambda: [coder.encode(s) for (coder, _), s in zip(pairs, symbols, strict=True)],
        "decode": lambda: [c.decode(d, *m.shape[1:]) for (c, m), d in zip(pairs, data, strict=True)],
        "dequantize": lambda: [coder.dequantize(s) for (coder, _), s in zip(pairs, symbols, strict=True)],
    }
    seconds = {key: best(work) for key, work in steps.items()}
    with torch.no_grad():
        plain = best(lambda: model(images))
        with codec.attach(model):
            coded = best(lambda: model(images))
    return {
        "network": name, "bits_per_value": 8 * sum(map(len, data)) / values,
        **{f"{key}_million_a_second": values / s / 1e6 for key, s in seconds.items()},
        "device_million_a_second": values / (seconds["quantize"] + seconds["encode"]) / 1e6,
        "server_million_a_second": values / (seconds["decode"] + seconds["dequantize"]) / 1e6, "ledger_slowdown": coded / plain,
    }  # fmt: skip


def cut(name: str, model: torch.nn.Module, codec: features.FeatureCodec, images: torch.Tensor, at: str) -> Row:
    """What is sent at one place."""
    device, server = codec.split(model, at)
    coded = device.coded
    values, lengths = coded.maps(device.network(images))
    packets = [coded.encode(v, lengths)[0] for v in values]
    after = coded.point.activated(values) if coded.coder.before else values
    scale = max(float(after.max()), 1e-9) / 255
    raw = [np.rint(a / scale).clip(0, 255).astype(np.uint8) for a in after]
    with torch.no_grad():
        first = best(lambda: device.network(images[:1])) * 1000
        running = device.folded or device.network
        folded = best(lambda: running(images[:1])) * 1000
    row = {
        "network": name, "cut": at, "shape": list(after.shape[1:]), "values": int(after[0].size), "mode": coded.coder.mode,
        "bytes": sum(map(len, packets)) / len(packets),
        "encode_ms": 1000 * best(lambda: [coded.encode(v, lengths) for v in values]) / len(values),
        "decode_ms": 1000 * best(lambda: [coded.decode(p) for p in packets]) / len(values), "device_network_ms": first,
        "folded_network_ms": folded,
        "raw_bytes": float(raw[0].size), "zlib_bytes": sum(len(zlib.compress(r.tobytes(), 9)) for r in raw) / len(raw),
        "png_bytes": sum(len(_png(r)) for r in raw) / len(raw),
        "png_ms": 1000 * best(lambda: [_png(r) for r in raw]) / len(raw),
    }  # fmt: skip
    assert len(server.decode(packets[:2])) == 2
    try:
        import zstandard
    except ImportError:
        return row
    compressor = zstandard.ZstdCompressor(level=19)
    return {**row, "zstd_bytes": sum(len(compressor.compress(r.tobytes())) for r in raw) / len(raw)}


def _png(map_: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(list(map_), 1)).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def speed_table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| network | bits/value | quantize + encode, M values/s | decode + dequantize | forward pass with a ledger |",
        "|---" * 5 + "|",
    ]
    lines += [
        f"| {TITLES[r['network']]} | {r['bits_per_value']:.2f} | {r['device_million_a_second']:.0f} "
        f"(encode alone {r['encode_million_a_second']:.0f}) | {r['server_million_a_second']:.0f} "
        f"(decode alone {r['decode_million_a_second']:.0f}) | {r['ledger_slowdown']:.1f} × |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def cuts_table(rows: list[Row]) -> str:
    """Markdown."""
    heads = ("network", "cut", "map", "packet, bytes", "encode, ms", "decode, ms", "8 bits raw", "PNG", "zlib", "zstd")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for r in rows:
        others = [f"{r[key]:,.0f}" if key in r else "–" for key in ("raw_bytes", "png_bytes", "zlib_bytes", "zstd_bytes")]
        lines.append(
            f"| {TITLES[r['network']]} | `{r['cut']}` | {' × '.join(map(str, r['shape']))} | **{r['bytes']:,.0f}** | "
            f"{r['encode_ms']:.2f} | {r['decode_ms']:.2f} | {' | '.join(others)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    speeds, cuts = [], []
    for name, places in CUTS.items():
        model, images = network(name), samples(name, 256)
        codec = features.calibrate(model, [images], bits_per_value=RATES["auto"][name][0])
        few = images[:16] if name == "resnet20" else images[:2]
        speeds.append(throughput(name, model, codec, few))
        print(json.dumps(speeds[-1]), flush=True)
        for at in places:
            cuts.append(cut(name, model, codec, images[:32:4], at))
            print(json.dumps(cuts[-1]), flush=True)
    machine = {"processor": platform.machine(), "threads": 1, "torch": torch.__version__}
    record = {"command": "python benchmarks/feature_speed.py", "machine": machine, "speed": speeds, "cuts": cuts}
    Path(__file__).with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    insert_table("docs/features.md", "feature_speed.py speed", speed_table(speeds))
    insert_table("docs/features.md", "feature_speed.py cuts", cuts_table(cuts))


if __name__ == "__main__":
    main()
