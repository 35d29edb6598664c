"""Forecasts as pictures: history, median or mean, bands, and the truth where it is known."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from torch import Tensor

SHOWN = 3  # times the horizon that is shown of the history


def draw(
    history: np.ndarray,
    point: np.ndarray,
    quantiles: np.ndarray | None,
    levels: Sequence[float],
    *,
    truth: np.ndarray | None = None,
    times: Any = None,
    title: str = "",
) -> Figure:
    """history (T,), point and truth (H,), quantiles (H, Q) at `levels`; times (T + H,) or None for step numbers."""
    past = min(len(history), SHOWN * len(point))
    axis = np.arange(-past, len(point)) if times is None else np.asarray(times)[-past - len(point) :]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(axis[:past], history[-past:], color="0.3", linewidth=1, label="history")
    ahead = axis[past:]
    if truth is not None:
        axes.plot(ahead, truth, color="0.3", linewidth=1, linestyle=":", label="truth")
    middle, name = point, "mean"
    if quantiles is not None:
        for i in range(len(levels) // 2):
            label = f"{levels[i]:g} to {levels[-1 - i]:g}" if i == 0 else None
            axes.fill_between(
                ahead, quantiles[:, i], quantiles[:, -1 - i], color="C0", alpha=0.14, linewidth=0, label=label
            )
        if 0.5 in levels:
            middle, name = quantiles[:, list(levels).index(0.5)], "median"
    axes.plot(ahead, middle, color="C0", linewidth=1.5, label=name)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    axes.set_title(title, fontsize=9)
    axes.margins(x=0.01)
    if times is None:
        axes.set_xlabel("steps from the origin", fontsize=9)
    else:
        axes.xaxis.set_major_locator(locator := AutoDateLocator())
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    return figure


def save(figure: Figure, path: Path) -> None:
    """By the name's ending: png, pdf, svg. Raises ValueError for another."""
    canvas = FigureCanvasAgg(figure)
    accepted = canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in accepted:
        raise ValueError(f"a plot cannot be written as {path.name!r}; accepted endings: {', '.join(sorted(accepted))}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def as_image(figure: Figure) -> Tensor:
    """(3, H, W) float in [0, 1]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
