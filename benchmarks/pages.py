"""Puts a benchmark's table into a page, between its two markers."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
END = "<!-- end of table -->\n"


def insert_table(page: str, script: str, table: str) -> None:
    """Replace what stands between the script's marker and the next end marker of a page, a path from the repository's root."""
    begin = f"<!-- table: benchmarks/{script} -->\n"
    path = ROOT / page
    before, marker, rest = path.read_text().partition(begin)
    if not marker:
        raise SystemExit(f"{page} has no marker {begin.strip()}")
    path.write_text(before + begin + table + END + rest.partition(END)[2])
