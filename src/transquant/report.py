"""A report as text and as JSON-ready values; no torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transquant.records import Report


def format_report(report: Report) -> str:
    """Bytes on disk first, then where every byte went, then a line a layer."""
    lines = [
        f"{report.file_bytes:,} bytes on disk: {report.compression_ratio:.1f} x smaller than {report.original_bytes:,}, "
        f"{report.bits_per_parameter:.3f} bits a parameter",
        "",
    ]
    parts = (
        ("weights", report.payload_bytes, "entropy-coded symbols"),
        ("side parameters", report.side_parameter_bytes, "BatchNorm, biases, exact tensors"),
        ("side information", report.side_info_bytes, "step exponents, coder states"),
        ("header", report.header_bytes, "names, shapes, steps"),
    )
    for name, size, what in parts:
        lines.append(f"  {name:<17}{size:>12,}  {100 * size / report.file_bytes:5.1f} %  {what}")
    lines += ["", _distortion_line(report), ""]
    width = max([len(r.name) for r in report.layers] + [5])
    lines.append(
        f"  {'layer':<{width}}  {'shape':<18} {'transform':<9} {'values':>10} {'bits/value':>10} {'step':>9} {'distortion':>10}"
    )
    for r in report.layers:
        per_value = (r.payload_bits + r.side_bits) / max(r.num_values, 1)
        step = f"{r.step:9.3g}" if r.step is not None else f"{'':>9}"
        share = f"{100 * r.distortion_share:8.2f} %" if r.distortion_share is not None else f"{'':>10}"
        shape = "x".join(map(str, r.shape)) or "scalar"
        lines.append(f"  {r.name:<{width}}  {shape:<18} {r.transform:<9} {r.num_values:>10,} {per_value:>10.3f} {step} {share}")
    if report.raw:
        lines += ["", "  stored exactly:"] + [f"    {name}  ({reason})" for name, reason in report.raw]
    return "\n".join(lines)


def report_dict(report: Report) -> dict[str, Any]:
    """All numbers of a report, JSON-ready, with the two ratios."""
    value = asdict(report)
    value["settings"] = {k: v if isinstance(v, int | float | str | dict) else str(v) for k, v in report.settings.items()}
    return {"bits_per_parameter": report.bits_per_parameter, "compression_ratio": report.compression_ratio, **value}


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
