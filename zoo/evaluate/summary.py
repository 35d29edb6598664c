"""Rows brought together: of several learning rates the best, of several seeds mean and spread."""

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zoo.evaluate.rows import Row, place_of

MARK = "†"  # behind the name of what is not complete


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

    mark    MARK where some of its rates and seeds were not measured
    rate    the best learning rate; None where there was only one
    facts   a row of it, for parameters, bytes of state and the like
    values  name -> Spread, at the best rate
    """

    model: str
    arm: str
    mark: str
    rate: float | None
    facts: Row
    values: dict[str, Spread]


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
    """(model, arm) -> the learning rate whose seeds have the best mean of the first score; a section's rows. One with
    fewer seeds than another, not measured or not finite, does not compete with it."""
    chosen = {}
    for who, own in members(measured(rows, "scores") or measured(rows, "lengths") or rows).items():
        name = first_name(own)
        sign = -1 if higher_is_better(name) else 1
        by_rate: dict[float, list[float]] = {}
        for row in own:
            if row["name"] == name and row["value"] is not None:
                by_rate.setdefault(row["lr"], []).append(sign * row["value"])
        most = max(map(len, by_rate.values()))
        chosen[who] = min(
            (rate for rate in sorted(by_rate) if len(by_rate[rate]) == most),
            key=lambda rate: statistics.fmean(by_rate[rate]),
        )
    return chosen


def incomplete(rows: Iterable[Row]) -> dict[tuple[str, str], str]:
    """(model, arm) -> which of its planned rates and seeds are measured, for those that lack some."""
    found = {}
    for who, own in members(row for row in rows if "planned" in row).items():
        rates, seeds, names = (
            sorted({x for row in own for x in row["planned"][k]}) for k in ("rates", "seeds", "measure")
        )
        held = Counter((row["lr"], row["seed"], row["measurement"]) for row in own)
        whole = {part for row in own if held[part := (row["lr"], row["seed"], row["measurement"])] == row["of"]}
        done = {rate: [seed for seed in seeds if all((rate, seed, name) in whole for name in names)] for rate in rates}
        if any(done[rate] != seeds for rate in rates):
            measured_ones = "; ".join(f"lr {rate:g} seeds {numbers(done[rate])}" for rate in rates if done[rate])
            planned = f"lr {', '.join(f'{rate:g}' for rate in rates)} with seeds {numbers(seeds)} each"
            found[who] = f"measured in full: {measured_ones or 'none'}; planned: {planned}"
    return found


def numbers(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def lines(rows: Sequence[Row], measurement: str = "scores") -> list[Line]:
    """One a model and arm, from a section's rows."""
    rates, marked = best_rates(rows), incomplete(rows)
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
        mark = MARK if (model, arm) in marked else ""
        found.append(Line(model, arm, mark, best if several else None, facts, spreads))
    return found


def series(rows: Sequence[Row], measurement: str, name: str, axis: str) -> dict[str, list[tuple[int, Spread]]]:
    """label -> [(place on the axis, Spread over seeds)], ascending, at each one's best learning rate."""
    rates, marked = best_rates(rows), incomplete(rows)
    found: dict[str, list[tuple[int, Spread]]] = {}
    for (model, arm), own in members(measured(rows, measurement)).items():
        places: dict[int, list[float]] = {}
        for row in own:
            if row["name"] == name and axis in row["at"] and row["lr"] == rates.get((model, arm)):
                places.setdefault(row["at"][axis], []).append(row["value"])
        if places:
            label = f"{model} {arm}".strip() + (f" {MARK}" if (model, arm) in marked else "")
            found[label] = [(place, Spread.of(values)) for place, values in sorted(places.items())]
    return found
