"""The report of a compression: as a record, as text, as JSON-ready values; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One row of the report. Bits are those of the file, `side_bits` with `basis_bits`. `distortion_share`: the layer's part
    of the predicted sum. `transform_gain`: bits a value that the transform was found to save, its basis included (None where
    nothing was compared). `activation_bits`: of a value of the layer's input, where that is quantized."""

    name: str
    shape: tuple[int, ...]
    kind: str
    transform: str
    num_values: int
    payload_bits: float
    side_bits: float
    step: float | None
    distortion_share: float | None
    basis_bits: float = 0.0
    transform_gain: float | None = None
    activation_bits: int | None = None


@dataclass(frozen=True, slots=True)
class VerifiedPoint:
    """One group of one layer at one rate: input channels `first` to `last`, bits a value of the layer there, and the
    distortion of the group's error alone, predicted and measured, in units of the metric."""

    layer: str
    first: int
    last: int
    bits_per_value: float
    predicted: float
    measured: float


@dataclass(frozen=True, slots=True)
class Report:
    """What compress did; `str(report)` is the table, `as_dict()` the JSON. `activations`: mean bits a value of the inputs that are
    quantized, and the predicted distortion of that alone, in units of the metric; None where none are.
    `kept_channels`: of layers that had lost some, how many they kept, and how many they had; None where none had."""

    file_bytes: int
    payload_bytes: int
    side_parameter_bytes: int
    side_info_bytes: int
    header_bytes: int
    original_bytes: int
    num_parameters: int
    metric: str
    predicted_distortion: float | None
    measured_distortion: float | None
    layers: tuple[LayerReport, ...]
    raw: tuple[tuple[str, str], ...]
    settings: Mapping[str, Any]
    verification: tuple[VerifiedPoint, ...] = ()
    activations: tuple[float, float] | None = None
    kept_channels: tuple[int, int] | None = None

    @property
    def basis_bytes(self) -> int:
        """Bytes of the side information that are bases of transforms."""
        return round(sum(r.basis_bits for r in self.layers) / 8)

    @property
    def bits_per_parameter(self) -> float:
        """8 · file bytes / parameters."""
        return 8 * self.file_bytes / max(self.num_parameters, 1)

    @property
    def compression_ratio(self) -> float:
        """Original bytes / file bytes."""
        return self.original_bytes / self.file_bytes

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        value = asdict(self)
        value["settings"] = {k: v if isinstance(v, int | float | str | dict) else str(v) for k, v in self.settings.items()}
        return {
            "basis_bytes": self.basis_bytes,
            "bits_per_parameter": self.bits_per_parameter,
            "compression_ratio": self.compression_ratio,
            **value,
        }

    def __str__(self) -> str:
        return _text(self)


def _text(report: Report) -> str:
    """Bytes on disk first, then where every byte went, then a line a layer."""
    lines = [
        f"{report.file_bytes:,} bytes on disk: {report.compression_ratio:.1f} x smaller than {report.original_bytes:,}, "
        f"{report.bits_per_parameter:.3f} bits a parameter",
        "",
    ]
    parts = [
        ("weights", report.payload_bytes, "entropy-coded symbols"),
        ("side parameters", report.side_parameter_bytes, "BatchNorm, biases, exact tensors"),
        ("side information", report.side_info_bytes, "bases, step exponents, coder states, tables"),
        ("header", report.header_bytes, "names, shapes, steps"),
    ]
    if report.basis_bytes:
        parts.insert(3, ("  bases", report.basis_bytes, "of that, for transforms"))
    for name, size, what in parts:
        lines.append(f"  {name:<17}{size:>12,}  {100 * size / report.file_bytes:5.1f} %  {what}")
    if report.kept_channels is not None:
        kept, had = report.kept_channels
        lines += ["", f"  {kept:,} of {had:,} channels were kept where some were removed; bits count the parameters that are left"]
    lines += ["", _distortion_line(report), ""]
    inputs = any(r.activation_bits is not None for r in report.layers)
    if report.activations is not None:
        bits, predicted = report.activations
        lines[-1:] = [f"  inputs of layers: {bits:.4g} bits a value on average, which adds {predicted:.3g} (predicted)", ""]
    width = max([len(r.name) for r in report.layers] + [5])
    titles = f"{'transform':<14} {'gain':>6} {'values':>10} {'bits/value':>10} {'step':>9} {'distortion':>10}"
    titles += "  input bits" if inputs else ""
    lines.append(f"  {'layer':<{width}}  {'shape':<18} {titles}")
    for r in report.layers:
        per_value = (r.payload_bits + r.side_bits) / max(r.num_values, 1)
        step = f"{r.step:9.3g}" if r.step is not None else f"{'':>9}"
        share = f"{100 * r.distortion_share:8.2f} %" if r.distortion_share is not None else f"{'':>10}"
        shape = "x".join(map(str, r.shape)) or "scalar"
        gain = "" if r.transform_gain is None or r.transform == "identity" else f"{r.transform_gain:.3f}"
        what = f"{shape:<18} {r.transform:<14} {gain:>6} {r.num_values:>10,} {per_value:>10.3f} {step} {share}"
        if inputs:
            what += f"{'' if r.activation_bits is None else r.activation_bits:>12}"
        lines.append(f"  {r.name:<{width}}  {what}")
    if any(r.transform != "identity" and r.transform_gain is not None for r in report.layers):
        lines += ["", "  gain: bits a value that the transform saves at equal predicted distortion, its basis included"]
    if report.verification:
        lines += ["", f"  {summary(report.verification)}"]
    if report.settings.get("in_order"):
        lines += ["", "  layers were quantized in execution order, each making up for the errors of those before"]
    if report.settings.get("progressive"):
        lines += ["", "  rows were fixed group by group, while the others and the biases learned the float network's outputs"]
    if report.settings.get("distilled"):
        lines += ["", "  biases and BatchNorms have learned the float network's outputs on the calibration samples"]
    if "work" in report.settings:
        taken, computed = (report.settings["work"][key] for key in ("layers_taken", "layers_computed"))
        lines += ["", f"  {taken:,} of {taken + computed:,} codings of a layer were taken from the work folder"]
    if report.raw:
        lines += ["", "  stored exactly:"] + [f"    {name}  ({reason})" for name, reason in report.raw]
    return "\n".join(lines)


def _distortion_line(report: Report) -> str:
    unit = {
        "kl": "nats of KL divergence a prediction",
        "mse": "mean squared error an output value",
        "weights": "relative squared error of the weights",
    }.get(report.metric, report.metric)
    parts = []
    if report.predicted_distortion is not None:
        parts.append(f"{report.predicted_distortion:.4g} predicted")
    if report.measured_distortion is not None:
        parts.append(f"{report.measured_distortion:.4g} measured on held-back calibration samples")
    return f"  output distortion ({report.metric}: {unit}): {', '.join(parts) or 'not known'}"


def summary(points: tuple[VerifiedPoint, ...]) -> str:
    """One line: how far the closed form is off."""
    ratios = sorted(p.measured / p.predicted for p in points if p.predicted > 0 and p.measured > 0)
    if not ratios:
        return "no group could be checked"
    low, middle, high = (ratios[round(q * (len(ratios) - 1))] for q in (0.1, 0.5, 0.9))
    total = sum(p.measured for p in points) / max(sum(p.predicted for p in points), 1e-300)
    return (
        f"closed form checked on {len(points)} groups: measured / predicted {total:.2f} in sum, median {middle:.2f}, "
        f"80 % between {low:.2f} and {high:.2f}"
    )
