"""Retraining ResNet-20 on CIFAR-10 and the character LSTM, all methods under one protocol: file size against the score.

    python benchmarks/training.py                        # the whole queue: a run that was killed goes on, what is done is skipped
    python benchmarks/training.py --runs transform-1.0 crq-1.3
    python benchmarks/training.py --score                # decode and score the committed files again (a minute), train nothing

Every run begins with the shared float weights and takes ten epochs of the training images (crops and flips), twenty where RUNS says
so, one seed; the whole file is counted, and the score is that of the decoded file on all 10,000 test images, which nothing else
ever sees. "float": the float network trained in the same way. The language model learns the first 90 % of the text, twenty times
over, and is scored on the last 10 %; `rows` are those of a batch, their characters, and the
share of them that the float network has written itself. Checkpoints lie in benchmarks/cache;
results, one JSON and one .tq file a run, in benchmarks/training. Writes the table and the picture of docs/training.md.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import transquant as tq
from networks import ResNet20, accuracy, after_warm_up, bits_per_character, characters, cifar10, network
from pages import ROOT, insert_table

EPOCHS = 10
BATCH = 128
FOLDER = Path(__file__).with_suffix("")
CACHE = Path(__file__).parent / "cache" / "training"
Row = dict[str, Any]

COMMON = {"distill": 0.7, "rate": 0.01, "vector_rate": 0.002}
RUNS: dict[str, dict[str, Any]] = {
    "float": {"method": None},
    "transform-1.0": {"method": "transform", "bits": 1.0, "epochs": 20},
    "transform-0.7": {"method": "transform", "bits": 0.7, "distill": 0.5},
    "transform-2.0": {"method": "transform", "bits": 2.0, "epochs": 20},
    "crq-1.3": {"method": "crq", "bits": 1.3},
    "diffq-2.0": {"method": "diffq", "bits": 2.0},
    "diffq-4.0": {"method": "diffq", "bits": 4.0},
    "lsq-2": {"method": "lsq", "bits": 2},
    "qat-2": {"method": "qat", "bits": 2},
    "lstm-1.5": {"method": "transform", "bits": 1.5, "epochs": 20, "distill": 1.0, "autocast": "bfloat16", "gradual": True},
    "lstm-progressive-1.5": {
        "method": "progressive", "bits": 1.5, "epochs": 20, "distill": 1.0, "autocast": "bfloat16", "rows": (32, 400, 0.25),
        "rate": 0.004, "vector_rate": 0.0005, "states": 64,
    },
}  # fmt: skip
LABELS = {
    "transform": "transform quantization",
    "progressive": "progressive",
    "diffq": "DiffQ",
    "crq": "CRQ (reconstructed)",
    "qat": "QAT",
    "lsq": "LSQ",
}


def crop_and_flip(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images shifted by up to four pixels, what is outside 0; half of them mirrored."""
    count, side = len(images), images.shape[-1]
    padded = functional.pad(images, (4, 4, 4, 4))
    shift = torch.randint(0, 9, (count, 2), generator=generator)
    rows = (shift[:, 0, None] + torch.arange(side))[:, None, :, None]
    mirrored = torch.rand(count, generator=generator)[:, None] < 0.5
    places = torch.arange(side).expand(count, side)
    columns = (shift[:, 1, None] + torch.where(mirrored, places.flip(1), places))[:, None, None, :]
    channels = torch.arange(images.shape[1])[None, :, None, None]
    return padded[torch.arange(count)[:, None, None, None], channels, rows, columns], labels


def train_images(name: str, settings: dict[str, Any], epochs: int) -> bytes:
    """The file of one run on CIFAR-10."""
    images, labels = cifar10("train")
    result = tq.training.fit(
        network("resnet20"), (images, labels), epochs=epochs, batch=BATCH, teacher="self", augment=crop_and_flip,
        autocast="bfloat16", channels_last=True, work=CACHE / name, progress=progress(name), **{**COMMON, **settings},
    )  # fmt: skip
    return result.compressed.data


