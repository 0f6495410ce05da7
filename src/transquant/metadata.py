"""What a file tells of its own distortion, in the header's free text. Decoding never needs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import isfinite, log2

ACTIVATIONS = "activations"  # key
_FIRST, _LAST = ord("!"), ord("~")


def write_distortions(metric: str, distortions: Mapping[str, float]) -> dict[str, str]:
    """The metric, the predicted sum, and a character a coded entry for its share, a quarter octave a step below one ("!" is
    all of it, "~" nearly nothing)."""
    total = sum(distortions.values())
    shares = "".join(
        chr(min(_FIRST + round(-4 * log2(max(d, 1e-300) / total)), _LAST)) if total > 0 else "~" for d in distortions.values()
    )
    return {"distortion": f"{metric} {total:.3g}", "shares": shares}


def write_activations(mean_bits: float, predicted: float) -> dict[str, str]:
    """Mean bits a value of inputs that are quantized, and the predicted distortion of that."""
    return {ACTIVATIONS: f"{mean_bits:.4g} {predicted:.3g}"}


def read_activations(metadata: Mapping[str, str]) -> tuple[float, float] | None:
    """(mean bits, predicted distortion), or None."""
    with suppress(ValueError):
        bits, predicted = map(float, metadata.get(ACTIVATIONS, "").split(" "))
        if isfinite(bits) and isfinite(predicted):
            return bits, predicted
    return None


def read_distortions(metadata: Mapping[str, str], names: Sequence[str]) -> tuple[str, float | None, dict[str, float]]:
    """(metric, predicted sum or None, shares by name); another writer may have written something else, or nothing."""
    metric, predicted = "unknown", None
    word, _, number = metadata.get("distortion", "").partition(" ")
    with suppress(ValueError):
        metric, predicted = word or metric, float(number)
    if predicted is not None and not isfinite(predicted):
        predicted = None
    marks = metadata.get("shares", "")
    shares = {n: 2 ** (-(ord(m) - _FIRST) / 4) for n, m in zip(names, marks, strict=False)}
    total = sum(shares.values()) or 1.0  # rounded ones need not add up to one
    return metric, predicted, {n: share / total for n, share in shares.items()}
