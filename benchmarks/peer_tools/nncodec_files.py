"""Runs in NNCodec's own environment: one network at many settings.

    python nncodec_files.py weights.npz folder '[[-38, true], …]'      pairs of qp and dependent quantization

Writes folder/<qp>_<dq>.nnc, the file, and folder/<qp>_<dq>.npz, what it decodes to.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np

sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))  # CPU torch

from nncodec import nnc  # noqa: E402


def main() -> None:
    weights = dict(np.load(sys.argv[1]))
    folder = Path(sys.argv[2])
    for qp, dependent in json.loads(sys.argv[3]):
        stem = folder / f"{qp}_{int(dependent)}"
        data = nnc.compress(
            {k: v.copy() for k, v in weights.items()}, bitstream_path=None, return_bitstream=True, qp=qp, use_dq=dependent,
            nonweight_qp=-40, row_skipping=True, param_opt=True, verbose=False,
        )  # fmt: skip
        stem.with_suffix(".nnc").write_bytes(bytes(data))
        decoded = nnc.decompress(str(stem.with_suffix(".nnc")))
        np.savez(stem.with_suffix(".npz"), **{k: np.asarray(v) for k, v in decoded.items()})
        print(stem.name, len(data), flush=True)


if __name__ == "__main__":
    main()
