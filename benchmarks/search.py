"""Searches for channels and bits: who searches best, and what comes of it on three networks.

    python benchmarks/search.py searchers              # every searcher, 300 episodes, three seeds, ResNet-20 and SqueezeNet: hours
    python benchmarks/search.py mobilenet              # MobileNetV1 0.25, five times smaller, mixed precision, no training
    python benchmarks/search.py half                   # ResNet-20, half of the multiply-adds, a fifth of the bytes, 8-bit rows
    python benchmarks/search.py searchers --episodes 10 --seeds 1 --samples 100     # to try it out: nothing is kept

Searchers: the same budgets, predictions and numbers of episodes for all; "predicted" is the best reward, −log10 of the predicted
distortion, "measured" the value of the chosen policy's file on held-back calibration samples, minus its KL divergence in nats.
MobileNetV1: two folds of the 1,000 sample images, calibrated on one half and scored on the other, both ways. ResNet-20: calibrated
on 2,048 training images, trained for five epochs (with channels by stage), scored on all test images.
Each result is a file in benchmarks/search/, and is not measured again while it is there. Writes the table in docs/search.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import transquant as tq
from main_job import folds
from networks import accuracy, cifar10, logits, network
from pages import insert_table
from training import crop_and_flip, progress
from transquant import modules
from transquant.inference.cost import measure
from transquant.searching.episodes import Record
from transquant.searching.hunt import Hunt
from transquant.searching.pipeline import Ready, ready
from transquant.searching.searchers import METHODS
from transquant.workers import workers

RESULTS = Path(__file__).with_suffix("")
CACHE = Path(__file__).parent / "cache" / "search"
TITLES = {"resnet20": "ResNet-20", "squeezenet": "SqueezeNet 1.1"}
BUDGETS: dict[str, dict[str, Any]] = {"resnet20": {"ratio": 10, "macs": 0.7}, "squeezenet": {"ratio": 8, "macs": 0.85}}
EPISODES, SEEDS, SAMPLES = 300, 3, {"resnet20": 2048, "squeezenet": 500}
HALF: dict[str, Any] = {"ratio": 5, "macs": 0.5, "precision": 8}
# by group, channels that go from the network that is trained afterwards: many where maps are large, few where most weights are
BY_STAGE = {f"layer{stage}.{block}.conv1": gone for stage, gone in ((1, 13), (2, 18), (3, 8)) for block in range(3)}
BY_STAGE["layer2.0.conv1"] = 17


def searchers(name: str, methods: list[str], seeds: int, episodes: int, samples: int, keep: bool) -> list[dict[str, Any]]:
    """All searchers on one network, with the same predictions, so that only they differ."""
    cells = [(method, seed) for method in methods for seed in range(seeds)]
    if keep and all((RESULTS / f"{name}-{method}-{seed}.json").exists() for method, seed in cells):
        return [kept(f"{name}-{method}-{seed}", dict, keep) for method, seed in cells]
    model, calibration = network(name), folds(name)[0][0][:samples]
    plan = modules.plan_model(model)
    most = plan.original_bytes / BUDGETS[name]["ratio"]
    rows = []
    with workers() as pool:
        known = ready(model, list(calibration.split(100)), most, BUDGETS[name]["macs"], None, pool, lambda *_: None)
        for method, seed in cells:
            rows.append(kept(f"{name}-{method}-{seed}", lambda m=method, s=seed: cell(name, known, m, s, episodes, samples), keep))
    return rows


def cell(name: str, known: Ready, method: str, seed: int, episodes: int, samples: int) -> dict[str, Any]:
    """One searcher with one seed."""
    record = Record(None, "")
    hunt = Hunt(known.predictor, known.budget, known.trials, record, lambda *_: None, None)
    start = time.perf_counter()
    hunt.walk(method, episodes, episodes, seed)
    seconds = time.perf_counter() - start
    chosen = hunt.choose()
    rewards = [record.known[k].reward for k in range(episodes)]
    return {
        "network": name, "method": method, "seed": seed, "episodes": episodes, "samples": samples, **BUDGETS[name],
        "first": rewards[0], "predicted": max(rewards), "measured": chosen.measured.value, "measured_bytes": chosen.measured.bytes,
        "seconds": seconds, "torch": torch.__version__,
    }  # fmt: skip


def mobilenet(episodes: int, samples: int) -> dict[str, Any]:
    """MobileNetV1 0.25 over two folds: top-5 before and after, paired."""
    model = network("mobilenet")
    before, after, sizes, macs, seconds = [], [], [], [], []
    for calibration, images, labels in folds("mobilenet"):
        start = time.perf_counter()
        result = tq.search(model, calibration[:samples].split(100), ratio=5, episodes=episodes)
        seconds.append(time.perf_counter() - start)
        sizes.append(len(result.compressed.data))
        macs.append(result.report.macs[1] / result.report.macs[0])
        before.append(top5(model, images, labels))
        after.append(top5(result.compressed.install(network("mobilenet")), images, labels))
    difference = torch.cat(after) - torch.cat(before)
    return {
        "network": "mobilenet", "ratio": 5, "episodes": episodes, "bytes": sizes, "macs": macs, "seconds": seconds,
        "top5_float": 100 * torch.cat(before).mean().item(), "top5": 100 * torch.cat(after).mean().item(),
        "difference": 100 * difference.mean().item(), "standard_error": 100 * difference.std().item() / len(difference) ** 0.5,
    }  # fmt: skip


def found(episodes: int = EPISODES, samples: int = 2048) -> tq.SearchResult:
    """ResNet-20 at half of its multiply–adds; searched for once, then taken from the record."""
    images, _ = cifar10("train", limit=samples)
    work = CACHE / f"half-{episodes}-{samples}"
    return tq.search(network("resnet20"), images.split(256), **HALF, episodes=episodes, work=work)


def by_stage(images: Tensor) -> nn.Module:
    """ResNet-20 without the channels of BY_STAGE: in each group those that cost least by the statistics; float."""
    model = network("resnet20")
    with workers() as pool:
        known = ready(model, list(images.split(256)), None, HALF["macs"], HALF["precision"], pool, lambda *_: None)
    space = known.predictor.space
    policy = space.with_bits(BY_STAGE, dict.fromkeys(space.weights, float(HALF["precision"])))
    return known.trials.network(known.trials.kept(known.predictor, policy))


def tuned(model: nn.Module) -> tq.CompressedModel:
    """The file of a smaller network after five epochs with 8-bit weights; it says which channels were kept."""
    result = tq.training.fit(
        model, cifar10("train"), method="qat", bits=8, epochs=5, batch=64, teacher=network("resnet20"), distill=0.7,
        hints=[f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)], rate=0.3, vector_rate=0.002,
        augment=crop_and_flip, autocast="bfloat16", channels_last=True, work=CACHE / "half-training", progress=progress("half"),
    )  # fmt: skip
    return result.compressed


def half(episodes: int, samples: int) -> dict[str, Any]:
    """ResNet-20 at half of its multiply–adds: as the search finds it, and, with channels that are chosen for training, after that.
    The trained file is committed, and not made again while it is there."""
    path = RESULTS / "resnet20-half.tq"
    if not path.exists():
        tuned(by_stage(cifar10("train", limit=samples)[0])).save(path)
    start = time.perf_counter()
    result = found(episodes, samples)
    seconds = time.perf_counter() - start
    whole, trained = network("resnet20"), tq.load(path).install(network("resnet20"))
    images, labels = cifar10("test")
    scores = {
        "float": accuracy(whole, images, labels), "pruned": accuracy(result.network, images, labels),
        "file": accuracy(result.compressed.install(network("resnet20")), images, labels),
        "trained": accuracy(trained, images, labels),
    }  # fmt: skip
    milliseconds, macs = {}, {}
    for count in (1, 64):
        costs = measure({"before": whole, "after": trained}, images[:count], lambda m, x: m(x), {"before": 0, "after": 0}, 50)
        milliseconds[f"batch {count}"] = {name: cost.milliseconds for name, cost in costs.items()}
        macs = {name: cost.macs // count for name, cost in costs.items()}
    return {
        "network": "resnet20", **HALF, "episodes": episodes, "top1": scores, "removed": dict(result.policy.removed),
        "by_stage": BY_STAGE, "macs": macs, "parameters": sum(p.numel() for p in trained.parameters()),
        "trained_bytes": path.stat().st_size, "original_bytes": result.report.bytes[0], "milliseconds": milliseconds,
        "threads": torch.get_num_threads(), "report": result.report.as_dict(), "seconds": seconds,
    }  # fmt: skip


def top5(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Whether each label is among the five largest logits."""
    return (logits(model, images, 100).topk(5, 1).indices == labels[:, None]).any(1).float()


