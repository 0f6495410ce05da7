"""Runs in Brevitas' own environment: GPTQ and bias correction of one network at many bit widths.

    python brevitas_gptq.py resnet20 images.npy folder '[2, 3, 4]'

`images.npy`: calibration images float32 (N, C, H, W). Writes folder/brevitas_<bits>.npz, the dequantized weights and the
corrected biases, and folder/brevitas_<bits>.json with the bytes they count: codes packed without gaps, a scale and a
bias in 16 bits for each output channel. Nothing is saved by Brevitas itself at that size.
"""

from __future__ import annotations

import json
import sys
from math import ceil
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from brevitas import nn as qnn
from brevitas.graph.calibrate import bias_correction_mode
from brevitas.graph.gptq import gptq_mode
from brevitas.quant.scaled_int import Int8WeightPerChannelFloatMSE

from networks import network

BATCH = 100


def quantized(model: nn.Module, bits: int) -> nn.Module:
    """The model with Brevitas' layers in place of its own: signed codes of `bits`, a scale for each output channel."""
    options = {"weight_quant": Int8WeightPerChannelFloatMSE, "weight_bit_width": bits}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d):
            twin = qnn.QuantConv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups,
                bias=layer.bias is not None, **options,
            )  # fmt: skip
        elif isinstance(layer, nn.Linear):
            twin = qnn.QuantLinear(layer.in_features, layer.out_features, layer.bias is not None, **options)
        else:
            continue
        twin.load_state_dict(layer.state_dict(), strict=False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, twin)
    return model.eval()


@torch.no_grad()
def main() -> None:
    images, folder = torch.from_numpy(np.load(sys.argv[2])), Path(sys.argv[3])
    batches = images.split(BATCH)
    for bits in json.loads(sys.argv[4]):
        model = quantized(network(sys.argv[1]), bits)
        model(batches[0])
        with gptq_mode(model, use_quant_activations=False, create_weight_orig=False) as gptq:
            for _ in range(gptq.num_layers):
                for batch in batches:
                    gptq.model(batch)
                gptq.update()
        with bias_correction_mode(model):
            for batch in batches:
                model(batch)
        arrays, count = {}, 0
        for name, layer in model.named_modules():
            if isinstance(layer, qnn.QuantConv2d | qnn.QuantLinear):
                weight = layer.quant_weight().value
                arrays[f"{name}.weight"] = weight.numpy()
                assert layer.bias is not None
                arrays[f"{name}.bias"] = layer.bias.numpy()
                count += ceil(weight.numel() * bits / 8) + 4 * len(weight)
        np.savez(folder / f"brevitas_{bits}.npz", **arrays)
        (folder / f"brevitas_{bits}.json").write_text(json.dumps({"bytes": count}))
        print(bits, count, flush=True)


if __name__ == "__main__":
    main()
