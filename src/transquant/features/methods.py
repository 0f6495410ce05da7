"""The ways of coding feature maps that can be asked for by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transquant.features.dct_masks import DctMaskOptions, fit_dct_masks
from transquant.features.fitting import fit_predictive, with_shared_tables
from transquant.features.pca import PcaOptions, fit_pca
from transquant.features.records import Fit, FloatMap, MapCoder, Point, Sensitivity


@dataclass(frozen=True, slots=True)
class Method:
    """`fit` gives for a point what `coder` has a coder of, and `finish` the coders of all points together. `start`: the c that a
    search begins with; None: the one that a distortion of 0.05 asks for."""

    fit: Callable[[FloatMap, Point, Sensitivity, float], Any]
    coder: Callable[[Any], MapCoder] = lambda fitted: fitted
    finish: Callable[[list[Any]], Sequence[MapCoder]] = lambda fitted: fitted
    start: float | None = None


def _published(fit: Fit, start: float) -> Method:
    return Method(fit, start=start)


METHODS = {
    "auto": Method(fit_predictive, lambda fitted: fitted.coder, with_shared_tables),
    "pca": _published(fit_pca(PcaOptions()), 2.0**-4),
    "pca-quantized": _published(fit_pca(PcaOptions("pca-q")), 2.0**-4),
    "pca-truncated": _published(fit_pca(PcaOptions("pca-t")), 2.0**-4),
    "none": _published(fit_pca(PcaOptions("none")), 2.0**-4),
    "dct-cm-huffman": _published(fit_dct_masks(DctMaskOptions(values="huffman")), 8.0),
    **{f"dct-cm-{n}" if n != 8 else "dct-cm": _published(fit_dct_masks(DctMaskOptions(n)), 4.0) for n in (4, 8, 16, 32)},
}