def kept(name: str, measure: Any, keep: bool) -> dict[str, Any]:
    """A result by name: as it was measured, or measured now."""
    path = RESULTS / f"{name}.json"
    if keep and path.exists():
        found_before: dict[str, Any] = json.loads(path.read_text())
        return found_before
    row: dict[str, Any] = measure()
    print(name, json.dumps(row), file=sys.stderr, flush=True)
    if keep:
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(row, indent=1) + "\n")
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Searchers side by side: mean and spread over seeds."""
    lines = [
        "| network | searcher | first proposal | best reward | measured value | seconds of search |",
        "|---|---|---|---|---|---|",
    ]
    for name in TITLES:
        for method in METHODS:
            mine = [r for r in rows if (r["network"], r["method"]) == (name, method)]
            if mine:
                cells = [spread([r[key] for r in mine]) for key in ("first", "predicted", "measured")]
                seconds = statistics.mean(r["seconds"] for r in mine)
                lines.append(f"| {TITLES[name]} | {method} | {' | '.join(cells)} | {seconds:.1f} |")
    return "\n".join(lines) + "\n"


def found_table() -> str:
    """What was found for MobileNetV1 and ResNet-20, before and after."""
    lines = ["| network | bytes | multiply–adds | score | milliseconds, batch of 1 | of 64 |", "|---|---|---|---|---|---|"]
    if (path := RESULTS / "mobilenet.json").exists():
        row = json.loads(path.read_text())
        whole = modules.plan_model(network("mobilenet")).original_bytes
        lines.append(f"| MobileNetV1 0.25, float | {whole:,} | 100 % | top-5 {row['top5_float']:.2f} | | |")
        change = f"{row['difference']:+.2f} ± {row['standard_error']:.2f}"
        macs, size = 100 * statistics.mean(row["macs"]), statistics.mean(row["bytes"])
        lines.append(f"| five times smaller, not trained | {size:,.0f} | {macs:.1f} % | top-5 {row['top5']:.2f} ({change}) | | |")
    if (path := RESULTS / "half.json").exists():
        row = json.loads(path.read_text())
        report, score, times = row["report"], row["top1"], row["milliseconds"]

        def line(what: str, size: int, macs: int, top1: float, when: str) -> str:
            took = [f"{times[f'batch {count}'][when]:.1f}" if when else "" for count in (1, 64)]
            return f"| {what} | {size:,} | {macs / 1e6:.2f} M | top-1 {top1:.2f} | {took[0]} | {took[1]} |"

        lines.append(line("ResNet-20, float", report["original_bytes"], report["original_macs"], score["float"], "before"))
        lines.append(line("as the search finds it, 8-bit", report["bytes"], report["macs"], score["file"], ""))
        lines.append(line("by stage, 8-bit, five epochs", row["trained_bytes"], row["macs"]["after"], score["trained"], "after"))
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Searches for channels and bits.")
    parser.add_argument("part", choices=["searchers", "mobilenet", "half"])
    parser.add_argument("--episodes", type=int, default=EPISODES)
    parser.add_argument("--samples", type=int, help="calibration samples, where not all")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--networks", nargs="*", default=list(TITLES), choices=list(TITLES))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    given = parser.parse_args()
    keep = (given.episodes, given.samples) == (EPISODES, None)
    if given.part != "searchers":
        part = mobilenet if given.part == "mobilenet" else half
        kept(given.part, lambda: part(given.episodes, given.samples or 2048), keep)
        if keep:
            insert_table("docs/search.md", "search.py found", found_table())
        return
    rows = []
    for name in given.networks:
        rows += searchers(name, given.methods, given.seeds, given.episodes, given.samples or SAMPLES[name], keep)
    if keep:
        insert_table("docs/search.md", "search.py", table(rows))


if __name__ == "__main__":
    main()
