"""Encoding and decoding speed of NNCodec, run in its own environment: speed.py's other side.

    nncodec_speed.py SIDE

A matrix SIDE x SIDE of Laplace weights in float32, one thread, at several qp, with and without dependent quantization; decoding
is that of the fastest of three runs. Prints a JSON list of rows."""

from __future__ import annotations

import json
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch

QPS = (-8, -14, -18, -26)


def main() -> None:
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    from nncodec import nnc

    side = int(sys.argv[1])
    torch.set_num_threads(1)
    weight = (np.random.default_rng(0).laplace(0, 0.05, (side, side))).astype(np.float32)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weight.nnc"
        for qp in QPS:
            for dependent in (False, True):
                start = time.perf_counter()
                data = nnc.compress(
                    {"layer.weight": weight.copy()}, bitstream_path=None, return_bitstream=True, qp=qp, use_dq=dependent,
                    nonweight_qp=-40, row_skipping=True, param_opt=True, verbose=False,
                )  # fmt: skip
                encode = time.perf_counter() - start
                path.write_bytes(bytes(data))
                decode = []
                for _ in range(3):
                    start = time.perf_counter()
                    nnc.decompress(str(path))
                    decode.append(time.perf_counter() - start)
                rows.append({
                    "qp": qp, "dependent": dependent, "bits": 8 * len(data) / weight.size, "encode": weight.size / encode / 1e6,
                    "decode": weight.size / min(decode) / 1e6,
                })  # fmt: skip
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
