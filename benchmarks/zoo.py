"""Networks of other libraries, with random weights: every layer coded or listed, and distortion as predicted.

    python benchmarks/zoo.py                     # everything; needs the extra "zoo" (timm, transformers)
    python benchmarks/zoo.py resnet18 gpt2       # some of it

Random weights give outputs that hardly depend on the input: normalisations that begin at zero cut branches off, and logits
are nearly constant. So scales are drawn from [0.5, 1.5], BatchNorms take the statistics of the calibration inputs, and the
last layer is scaled until the logits differ between samples by a standard deviation of 2. Inputs are sums of random waves
(images, sound) and walks on a random graph (words). Networks with gates answer to some of them ten times as strongly, which no
trained one does: of 64 samples, the 48 whose outputs are nearest to the mean are kept, for calibration and for the comparison.
Each network: 48 samples for calibration, 4 bits a parameter, effort 1; then decoded, installed in a new instance, and compared
on 48 other samples. Writes benchmarks/zoo.json.

"predicted" is the measured distortion of the samples that `compress` held back, which is what its report promises; "closed_form"
is Σ tr(G E A Eᵀ). With 48 samples a layer of few positions and many inputs (a classifier) has fewer samples than inputs, and
the closed form is that of these samples alone: there it says far too little.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import transquant as tq
from transquant.modules import plan_model
from transquant.stats.metric import distance

DRAWN, SAMPLES = 64, 48
BITS = 4.0
TOLERANCE = 2.0  # either way, predicted / measured: from eight or nine held-back samples
IMAGES = {"resnet18": 96, "densenet121": 96, "mobilenetv3_small_050": 128, "vit_tiny_patch16_224": 224, "convnext_atto": 96}
_libraries: list[torch.library.Library] = []


class SoundAutoencoder(nn.Module):
    """Four times fewer samples with four times the channels, and back. Input and output N x 1 x T."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv1d(1, 32, 8, 4, 2), nn.GroupNorm(4, 32), nn.ELU(), nn.Conv1d(32, 64, 8, 4, 2), nn.ELU(),
            nn.Conv1d(64, 64, 7, padding="same", groups=4, padding_mode="reflect"), nn.ELU(), nn.Conv1d(64, 16, 3, padding=1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.ConvTranspose1d(16, 64, 8, 4, 2), nn.ELU(), nn.ConvTranspose1d(64, 32, 8, 4, 2, groups=2), nn.ELU(),
            nn.Conv1d(32, 1, 7, padding=3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def declare_vision_ops() -> None:
    """timm imports torchvision, which beside a torch without its compiled part misses two operators: declare, never define."""
    if not _libraries and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)


def waves(samples: int, size: tuple[int, ...], channels: int, seed: int) -> Tensor:
    """Sums of six random waves a channel, with a little noise: (N, channels, *size), each sample of mean 0 and deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*(torch.linspace(0, 1, s) for s in size), indexing="ij")
    total = torch.zeros(samples, channels, *size)
    ones = (1,) * len(size)
    for _ in range(6):
        # frequencies shared by the channels of a sample, phases and amplitudes their own
        frequency = torch.randn(samples, len(size), generator=generator) * 8
        angle = sum(frequency[:, d].view(-1, 1, *ones) * axis for d, axis in enumerate(axes))
        phase = torch.rand(samples, channels, *ones, generator=generator)
        total += torch.randn(samples, channels, *ones, generator=generator) * torch.cos(2 * torch.pi * (angle + phase))
    flat = total.flatten(1)
    total = (total - flat.mean(1).view(-1, 1, *ones)) / flat.std(1).view(-1, 1, *ones)
    return total + 0.1 * torch.randn(total.shape, generator=generator)


def walks(samples: int, length: int, words: int, seed: int) -> Tensor:
    """Walks (N, length) on a graph in which a word has four followers."""
    followers = torch.randint(0, words, (words, 4), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    steps = [torch.randint(0, words, (samples,), generator=generator)]
    for _ in range(length - 1):
        steps.append(followers[steps[-1], torch.randint(0, 4, (samples,), generator=generator)])
    return torch.stack(steps, 1)


def ordinary(model: nn.Module, inputs: Tensor) -> Tensor:
    """The samples whose outputs are nearest to the mean output."""
    outputs = logits(model, inputs).flatten(1)
    return inputs[(outputs - outputs.mean(0)).norm(dim=1).argsort()[:SAMPLES].sort().values]


@torch.no_grad()
def scramble(model: nn.Module) -> None:
    """Scales and shifts of normalisations, and scales of branches, that are not ones and zeros."""
    for module in model.modules():
        norm = "Norm" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            if (norm and name == "weight") or name == "gamma":
                parameter.uniform_(0.5, 1.5)
            elif norm and name == "bias":
                parameter.normal_(0, 0.1)


@torch.no_grad()
def wake(model: nn.Module, inputs: Tensor, head: nn.Module) -> Tensor:
    """Make random weights answer to their inputs, as the module's first lines say; `head` is what scales the logits. The
    inputs that are ordinary."""
    scramble(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the plain mean over all batches
            module.reset_running_stats()
    model.train()
    for part in inputs.split(16):
        model(part)
    model.eval()
    inputs = ordinary(model, inputs)
    outputs = logits(model, inputs)
    head.weight.mul_(2 / (outputs - outputs.mean(0)).std())
    mean = logits(model, inputs).flatten(0, -2).mean(0)
    if head.bias is not None and head.bias.shape == mean.shape:
        head.bias.sub_(mean)
    return inputs


@torch.no_grad()
def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """Outputs of the model, whatever it wraps them in."""
    parts = [model(part) for part in inputs.split(16)]
    return torch.cat([getattr(p, "logits", p) for p in parts])


def image_network(name: str) -> tuple[Callable[[], nn.Module], Tensor, Tensor, str]:
    declare_vision_ops()
    import timm

    size = (IMAGES[name],) * 2
    head = timm.create_model(name).pretrained_cfg["classifier"]
    return lambda: timm.create_model(name), waves(DRAWN, size, 3, 1), waves(DRAWN, size, 3, 2), head


def language_network(name: str) -> tuple[Callable[[], nn.Module], Tensor, Tensor, str]:
    """GPT-2 of two layers; its logits are scaled in the last normalisation, since the output layer is the embedding too."""
    declare_vision_ops()
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=512, n_positions=64, n_embd=128, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, initializer_range=0.1
    )
    return lambda: GPT2LMHeadModel(config), walks(DRAWN, 64, 512, 1), walks(DRAWN, 64, 512, 2), "transformer.ln_f"


def sound_network(name: str) -> tuple[Callable[[], nn.Module], Tensor, Tensor, str]:
    return SoundAutoencoder, waves(DRAWN, (1024,), 1, 1), waves(DRAWN, (1024,), 1, 2), "decoder.4"


NETWORKS = dict.fromkeys(IMAGES, image_network) | {"gpt2": language_network, "sound_autoencoder": sound_network}


def run(name: str) -> dict[str, Any]:
    """Compress, decode, install, compare: one row."""
    make, calibration, others, head = NETWORKS[name](name)
    torch.manual_seed(0)
    model = make()
    calibration = wake(model, calibration, model.get_submodule(head))
    others = ordinary(model, others)
    start = time.perf_counter()
    compressed = tq.compress(model, calibration, bits=BITS, metric="mse" if name == "sound_autoencoder" else "kl", effort=1)
    seconds = time.perf_counter() - start
    report = compressed.report
    decoded = compressed.install(make().eval())
    reference, output = logits(model, others), logits(decoded, others)
    total, count = distance(reference, output, report.metric)
    measured = total / count
    state, plan = compressed.state_dict(), plan_model(model)
    kinds = Counter(type(s).__name__.removesuffix("Spec") for s in plan.specs)
    return {
        "network": name, "parameters": report.num_parameters, "file_bytes": report.file_bytes, "metric": report.metric,
        "predicted": report.measured_distortion, "measured": measured, "ratio": report.measured_distortion / measured,
        "tolerance": TOLERANCE, "closed_form": report.predicted_distortion,
        "spread": float((reference - reference.mean(0)).std()),
        "same_best": float((reference.argmax(-1) == output.argmax(-1)).float().mean()) if report.metric == "kl" else None,
        "tensors": {"all": len(state), **kinds}, "kinds": Counter(s.kind for s in plan.specs if hasattr(s, "kind")),
        "exact": [{"name": n, "reason": r} for n, r in report.raw if not n.endswith("num_batches_tracked")],
        "transforms": Counter(r.transform for r in report.layers), "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    path = Path(__file__).with_suffix(".json")
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for name in sys.argv[1:] or NETWORKS:
        row = run(name)
        rows = [r for r in rows if r["network"] != name] + [row]
        print(
            json.dumps({k: v for k, v in row.items() if k != "exact"}), f"exact: {len(row['exact'])}", file=sys.stderr, flush=True
        )
    rows.sort(key=lambda r: list(NETWORKS).index(r["network"]))
    versions = {"torch": torch.__version__}
    for library in ("timm", "transformers"):
        if library in sys.modules:
            versions[library] = sys.modules[library].__version__
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), **versions}
    path.write_text(json.dumps({"command": "python benchmarks/zoo.py", "machine": machine, "rows": rows}, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['network']:>22} {row['metric']} predicted {row['predicted']:.3g}, measured {row['measured']:.3g} "
            f"(ratio {row['ratio']:.2f}), closed form {row['closed_form']:.3g}, {row['seconds']:.0f} s, {row['tensors']}"
        )


if __name__ == "__main__":
    main()
