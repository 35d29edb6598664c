"""Rows brought together: of several learning rates the best, of several seeds mean and spread."""

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zoo.evaluate.rows import Row, place_of


@dataclass(frozen=True)
class Spread:
    """Of the seeds' values: mean, sample standard deviation (0 for one seed), least, most, how many."""

    mean: float
    deviation: float
    least: float
    most: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), deviation, min(values), max(values), len(values))


@dataclass
class Line:
    """What one model and arm of a section came to.

    rate    the best learning rate; None where there was only one
    facts   a row of it, for parameters, bytes of state and the like
    values  name -> Spread, at the best rate
    """

    model: str
    arm: str
    rate: float | None
    facts: Row
    values: dict[str, Spread]

    @property
    def label(self) -> str:
        return f"{self.model} {self.arm}".strip()


def higher_is_better(name: str) -> bool:
    return name.startswith("accuracy") or name.endswith(("_accuracy", "per_second"))


def sections(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """By section, in the order of their names: rows come in the order in which cells happened to end."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["section"], []).append(row)
    return dict(sorted(found.items(), key=lambda item: by_number(item[0])))


def by_number(*names: str) -> list[list[tuple[str, int]]]:
    """A key that sorts length-64 before length-128."""
    return [[(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)] for name in names]


def title_of(rows: Sequence[Row]) -> str:
    """Of a section."""
    return next((row["title"] for row in rows if row.get("title")), rows[0]["section"])


def measured(rows: Iterable[Row], measurement: str) -> list[Row]:
    return [row for row in rows if row["measurement"] == measurement and row["value"] is not None]


def members(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """By (model, arm), in the order of these names."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["model"], row["arm"]), []).append(row)
    return dict(sorted(found.items(), key=lambda item: by_number(*item[0])))


def first_name(rows: Sequence[Row]) -> str:
    """Of a measurement's numbers, the one that stands for them all."""
    return min(rows, key=place_of)["name"]


def best_rates(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """(model, arm) -> the learning rate whose seeds have the best mean of the first score; a section's rows."""
    chosen = {}
    for who, own in members(measured(rows, "scores") or measured(rows, "lengths") or rows).items():
        name = first_name(own)
        sign = -1 if higher_is_better(name) else 1
        by_rate: dict[float, list[float]] = {}
        for row in own:
            if row["name"] == name and row["value"] is not None:
                by_rate.setdefault(row["lr"], []).append(sign * row["value"])
        chosen[who] = min(by_rate, key=lambda rate: statistics.fmean(by_rate[rate]))
    return chosen


def lines(rows: Sequence[Row], measurement: str = "scores") -> list[Line]:
    """One a model and arm, from a section's rows."""
    rates = best_rates(rows)
    found = []
    for (model, arm), own in members(measured(rows, measurement)).items():
        best = rates[model, arm]
        several = len({row["lr"] for row in own}) > 1
        own = [row for row in own if row["lr"] == best]
        values: dict[str, list[float]] = {}
        for row in own:
            values.setdefault(row["name"], []).append(row["value"])
        spreads = {name: Spread.of(held) for name, held in values.items()}
        facts = next((row for row in own if "published" in row), own[0])  # the first, unless that one came back later
        found.append(Line(model, arm, best if several else None, facts, spreads))
    return found


def series(rows: Sequence[Row], measurement: str, name: str, axis: str) -> dict[str, list[tuple[int, Spread]]]:
    """label -> [(place on the axis, Spread over seeds)], ascending, at each one's best learning rate."""
    rates = best_rates(rows)
    found: dict[str, list[tuple[int, Spread]]] = {}
    for (model, arm), own in members(measured(rows, measurement)).items():
        places: dict[int, list[float]] = {}
        for row in own:
            if row["name"] == name and axis in row["at"] and row["lr"] == rates[model, arm]:
                places.setdefault(row["at"][axis], []).append(row["value"])
        if places:
            label = f"{model} {arm}".strip()
            found[label] = [(place, Spread.of(values)) for place, values in sorted(places.items())]
    return found
