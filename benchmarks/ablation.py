"""What each part of the method is worth: ResNet-20 at one size, one part changed at a time.

    python benchmarks/ablation.py            # about ten minutes on two cores

Statistics from 1,638 training images; KL divergence to the float network on 2,000 *other* training images. All files have
the same size, so the numbers compare parts, not rates. Writes benchmarks/ablation.json and the table in docs/method.md.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from networks import cifar10, logits, network
from pages import insert_table
from transquant import codec, modules
from transquant.allocation.search import meet_size
from transquant.allocation.steps import Grouping
from transquant.choices import Choice, Method
from transquant.encoder import Encoder, Source
from transquant.quantizers.metric import Damping
from transquant.records import LayerStats, Statistics
from transquant.stats import collect, weight_statistics
from transquant.target_search import FAITHFUL
from transquant.transform_choice import choose_transforms, transforms_of
from transquant.workers import workers

BITS = (1.0, 2.0)
BASE = Choice()
STATES = codec.STATE_BITS


def diagonal(moment: np.ndarray) -> np.ndarray:
    """The diagonal of each group's moment."""
    return np.ascontiguousarray(np.einsum("...ii->...i", moment))


def each(change: Callable[[LayerStats], LayerStats]) -> Callable[[Statistics], Statistics]:
    """Apply a change to every layer's statistics."""
    return lambda stats: replace(stats, layers={k: change(v) for k, v in stats.layers.items()})


def same(stats: Statistics) -> Statistics:
    """Leave the statistics alone."""
    return stats


NO_FEEDBACK = each(lambda s: replace(s, input_moment=diagonal(s.input_moment), output_moment=diagonal(s.output_moment)))
INPUT_SIDE = each(lambda s: replace(s, output_moment=diagonal(s.output_moment)))
OUTPUT_SIDE = each(lambda s: replace(s, input_moment=diagonal(s.input_moment)))


def damped(alpha: float, gamma: float, **other: float | bool) -> Choice:
    """The base choice with another regularisation."""
    return replace(BASE, damping=Damping(alpha, gamma, **other))  # type: ignore[arg-type]


VARIANTS: dict[str, tuple[Callable[[Statistics], Statistics], Choice]] = {
    "all parts, default choices": (same, BASE),
    "no feedback: diagonal sensitivities": (NO_FEEDBACK, BASE),
    "feedback over inputs only": (INPUT_SIDE, BASE),
    "feedback over outputs only": (OUTPUT_SIDE, BASE),
    "damping (0.001, 0.005)": (same, damped(0.001, 0.005)),
    "damping (0.1, 0.5)": (same, damped(0.1, 0.5)),
    "damping (0.5, 2.0)": (same, damped(0.5, 2.0)),
    "no MMSE term": (same, damped(0.02, 0.05, noise=0.0)),
    "one step a layer": (same, replace(BASE, grouping=Grouping("", 0.0))),
    "steps a row": (same, replace(BASE, grouping=Grouping("r", 0.5))),
    "steps a row and column, full spread": (same, replace(BASE, grouping=Grouping("rc", 1.0))),
    "trellis: bits count in full": (same, replace(BASE, rate=1.0)),
    "trellis: bits count for a quarter": (same, replace(BASE, rate=0.25)),
    "trellis: no shrinkage": (same, replace(BASE, shrink=0.0)),
    "trellis: values at their centroids": (same, replace(BASE, shrink=1.0)),
}
FORCED = {
    "scalar quantizer": Method(),
    "trellis of 4 states": Method(state_bits=2),
    "trellis of 16 states": Method(state_bits=4),
    "trellis of 64 states": Method(state_bits=6),
    "no transforms": Method("identity", state_bits=STATES),
    "DCT over every kernel": Method("dct", "kernel", state_bits=STATES),
    "KLT over every kernel": Method("klt", "kernel", state_bits=STATES),
    "ELT over every kernel": Method("elt", "kernel", state_bits=STATES),
    "KLT over input channels everywhere": Method("klt", "input", state_bits=STATES),
}


def main() -> None:
    images, _ = cifar10("train", limit=4048)
    model = network("resnet20")
    state, plan = model.state_dict(), modules.plan_model(model)
    source = Source(*modules.gather(plan, state))
    test = images[2048:]
    reference = logits(model, test).log_softmax(1)
    rows = []
    with workers() as pool:
        batches = [b for k, b in enumerate(modules.micro_batches([images[:2048]])) if k % 5]
        stats = collect(model, batches, plan, modules.run_batch, pool)
        sample = collect(model, batches, plan, modules.run_batch, pool, cross_validate=False)
        auto = Method(state_bits=STATES)
        variants = {name: (change(stats), choice, auto) for name, (change, choice) in VARIANTS.items()}
        variants |= {name: (stats, BASE, method) for name, method in FORCED.items()}
        variants["sample moments"] = (sample, BASE, auto)
        variants["no calibration"] = (weight_statistics(plan, source.values), FAITHFUL, auto)
        for name, (changed, choice, method) in variants.items():
            encoder = Encoder(plan, source, changed, pool, method)
            row: dict[str, object] = {"variant": name}
            for bits in BITS:
                row[f"kl_{bits}"] = divergence(encoder, choice, model, bits, test, reference)
            rows.append(row)
            print(json.dumps(row), flush=True)
    record = {"command": "python benchmarks/ablation.py", "torch": torch.__version__, "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    lines = ["| ResNet-20, KL in nats at | " + " | ".join(f"{b} bits" for b in BITS) + " |", "|---" + "|---" * len(BITS) + "|"]
    lines += [f"| {row['variant']} | " + " | ".join(f"{row[f'kl_{b}']:.3f}" for b in BITS) + " |" for row in rows]
    insert_table("docs/method.md", "ablation.py", "\n".join(lines) + "\n")


def divergence(
    encoder: Encoder, choice: Choice, model: nn.Module, bits: float, images: torch.Tensor, reference: torch.Tensor
) -> float:
    """KL in nats of the network in a file of exactly that size, within half a per cent."""
    target = bits * encoder.plan.num_parameters / 8
    encoder = encoder.transformed(transforms_of(choose_transforms(encoder, encoder.first_guess(target), choice, encoder)))

    def size_of(c: float) -> float:
        return len(encoder.encode(encoder.draft(c, choice)).data)

    found = meet_size(size_of, target, 0.005 * target, encoder.first_guess(target), target / 2)
    decoded = copy.deepcopy(model)
    decoded.load_state_dict(encoder.draft(found.c, choice).state(), strict=False)
    output = logits(decoded, images).log_softmax(1)
    return (reference.exp() * (reference - output)).sum(1).mean().item()


if __name__ == "__main__":
    main()
