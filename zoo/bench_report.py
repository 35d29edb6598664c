"""What the rounds of `zoo bench kernels` measured, summed up: a table, a CSV file, a picture."""

import csv
import re
import statistics
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from zoo.peers import OTHERS, SHAPES, Shape

SIZES = {
    **{"batch": "B", "heads": "H", "kv_heads": "G", "tokens": "T", "slots": "S", "head_dim": "D", "window": "W"},
    **{"document": "documents of "},
}


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median and spread over rounds for everything that was measured in each."""
    measured = {"ms", "host_ms", "tflops_exact", "tflops_tiles", "tb_per_s", "round"}
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple((k, v) for k, v in row.items() if k not in measured), []).append(row)
    summary = []
    for key, group in groups.items():
        entry: dict[str, Any] = dict(key)
        for name in sorted(measured - {"round"}):
            values = [row[name] for row in group if row.get(name) is not None]
            if values:
                entry[name] = statistics.median(values)
                entry[f"{name}_spread"] = (max(values) - min(values)) / statistics.median(values)
        summary.append(entry)
    return summary


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each thing measured: medians over rounds of the peers that did it, and how many times the first one's
    time they took, with the least and the most of any round."""
    lines = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16; ms ±half the spread (x: times the first "
        "peer's of the round), TFLOP/s on exact pairs (on tiles), host ms of a call, ns of a token and head"
    ]
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        place = " ".join(f"{letter}{row[field]}" for field, letter in SIZES.items() if row.get(field))
        groups.setdefault(f"{row['what']} {place}", {}).setdefault(row["peer"], []).append(row)
    for name, by_peer in groups.items():
        ours = next(iter(by_peer.values()))
        lines.append(f"{name}: " + "; ".join(figures(peer, of, ours) for peer, of in by_peer.items()))
    return "\n".join(lines)


def figures(peer: str, rows: list[dict[str, Any]], first: list[dict[str, Any]]) -> str:
    (entry,) = summarise(rows)
    text = f"{peer} {entry['ms']:.4f} ±{50 * entry['ms_spread']:.0f}%"
    if rows is not first:
        base = {row["round"]: row["ms"] for row in first}
        ratios = sorted(row["ms"] / base[row["round"]] for row in rows if row["round"] in base)
        if ratios:
            text += f" {statistics.median(ratios):.2f}x ({ratios[0]:.2f}-{ratios[-1]:.2f})"
    elif "tflops_exact" in entry:
        per_token = 1e6 * entry["ms"] / (entry["batch"] * entry["heads"] * entry["tokens"])
        text += f" {entry['tflops_exact']:.0f} ({entry.get('tflops_tiles') or 0:.0f})"
        text += f" host {entry['host_ms']:.2f}, {per_token:.3f} ns"
    return text + (f" {entry['tb_per_s']:.2f} TB/s" if "tb_per_s" in entry else "")


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def plot(summary: list[dict[str, Any]], path: Path) -> None:
    """Forward above, backward below. Left, TFLOP/s on exact pairs, a group of bars for each shape and a bar for each
    peer; in the middle the same over the window, of shapes that differ in nothing else; right, nanoseconds of a token
    and head over T, of the first peer's rows of as many tokens in all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(18, 8), layout="constrained")
    panels = figure.subplots(2, 3, width_ratios=(3, 1.3, 1.3))
    for (bars, windows, lengths), what in zip(panels, ("forward", "backward"), strict=True):
        rows = [row for row in summary if row["what"] == what]
        draw_shapes(bars, rows)
        draw_windows(windows, [row for row in rows if not row.get("kv_heads") and not row.get("document")])
        draw_lengths(lengths, [row for row in rows if row["peer"] == rows[0]["peer"]])
        bars.set_ylabel(f"{what}, TFLOP/s on exact pairs")
        windows.set_ylabel("TFLOP/s on exact pairs")
        lengths.set_ylabel("ns a token and head")
        for axes in (bars, windows, lengths):
            axes.grid(axis="y", alpha=0.3)
            axes.set_axisbelow(True)
            if axes.has_data():
                axes.legend(fontsize="small")
            else:
                axes.set_axis_off()
    figure.savefig(path, dpi=120)


def draw_shapes(axes: Any, rows: list[dict[str, Any]]) -> None:
    """SHAPES and OTHERS, or what else was asked for."""
    known: dict[Shape, dict[str, float]] = {}
    for row in rows:
        known.setdefault(shape_of(row), {})[row["peer"]] = row["tflops_exact"]
    shapes = [shape for shape in known if shape in (*SHAPES, *OTHERS)] or list(known)
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    for place, peer in enumerate(peers):
        at = [i for i, shape in enumerate(shapes) if peer in known[shape]]
        left = [i + (place - (len(peers) - 1) / 2) * 0.8 / len(peers) for i in at]
        axes.bar(left, [known[shapes[i]][peer] for i in at], 0.8 / len(peers), label=peer)
    labels = [re.sub(r" (T|D|G|documents)", r"\n\1", str(shape)).replace("documents of", "docs") for shape in shapes]
    axes.set_xticks(range(len(shapes)), labels, fontsize=7)


def draw_windows(axes: Any, rows: list[dict[str, Any]]) -> None:
    alike = ("batch", "heads", "tokens", "head_dim")
    lines: dict[tuple, dict[str, dict[int, float]]] = {}
    for row in rows:
        of = lines.setdefault(tuple(row[name] for name in alike), {})
        of.setdefault(row["peer"], {})[row["window"]] = row["tflops_exact"]
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    several = {key: of for key, of in lines.items() if max(len(values) for values in of.values()) > 2}
    for style, ((_, _, tokens, dim), of) in zip(("-", "--", ":", "-.") * len(several), several.items(), strict=False):
        for peer, values in of.items():
            color = f"C{peers.index(peer)}"
            axes.plot(
                *zip(*sorted(values.items()), strict=True), style, color=color, marker=".", label=f"{peer} D {dim}"
            )
        axes.set_xscale("log", base=2)
        axes.set_xlabel(f"window, at T {tokens}")


def draw_lengths(axes: Any, rows: list[dict[str, Any]]) -> None:
    lines: dict[tuple, dict[int, float]] = {}
    for row in rows:
        total = row["batch"] * row["heads"] * row["tokens"]
        if not row.get("document"):
            key = (total, row["heads"], row["head_dim"], row["window"])
            lines.setdefault(key, {})[row["tokens"]] = 1e6 * row["ms"] / total
    most = max(map(len, lines.values()), default=0)
    for (total, _, dim, window), values in lines.items():
        if 2 < len(values) == most:
            axes.plot(*zip(*sorted(values.items()), strict=True), marker="o", label=f"D {dim} W {window}")
            axes.set_xlabel(f"T, of {total >> 20} M tokens and heads in all")
            axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)


def shape_of(row: dict[str, Any]) -> Shape:
    return Shape(**{field.name: row.get(field.name, field.default) for field in fields(Shape)})
