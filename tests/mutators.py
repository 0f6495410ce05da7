"""Hostile files from good ones: structured changes of the header and of sections with everything around them repaired, so that
the parser behind the checksums is reached; and raw damage without repair.

Nothing here knows what a header means beyond "tensors" and "sections" being lists: new kinds, keys and versions are mutated
as soon as there is a golden file that has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import numpy as np

from mutate_bytes import SECTION_MUTATORS, TEXT_MUTATORS, raw_damage
from tqfile import Parts, split

Rng = np.random.Generator
Path = tuple[Any, ...]
Mutator = Callable[[Rng, Parts, Sequence[Parts]], Parts]

NUMBERS = [
    0, 1, -1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 63, 64, 65, 255, 256, 400, 401, -400, -401, 1023, 1024, 1025, 2047, 2048, 4095,
    4096, 65535, 65536, 99_999, 100_000, 100_001, 1 << 20, (1 << 20) - 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32,
    (1 << 53) + 1, 1 << 62, (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 31), -(1 << 63), 10**400, -(10**4000),
]  # fmt: skip
OTHERS = [
    0.0, -0.0, 0.5, 1.0, -1.5, 1e-320, 1e308, float("nan"), float("inf"), True, False, None, [], [[]], [0], {}, {"k": "c"},
    "", "0", "x", "1", "NaN", "null", "../../etc/passwd", "/dev/zero", "__class__", "weight.__init__", "\x00", "a\x00b", "\x1b[2J",
    "\x7f", "\x85", "\x9b2J", "\u202e", "\ud800", "\U0001f600" * 128, "x" * 512, "x" * 513, "é" * 257, " ", ".", "..", "a" * 70_000,
]  # fmt: skip
SHAPES = [
    [], [0], [1], [0, 0], [1, 1], [0, 1 << 30], [1 << 30, 0], [(1 << 31) - 1], [1 << 31], [1 << 16, 1 << 16], [1 << 20, 1 << 20],
    [(1 << 31) - 1] * 8, [1] * 8, [1] * 9, [2] * 8, [0] * 8, [1 << 32, 1 << 32], [3, 0, 3, 3], [3, 3, 0, 3], [3, 3, 3, 0], [0, 3, 3, 3],
    [1, 1, 1, 1, 1, 1, 1, 4096], [4096, 1], [1, 4096], [65536], [1 << 19], [-1, -1], [1.0, 1], [True, 2], [None], ["3"], [[3]],
]  # fmt: skip


def mutants(files: Sequence[bytes], seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """`count` hostile files as (what was done, bytes): the same ones for the same files and seed, each by its own number."""
    parts = [split(f) for f in files]
    for number in range(count):
        yield mutant(parts, seed, number)


def mutant(parts: Sequence[Parts], seed: int, number: int) -> tuple[str, bytes]:
    """One hostile file; in turn: changed headers, changed sections, changed header text, raw damage, several of them."""
    rng = np.random.default_rng([seed, number])
    base = parts[int(rng.integers(len(parts)))]
    turn = number % 10
    if turn == 9:
        return raw_damage(rng, base.join(), parts[int(rng.integers(len(parts)))].join())
    table = HEADER_MUTATORS if turn < 5 else SECTION_MUTATORS if turn < 8 else TEXT_MUTATORS
    done = []
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        change = table[int(rng.integers(len(table)))]
        try:
            base = change(rng, base, parts)
        except (IndexError, KeyError, TypeError, ValueError, AttributeError):
            continue  # an earlier change took away what this one needs
        done.append(change.__name__)
    return " + ".join(done), base.join()


def paths_of(value: Any, path: Path = ()) -> Iterator[Path]:
    """Paths of everything in a JSON value but its root."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield (*path, key)
        yield from paths_of(item, (*path, key))


def parent(value: Any, path: Path) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


