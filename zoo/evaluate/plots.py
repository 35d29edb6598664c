"""The plots of a suite, each from one section's rows. What can be drawn is drawn.

A plot's file carries a digest of what it shows: it is drawn again only when that changed.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.evaluate.rows import Row, group_of
from zoo.evaluate.summary import Line, Spread, first_name, lines, measured, sections, series, title_of

DIGEST = "Rows"  # the name in a PNG's text
SPEEDS = {
    "train_tokens_per_second": "training, tokens/s",
    "prefill_tokens_per_second": "prefill, eager, tokens/s",
    "decode_tokens_per_second": "decoding, tokens/s",
    "state_bytes": "state, bytes a sequence",
}


@dataclass(frozen=True)
class Plot:
    """`draw(figure, rows)` fills an empty figure from the section's rows."""

    file: str
    caption: str
    rows: list[Row]
    draw: Callable[[Any, list[Row]], None]
    size: tuple[float, float] = (8.0, 5.0)

    @property
    def digest(self) -> str:
        shown = [
            [*group_of(row), row["name"], row["at"], row["value"], row.get("state_bytes"), row.get("published")]
            for row in self.rows
        ]
        return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def plan(rows: Sequence[Row]) -> list[Plot]:
    """The plots that a suite's rows allow."""
    plots = []
    for name, own in sections(rows).items():
        stem = f"{own[0]['suite']}.{name}"
        about = title_of(own)
        scores = measured(own, "scores")
        recalled = [row for row in scores if row["name"] == "accuracy" and row.get("state_bytes")]
        if len({row["tokens"] for row in recalled}) > 1:
            plots.append(Plot(f"{stem}.recall.png", f"{about}: recall against length", scores, by_length))
        elif recalled:
            plots.append(Plot(f"{stem}.state.png", f"{about}: recall against bytes of state", scores, pareto))
        for measurement, (axis, what) in AXES.items():
            if part := measured(own, measurement):
                shown = [*scores, *part]
                draw = Over(measurement, axis, first_name(part))
                plots.append(Plot(f"{stem}.{axis}.png", f"{about}: {draw.quantity} against {what}", shown, draw))
        if part := measured(own, "speed"):
            plots.append(Plot(f"{stem}.speed.png", f"{about}: rates against length", part, speeds, (12.0, 8.0)))
    return plots


def draw(plot: Plot, folder: Path) -> Path:
    """Write the file, unless it shows these very rows already."""
    path = folder / plot.file
    if drawn_digest(path) == plot.digest:
        return path
    from matplotlib.figure import Figure  # no pyplot: no window, no global state

    figure = Figure(figsize=plot.size, layout="constrained")
    plot.draw(figure, plot.rows)
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    figure.savefig(part, dpi=110, format="png", metadata={DIGEST: plot.digest, "Software": ""})
    part.replace(path)
    return path


def drawn_digest(path: Path) -> str | None:
    """Of the rows that a file shows."""
    from PIL import Image

    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get(DIGEST)


# ---------------------------------------------------------------------------------------------------------------------


def colours(labels: Sequence[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    palette = colormaps["tab10" if len(labels) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    return {label: palette[i % len(palette)] for i, label in enumerate(sorted(labels))}


MARKERS = "os^DvP*<>hp"


def pareto(figure: Any, rows: list[Row]) -> None:
    """Recall against bytes of state: a line through the arms of each model, a marker for each arm, bars from the worst
    to the best seed."""
    axes = figure.subplots()
    found = [line for line in lines(rows) if "accuracy" in line.values and line.facts.get("state_bytes")]
    by_model: dict[str, list[Line]] = {}
    for line in found:
        by_model.setdefault(line.model, []).append(line)
    tint = colours(list(by_model))
    arms = list(dict.fromkeys(line.arm for line in sorted(found, key=lambda line: line.facts["state_bytes"])))
    shapes = dict(zip(arms, itertools.cycle(MARKERS), strict=False))
    for model, own in by_model.items():
        own.sort(key=lambda line: line.facts["state_bytes"])
        at = [line.facts["state_bytes"] for line in own]
        values = [line.values["accuracy"] for line in own]
        bars = [[v.mean - v.least for v in values], [v.most - v.mean for v in values]]
        axes.errorbar(at, [v.mean for v in values], bars, capsize=3, label=model, color=tint[model])
        for line, x, value in zip(own, at, values, strict=True):
            axes.plot(x, value.mean, shapes[line.arm], color=tint[model])
        published = [(line.facts["state_bytes"], line.facts["published"]) for line in own if "published" in line.facts]
        if published:
            label = f"{model}, published"
            axes.plot(*zip(*published, strict=True), "x", label=label, color=tint[model], markersize=9)
    for arm in filter(None, arms):
        axes.plot([], [], shapes[arm], color="0.4", label=arm)
    finish(axes, "bytes of state, all layers", "accuracy", logarithmic=True)


def by_length(figure: Any, rows: list[Row]) -> None:
    """Recall of models that were each trained at one length, against it."""
    axes = figure.subplots()
    points: dict[str, list[tuple[int, Spread]]] = {}
    for line in lines(rows):
        points.setdefault(line.model, []).append((line.facts["tokens"], line.values["accuracy"]))
    over(axes, {model: sorted(own, key=lambda point: point[0]) for model, own in points.items()})
    finish(axes, "length, tokens", "accuracy", logarithmic=True)


@dataclass(frozen=True)
class Over:
    """Lines of one measurement over one axis, a band from the worst to the best seed."""

    measurement: str
    axis: str
    name: str

    @property
    def quantity(self) -> str:
        return self.name.removeprefix("valid/").replace("_", " ")

    def __call__(self, figure: Any, rows: list[Row]) -> None:
        axes = figure.subplots()
        over(axes, series(rows, self.measurement, self.name, self.axis))
        finish(axes, AXES[self.measurement][1], self.quantity, logarithmic=self.axis != "tokens")


AXES = {
    "curve": ("tokens", "tokens trained on"),
    "positions": ("position", "place in the row"),
    "lengths": ("length", "length, tokens"),
}


def speeds(figure: Any, rows: list[Row]) -> None:
    for axes, (name, label) in zip(figure.subplots(2, 2).flat, SPEEDS.items(), strict=True):
        over(axes, series(rows, "speed", name, "length"))
        axes.set_yscale("log")
        finish(axes, "length, tokens", label, logarithmic=True)


def over(axes: Any, found: dict[str, list[tuple[int, Spread]]]) -> None:
    tint = colours(list(found))
    for label, points in found.items():
        at, values = [place for place, _ in points], [value for _, value in points]
        axes.plot(at, [v.mean for v in values], marker=".", label=label, color=tint[label])
        if any(v.seeds > 1 for v in values):
            least, most = [v.least for v in values], [v.most for v in values]
            axes.fill_between(at, least, most, color=tint[label], alpha=0.1, linewidth=0)


def finish(axes: Any, x: str, y: str, *, logarithmic: bool) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    from matplotlib.ticker import EngFormatter, NullFormatter

    if x == AXES["positions"][1]:  # begins at 0, then doubles from 16 on
        axes.set_xscale("symlog", base=2, linthresh=16, linscale=1)
    elif logarithmic:
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if axes.get_xscale() == "linear" else in_powers_of_two)
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_minor_formatter(EngFormatter(sep=""))
        axes.tick_params(axis="y", which="minor", labelsize="x-small")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")


def in_powers_of_two(value: float, _: int) -> str:
    """65536 -> 64Ki, as ticks at powers of two read best."""
    units = ["", "Ki", "Mi", "Gi"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        del units[0]
    return f"{value:.4g}{units[0]}"
