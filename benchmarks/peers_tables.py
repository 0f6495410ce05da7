"""Bytes at equal score from measured points, as tables and a picture; used by peers.py."""

from __future__ import annotations

from itertools import pairwise
from math import exp, log
from typing import Any

from main_job import TITLES
from pages import ROOT, insert_table

TITLES = {**TITLES, "charrnn": "character LSTM"}
DROPS = {"charrnn": (0.01, 0.03, 0.1, 0.3)}
POINTS = (0.5, 1.0, 3.0, 10.0)
KLS = (0.01, 0.03, 0.1, 0.3)
LABELS = {
    "ours": "transquant",
    "nncodec": "NNCodec 2.1.3",
    "brevitas": "Brevitas GPTQ (counted)",
    "plain": "nearest rounding, our coder",
}
Row = dict[str, Any]


def envelope(rows: list[Row], key: str) -> list[tuple[float, float]]:
    """(bytes, drop) of the points that no smaller file beats, by growing size: the drop falls along it."""
    result: list[tuple[float, float]] = []
    for size, value in sorted((r["bytes"], r[key]) for r in rows):
        if not result or value < result[-1][1]:
            result.append((size, value))
    return result


def bytes_at(rows: list[Row], key: str, value: float) -> float | None:
    """Bytes at which the envelope reaches a drop, log bytes linear in the drop between points; None outside of them."""
    points = envelope(rows, key)
    for (small, worse), (large, better) in pairwise(points):
        if better <= value <= worse:
            share = (worse - value) / (worse - better)
            return exp(log(small) + share * (log(large) - log(small)))
    return None


def comparison(rows: list[Row], key: str) -> list[Row]:
    """For every network and score the bytes of every method and the ratio of ours to NNCodec's."""
    result = []
    for name in dict.fromkeys(r["network"] for r in rows):
        for value in KLS if key == "kl" else DROPS.get(name, POINTS):
            sizes = {m: bytes_at([r for r in rows if (r["network"], r["method"]) == (name, m)], key, value) for m in LABELS}
            mine, theirs = sizes["ours"], sizes["nncodec"]
            result.append({"network": name, "value": value, **sizes, "ratio": mine / theirs if mine and theirs else None})
    return result


def table(rows: list[Row], key: str) -> str:
    """The comparison as Markdown."""
    what = "KL to float, nats" if key == "kl" else "below float"
    lines = [f"| network | {what} | {' | '.join(LABELS.values())} | ours / NNCodec |", "|---|---|" + "---|" * (len(LABELS) + 1)]
    for row in comparison(rows, key):
        unit = "" if key == "kl" else " bits/char" if row["network"] == "charrnn" else " points"
        cells = [f"{row[m]:,.0f}" if row[m] else "–" for m in LABELS]
        ratio = f"**{row['ratio']:.2f}**" if row["ratio"] else "–"
        lines.append(f"| {TITLES[row['network']]} | {row['value']:g}{unit} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines) + "\n"


def publish(rows: list[Row]) -> None:
    """Tables into docs/peers.md, picture to docs/peers.png."""
    insert_table("docs/peers.md", "peers.py drop", table(rows, "drop"))
    insert_table("docs/peers.md", "peers.py kl", table(rows, "kl"))
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r["network"] for r in rows))
    figure = Figure(figsize=(11, 8), dpi=110, layout="constrained")
    for axes, name in zip(figure.subplots(2, 2).flat, names, strict=False):
        for method, color in zip(LABELS, ("tab:blue", "tab:red", "tab:green", "tab:gray"), strict=True):
            own = [r for r in rows if (r["network"], r["method"]) == (name, method)]
            if own:
                axes.plot([r["bytes"] / 1000 for r in own], [-r["drop"] for r in own], ".", color=color, alpha=0.4)
                points = envelope(own, "drop")
                axes.plot([s / 1000 for s, _ in points], [-d for _, d in points], color=color, label=LABELS[method])
        axes.axhline(0, color="black", linewidth=0.8, linestyle="--")
        axes.set_xscale("log")
        axes.set_title(TITLES[name])
        axes.set_xlabel("file, KB")
        axes.set_ylabel("bits/char, float − decoded" if name == "charrnn" else "top-1, points from float")
        axes.set_ylim(*((-0.35, 0.02) if name == "charrnn" else (-13, 1)))
        axes.grid(True, which="both", alpha=0.25)
        axes.legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "peers.png", metadata={"Software": None})
