"""Rows: one JSON object a number, in <out>/<suite>.jsonl, with everything that says how it came about (DESIGN.md 8).

    identity of a number     suite, experiment, model, arm, lr, seed; measurement, name, at
    place                    among the numbers of its measurement: the first score stands for the others
    value
    how it came about        fingerprint, commit, data, hardware, command, …

A measurement gives several numbers; each of its rows says how many (`of`), so that one that is missing is noticed from
the rows alone. `settings` is a digest of the recipe and of how it was measured; a row of other settings is another one.
`planned` says which rates, seeds and measurements its cell was to have, so that what a cell lacks is noticed, too.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from zoo import weights

Row = dict[str, Any]
GROUP = ("experiment", "model", "arm", "lr", "seed", "measurement")


def read_rows(path: Path) -> list[Row]:
    """Whole lines, in the order of `in_order`, whatever theirs; a process that was killed may have left half of one."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return in_order(rows)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights.replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def group_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in GROUP)


def key_of(row: Row) -> tuple[Any, ...]:
    return (*group_of(row), row["name"], json.dumps(row["at"], sort_keys=True))


def in_order(rows: Iterable[Row]) -> list[Row]:
    """By what they are, not by when they were measured: one that was deleted comes back to where it stood."""
    return sorted(rows, key=lambda row: (*((part is not None, part) for part in group_of(row)), place_of(row)))


def place_of(row: Row) -> int:
    return row.get("place", 0)  # older rows have none, and stay as they stood


def is_complete(rows: Sequence[Row], group: tuple[Any, ...], settings: str) -> bool:
    """Whether all numbers of a measurement are there, measured with these settings."""
    held = [row for row in rows if group_of(row) == group and row["settings"] == settings]
    return bool(held) and len({key_of(row) for row in held}) == held[0]["of"]


def merge(rows: Sequence[Row], fresh: Sequence[Row]) -> list[Row]:
    """Rows that are there stay as they are, but for those of other settings; what is missing takes its place."""
    settings = {group_of(row): row["settings"] for row in fresh}
    kept = [row for row in rows if settings.get(group_of(row), row["settings"]) == row["settings"]]
    there = {key_of(row) for row in kept}
    return in_order([*kept, *(row for row in fresh if key_of(row) not in there)])