def pick(rng: Rng, choices: Sequence[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


def _edit(change: Callable[[Rng, dict[str, Any], Sequence[Parts]], None]) -> Mutator:
    """A change of the header's JSON value in place, as a mutator; lengths and checksums stay as the change leaves them."""

    def mutate(rng: Rng, base: Parts, others: Sequence[Parts]) -> Parts:
        value = base.value
        change(rng, value, others)
        return base.with_value(value)

    mutate.__name__ = change.__name__.strip("_")
    return mutate


def _replace(rng: Rng, value: dict[str, Any], others: Sequence[Parts]) -> None:
    """Anything by anything: mostly numbers by numbers and texts by texts, since other types are refused soon."""
    path = pick(rng, list(paths_of(value)))
    place = parent(value, path)
    same = NUMBERS if isinstance(place[path[-1]], int) else [o for o in OTHERS if isinstance(o, str)]
    place[path[-1]] = deepcopy(pick(rng, same if rng.random() < 0.6 else NUMBERS + OTHERS + SHAPES))


def _nudge(rng: Rng, value: dict[str, Any], others: Sequence[Parts]) -> None:
    """A number off by a little, doubled, negated, or of another type."""
    path = pick(rng, [p for p in paths_of(value) if isinstance(parent(value, p)[p[-1]], int | float)])
    place, key = parent(value, path), path[-1]
    old = place[key]
    place[key] = pick(
        rng,
        [
            old + 1,
            old - 1,
            old + int(rng.integers(-9, 10)),
            2 * old,
            -old,
            float(old),
            str(old),
            bool(old),
            [old],
            old << 40 if isinstance(old, int) else old,
        ],
    )


def _shape(rng: Rng, value: dict[str, Any], others: Sequence[Parts]) -> None:
    entry = pick(rng, value["tensors"])
    entry[pick(rng, [k for k, v in entry.items() if isinstance(v, list)])] = deepcopy(pick(rng, SHAPES))


def _reshape(rng: Rng, value: dict[str, Any], others: Sequence[Parts]) -> None:
    """Another shape of the same number of values, which checks of sizes let through."""
    entry = pick(rng, [e for e in value["tensors"] if isinstance(e.get("s"), list)])
    count = int(np.prod(entry["s"], dtype=object)) if entry["s"] else 1
    factor = pick(rng, [d for d in range(1, 65) if count % d == 0])
    entry["s"] = pick(
        rng,
        [
            [count],
            [factor, count // factor],
            [count // factor, 1, factor],
            [count // factor, factor, 1, 1],
            [1, count // factor, 1, factor],
        ],
    )


def _list_items(rng: Rng, value: dict[str, Any], others: Sequence[Parts]) -> None:
    """Items of any list removed, doubled, swapped, reversed, or the list grown."""
    path = pick(rng, [p for p in paths_of(value) if isinstance(parent(value, p)[p[-1]], list)])
    items = parent(value, path)[path[-1]]
    here, there = int(rng.integers(len(items))), int(rng.integers(len(items)))
    kind = int(rng.integers(5))
    if kind == 0:
        del items[here]
    elif kind == 1:
        items.insert(there, deepcopy(items[here]))
    elif kind == 2:
        items[here], items[there] = items[there], items[here]
    elif kind == 3:
        items.reverse()
    else:
        items.extend(deepcopy(items[here]) for _ in range(pick(rng, [1, 8, 64, 2000])))


def _key(rng: Rng, value: dict[str, Any], others: Sequence[Parts]) -> None:
    """A key removed, renamed or added, known ones and unknown ones."""
    place = pick(rng, [value, value, *value["tensors"]])
    keys = list(place)
    known = sorted({k for other in others for e in [other.value, *other.value["tensors"]] for k in e})
    kind = int(rng.integers(3))
    taken = place.pop(pick(rng, keys)) if kind < 2 else deepcopy(pick(rng, NUMBERS + OTHERS + SHAPES))
    if kind > 0:
        place[pick(rng, [*known, *"abcdefghijklmnopqrstuvwxyz", "", "__class__", "features", "\x00"])] = taken


def _texts(rng: Rng, value: dict[str, Any], others: Sequence[Parts]) -> None:
    """A text (kind, dtype, name, alias target, ...) by any other text of any header: duplicates, loops, forward references."""
    texts = sorted(
        {v for header in [o.value for o in others] for p in paths_of(header) if isinstance(v := parent(header, p)[p[-1]], str)}
    )
    path = pick(rng, [p for p in paths_of(value) if isinstance(parent(value, p)[p[-1]], str)])
    own = [e["n"] for e in value["tensors"] if isinstance(e.get("n"), str)]
    parent(value, path)[path[-1]] = pick(rng, texts if rng.random() < 0.5 else [*own, *(n + ".weight" for n in own)])


def _alias(rng: Rng, value: dict[str, Any], others: Sequence[Parts]) -> None:
    """Aliases of any entry, of each other, of themselves, before and after their targets."""
    names = [e["n"] for e in value["tensors"]]
    new = [f"alias {k}" for k in range(int(rng.integers(1, 4)))]
    for name in new:
        target = pick(rng, [*names, *new, *(n + ".bias" for n in names), "absent"])
        value["tensors"].insert(int(rng.integers(len(names) + 1)), {"k": "a", "n": name, "o": target})


def _table(rng: Rng, value: dict[str, Any], others: Sequence[Parts]) -> None:
    """The section table: counts moved, lengths moved so that sections overlap or leave holes, lanes, kinds and checksums wrong."""
    rows = value["sections"]
    one, two = pick(rng, rows), pick(rng, rows)
    column, by = int(rng.integers(1, len(one))), int(rng.integers(-3, 4))
    kind = int(rng.integers(5))
    if kind == 4:
        one[0] = pick(rng, ["s", "m", "t", "p", "r"])
    elif kind == 0:
        one[column] += by
        two[column] -= by
    elif kind == 1:
        one[2] = int(pick(rng, [0, 1, 2, 3, 4, 8, 16, 64, 512, 1024, 2048]))
    elif kind == 2:
        one[column] = pick(rng, NUMBERS)
    else:
        rows.append([one[0], *(int(v) for v in rng.integers(0, 9, len(one) - 1))])


def _entry_from_elsewhere(rng: Rng, value: dict[str, Any], others: Sequence[Parts]) -> None:
    entry = deepcopy(pick(rng, pick(rng, others).value["tensors"]))
    tensors = value["tensors"]
    if rng.random() < 0.5:
        tensors[int(rng.integers(len(tensors)))] = entry
    else:
        tensors.insert(int(rng.integers(len(tensors) + 1)), {**entry, "n": "new"})


def _numbers_of_entries(rng: Rng, value: dict[str, Any], others: Sequence[Parts]) -> None:
    """Steps and step indices at their ends, so that values overflow or vanish."""
    value["step"] = [pick(rng, [2048, 4095]), pick(rng, [-160, -20, 60])]
    for entry in value["tensors"]:
        for key in [k for k in entry if k not in "snkotxz"]:
            if isinstance(entry[key], int) and rng.random() < 0.3:
                entry[key] = pick(rng, [-400, 400, 0, 1])


def _metadata(rng: Rng, value: dict[str, Any], others: Sequence[Parts]) -> None:
    """Free text, which the report reads."""
    texts = [
        "kl nan",
        "kl inf",
        "kl -1",
        "mse 1e999",
        " ",
        "kl",
        "x" * 5000,
        "\U0010ffff" * 20,
        "!" * 100,
        "~" * 100,
        "  " * 9,
        "1_0 1_0",
        "\u0661 \u0661",
    ]
    value["metadata"] = {
        pick(rng, ["distortion", "shares", "", "x" * 512, "é"]): pick(rng, texts) for _ in range(pick(rng, [1, 3, 64]))
    }


HEADER_MUTATORS: list[Mutator] = [
    _edit(change)
    for change in (
        _replace, _replace, _nudge, _nudge, _shape, _reshape, _list_items, _key, _texts, _alias, _table, _entry_from_elsewhere,
        _numbers_of_entries, _metadata,
    )
]  # fmt: skip
