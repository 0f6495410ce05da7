"""Bytes at equal score from measured points, as tables and a picture; used by peers.py."""

from __future__ import annotations

from itertools import pairwise
from math import exp, log
from typing import Any

from scipy.optimize import isotonic_regression

from main_job import TITLES
from pages import ROOT, insert_table

TITLES = {**TITLES, "charrnn": "character LSTM"}
DROPS = {"charrnn": (0.01, 0.03, 0.1, 0.3)}
POINTS = (0.5, 1.0, 3.0, 10.0)
KLS = (0.01, 0.03, 0.1, 0.3)
LABELS = {
    "ours": "transquant",
    "best": "transquant, effort 9",
    "nncodec": "NNCodec 2.1.3",
    "brevitas": "Brevitas GPTQ (counted)",
    "plain": "nearest rounding, our coder",
}
Row = dict[str, Any]


def curve(rows: list[Row], key: str) -> list[tuple[float, float]]:
    """(bytes, drop) by growing size: the non-increasing curve of least squares through the points (isotonic regression).

    A score on a finite set is noisy. The best of many settings would be a lucky one, and luckier the more there are.
    """
    rows = sorted(rows, key=lambda r: r["bytes"])
    fit = isotonic_regression([r[key] for r in rows], increasing=False).x
    return [(r["bytes"], float(value)) for r, value in zip(rows, fit, strict=True)]


def envelope(rows: list[Row], key: str) -> list[tuple[float, float]]:
    """(bytes, drop) of the points that no smaller file beats, by growing size: luck included."""
    result: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda r: r["bytes"]):
        if not result or row[key] < result[-1][1]:
            result.append((row["bytes"], row[key]))
    return result


def bytes_at(points: list[tuple[float, float]], value: float) -> float | None:
    """Bytes at which a curve reaches a drop, log bytes linear in the drop between points; None outside of them."""
    for (small, worse), (large, better) in pairwise(points):
        if better <= value < worse:
            share = (worse - value) / (worse - better)
            return exp(log(small) + share * (log(large) - log(small)))
    return None


def families(rows: list[Row], name: str, method: str) -> list[list[Row]]:
    """A method's points on a network, apart where it has two ways of quantizing."""
    own = [r for r in rows if (r["network"], r["method"]) == (name, method)]
    parts = [[r for r in own if r["setting"].rpartition(", ")[2] == way] for way in ("dependent", "scalar")]
    return [p for p in (*parts, own if not any(parts) else []) if p]


def comparison(rows: list[Row], key: str) -> list[Row]:
    """For every network and score the bytes of every method and the ratios of ours to NNCodec's; also that of the envelopes."""
    result = []
    for name in dict.fromkeys(r["network"] for r in rows):
        for value in KLS if key == "kl" else DROPS.get(name, POINTS):
            sizes, lucky = (
                {m: min(filter(None, (bytes_at(f(p, key), value) for p in families(rows, name, m))), default=None) for m in LABELS}
                for f in (curve, envelope)
            )
            ratios = {
                ratio: s[own] / s["nncodec"] if s[own] and s["nncodec"] else None
                for ratio, s, own in (("ratio", sizes, "ours"), ("best ratio", sizes, "best"), ("lucky", lucky, "ours"))
            }
            result.append({"network": name, "value": value, **sizes, **ratios})
    return result


def table(rows: list[Row], key: str) -> str:
    """The comparison as Markdown."""
    what = "KL to float, nats" if key == "kl" else "below float"
    heads = ["network", what, *LABELS.values(), "ours / NNCodec", "effort 9 / NNCodec", "ours, best single settings"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in comparison(rows, key):
        unit = "" if key == "kl" else " bits/char" if row["network"] == "charrnn" else " points"
        cells = [f"{row[m]:,.0f}" if row[m] else "–" for m in LABELS]
        cells += [f"**{row[r]:.2f}**" if row[r] else "–" for r in ("ratio", "best ratio")]
        cells += [f"{row['lucky']:.2f}" if row["lucky"] else "–"]
        lines.append(f"| {TITLES[row['network']]} | {row['value']:g}{unit} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def publish(rows: list[Row]) -> None:
    """Tables into docs/peers.md, picture to docs/peers.png."""
    insert_table("docs/peers.md", "peers.py drop", table(rows, "drop"))
    insert_table("docs/peers.md", "peers.py kl", table(rows, "kl"))
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r["network"] for r in rows))
    figure = Figure(figsize=(11, 8), dpi=110, layout="constrained")
    for axes, name in zip(figure.subplots(2, 2).flat, names, strict=False):
        for method, color in zip(LABELS, ("tab:blue", "tab:cyan", "tab:red", "tab:green", "tab:gray"), strict=True):
            for own, line in zip(families(rows, name, method), ("-", ":"), strict=False):
                axes.plot([r["bytes"] / 1000 for r in own], [-r["drop"] for r in own], ".", color=color, alpha=0.4)
                points = curve(own, "drop")
                label = LABELS[method] + (", scalar" if line == ":" else "")
                axes.plot([s / 1000 for s, _ in points], [-d for _, d in points], color=color, linestyle=line, label=label)
        axes.axhline(0, color="black", linewidth=0.8, linestyle="--")
        axes.set_xscale("log")
        axes.set_title(TITLES[name])
        axes.set_xlabel("file, KB")
        axes.set_ylabel("bits/char, float − decoded" if name == "charrnn" else "top-1, points from float")
        axes.set_ylim(*((-0.35, 0.02) if name == "charrnn" else (-13, 1)))
        axes.grid(True, which="both", alpha=0.25)
        axes.legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "peers.png", metadata={"Software": None})