class Windows:
    """Rows of text at random places of its first 90 %: an epoch shows as many characters as there are. `written`: the share of the
    rows that the float network has written."""

    def __init__(self, batch: int = 128, length: int = 200, written: float = 0.0) -> None:
        self.text = characters(0.0, last=0.9).reshape(-1)
        self.batch, self.length, self.own = batch, length, round(written * batch)
        self.written = written_text(self.text) if self.own else self.text[None]

    def __len__(self) -> int:
        return len(self.text) // (self.batch * self.length)

    def __iter__(self):
        for _ in range(len(self)):
            rows = self._drawn(self.text[None], self.batch - self.own)
            if self.own:
                rows = torch.cat([rows, self._drawn(self.written, self.own)])
            yield rows[:, :-1], rows[:, 1:]

    def _drawn(self, texts: Tensor, count: int) -> Tensor:
        which = torch.randint(0, len(texts), (count,))
        places = torch.randint(0, texts.shape[1] - self.length - 1, (count,))
        return torch.stack([texts[i, p : p + self.length + 1] for i, p in zip(which.tolist(), places.tolist(), strict=True)])


@torch.no_grad()
def written_text(text: Tensor, rows: int = 250, length: int = 4000, begin: int = 50) -> Tensor:
    """Rows that the float network writes, a character after the other as it expects them, each from a place of the text on."""
    model, generator = network("charrnn"), torch.Generator().manual_seed(0)
    places = torch.randint(0, len(text) - begin, (rows,), generator=generator)
    seen, state, found = torch.stack([text[p : p + begin] for p in places.tolist()]), None, []
    for _ in range(length):
        outputs, state = model.lstm(model.embedding(seen), state)
        seen = torch.multinomial(model.decoder(outputs[:, -1]).softmax(-1), 1, generator=generator)
        found.append(seen)
    return torch.cat(found, 1)


