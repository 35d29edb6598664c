"""How intervals of a model held on windows of series, and the factors that follow it, by window (conformal.py)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tasks.series.conformal import extended, follow, scores
from tasks.series.data import Part
from tasks.series.rolling import Forecast
from tasks.series.windows import EvaluationWindows, Layout
from zoo.model import Batch, Model

ROWS = 1024  # that a forecast of many series rolls at once
Roll = Callable[[Model, Batch, int], Forecast]  # of a batch, over so many steps


@torch.no_grad()
def scored(model: Model, windows: EvaluationWindows, chosen: Tensor, roll: Roll) -> Tensor | None:
    """Scores (N, C, H, P) of the N chosen windows with all their channels; None from a model of points."""
    device, channels = next(model.parameters()).device, len(windows.parts[0].panel.names)
    found = []
    for some in chosen.split(max(1, ROWS // (1 if windows.layout.mixed else channels))):
        batch = windows.collate(some).to(device)
        forecast = roll(model, batch, windows.horizon)
        if forecast.quantiles is None:
            return None
        own = scores(batch.targets.float(), forecast.quantiles.float(), forecast.levels)
        found.append(own.reshape(len(some), channels, *own.shape[2:]))
    return torch.cat(found)


def followed(
    model: Model,
    parts: Sequence[Part],
    factors: Tensor,
    horizon: int,
    *,
    layout: Layout,
    roll: Roll,
    levels: Sequence[float],
    rate: float,
) -> list[Tensor]:
    """Of each part the factors (N, horizon, P), on the CPU, of forecasts from the beginning of each of its patches, and
    the last ones of those from its end, where a patch ends there. At the beginning they are `factors` (H', P)."""
    nothing = [np.zeros(len(part.panel.names)) for part in parts]
    windows = EvaluationWindows(parts, nothing, layout, sorted({layout.patch, horizon}), layout.patch)
    found = scored(model, windows, torch.arange(len(windows)), roll) if len(windows) else None
    if found is None:
        return [extended(factors, horizon).unsqueeze(0) for _ in parts]
    found = found[:, :, :horizon].cpu()
    each = [found[windows.which == number] for number in range(len(parts))]
    return [follow(factors, own, levels, layout.patch, rate) for own in each]