def next_character(outputs: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of every character behind the warm-up, nats."""
    return functional.cross_entropy(outputs.flatten(0, 1), wanted[:, -outputs.shape[1] :].flatten())


def train_text(name: str, settings: dict[str, Any], epochs: int) -> bytes:
    """The file of the language model."""
    settings = dict(settings)
    windows = Windows(*settings.pop("rows", (BATCH, 200)))
    result = tq.training.fit(
        network("charrnn"), windows, epochs=epochs, loss=next_character, teacher="self", output=after_warm_up,
        work=CACHE / name, progress=progress(name), **{**COMMON, **settings},
    )  # fmt: skip
    return result.compressed.data


def train_float(epochs: int) -> nn.Module:
    """The float network after as many epochs, without a quantizer: SGD, as it was trained first, since Adam gives less."""
    images, labels = cifar10("train")
    model = network("resnet20").train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    steps = epochs * (len(images) // BATCH)
    order = torch.cat([torch.randperm(len(images), generator=torch.Generator().manual_seed(e)) for e in range(epochs)])
    for step in range(steps):
        batch = order[step * BATCH : (step + 1) * BATCH]
        x, y = crop_and_flip(images[batch], labels[batch], torch.Generator().manual_seed(step))
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(x.to(memory_format=torch.channels_last))
        functional.cross_entropy(outputs.float(), y).backward()
        optimizer.step()
    return model.eval()


def measure(name: str, path: Path) -> Row:
    """Score of a committed file, as anyone decodes it."""
    compressed = tq.load(path)
    row: Row = {"file_bytes": path.stat().st_size, "bits_per_parameter": compressed.report.bits_per_parameter}
    if name.startswith("lstm"):
        rows = characters(0.9)
        model = network("charrnn")
        row["float"] = bits_per_character(model, rows)
        return row | {"score": bits_per_character(compressed.install(model).eval(), rows)}
    images, labels = cifar10("test")
    row["float"] = accuracy(network("resnet20"), images, labels)
    return row | {"score": accuracy(compressed.install(ResNet20()).eval(), images, labels)}


def run(name: str, epochs: int) -> Row:
    """One run of the queue: trains, writes the file, scores it."""
    settings, start = dict(RUNS[name]), time.perf_counter()
    epochs = settings.pop("epochs", epochs)
    path = FOLDER / f"{name}.tq"
    if settings["method"] is None:
        images, labels = cifar10("test")
        row: Row = {"float": accuracy(network("resnet20"), images, labels)}
        row["score"] = accuracy(train_float(epochs), images, labels)
    else:
        data = (train_text if name.startswith("lstm") else train_images)(name, settings, epochs)
        path.write_bytes(data)
        row = measure(name, path)
    machine = {"processor": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    how = settings if settings["method"] is None else {**COMMON, **settings}
    return {"name": name, **how, "epochs": epochs, **row, "seconds": time.perf_counter() - start, "machine": machine}


def progress(name: str) -> Any:
    last = [0.0]

    def say(stage: str, done: int, total: int) -> None:
        if time.monotonic() - last[0] > 20:
            last[0] = time.monotonic()
            print(f"{name}: {stage} {done} of {total}", file=sys.stderr, flush=True)

    return say


def rows() -> list[Row]:
    """All results, in the order of the queue."""
    return [json.loads(p.read_text()) for name in RUNS if (p := FOLDER / f"{name}.json").exists()]


def title(name: str) -> str:
    """What a run is called in the table."""
    settings = RUNS[name]
    if settings["method"] is None:
        return "float, fine-tuned"
    depth = f", {settings['bits']} bits a weight" if settings["method"] in ("qat", "lsq") else ""
    return LABELS[settings["method"]] + depth + (f", {settings['transform'].upper()}" if "transform" in settings else "")


def untrained() -> dict[float, float]:
    """Score by bits a parameter of the same network without training, at the highest effort."""
    known = json.loads((ROOT / "benchmarks" / "main_job.json").read_text())["rows"]
    return {r["bits_per_parameter"]: r["score"] for r in known if r["network"] == "resnet20" and r["effort"] == 9}


def table(found: list[Row]) -> str:
    """All runs as Markdown."""
    heads = ("network", "method", "bits a parameter", "file", "score", "float", "epochs", "minutes")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in found:
        bits, size = "32", "1,089 KB"
        if "file_bytes" in row:
            bits, size = f"**{row['bits_per_parameter']:.3f}**", f"{row['file_bytes']:,}"
        network, form, unit = "ResNet-20", ".2f", " %"
        if row["name"].startswith("lstm"):
            network, form, unit = "character LSTM", ".3f", " bits/char"
        scores = f"{row['score']:{form}}{unit} | {row['float']:{form}}"
        lines.append(
            f"| {network} | {title(row['name'])} | {bits} | {size} | {scores} | {row['epochs']} | {row['seconds'] / 60:.0f} |"
        )
    return "\n".join(lines) + "\n"


def picture(found: list[Row]) -> None:
    """docs/training.png: accuracy on the test images against bits a parameter."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    curve = sorted(untrained().items())
    axes.plot([b for b, _ in curve], [s for _, s in curve], "o-", color="0.6", markersize=3, label="not trained (effort 9)")
    images = [r for r in found if r["name"] != "float" and not r["name"].startswith("lstm")]
    for method, marker in zip(LABELS, "oPsD^v", strict=True):
        own = sorted((r["bits_per_parameter"], r["score"]) for r in images if r["method"] == method)
        if own:
            axes.plot(*zip(*own, strict=True), marker + ("-" if len(own) > 1 else ""), label=LABELS[method])
    for row in found:
        if row["name"] == "float":
            axes.axhline(row["score"], color="0.3", linestyle=":", label=f"float after {row['epochs']} epochs")
            axes.axhline(row["float"], color="0.3", linestyle="--", linewidth=0.8, label="float")
    axes.set(xlabel="bits a parameter, whole file", ylabel="top-1 on 10,000 test images, %", ylim=(82, None), xlim=(0.4, 4.2))
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "training.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--pages", action="store_true", help="only write the table and the picture")
    parser.add_argument("--score", action="store_true", help="score the committed files again")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    for name in [] if options.pages else options.runs:
        result, file = FOLDER / f"{name}.json", FOLDER / f"{name}.tq"
        if options.score and file.exists():
            print(name, json.dumps(measure(name, file)), flush=True)
        elif not options.score and not result.exists():
            row = run(name, options.epochs)
            print(json.dumps(row), file=sys.stderr, flush=True)
            result.write_text(json.dumps(row, indent=1) + "\n")
    if not options.score:
        insert_table("docs/training.md", "training.py", table(rows()))
        picture(rows())


if __name__ == "__main__":
    main()
