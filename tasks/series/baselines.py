"""What every forecast is set beside: the last value, the last season again, and one linear layer.

The linear layer is DLinear's and NLinear's (Zeng et al., arXiv 2205.13504): all values of the look-back to all of the
horizon, shared by the channels, on the differences to the last value. Trend and remainder of DLinear are linear in the
look-back, so one matrix holds both. It is solved, as ridge regression, and not trained by gradients.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tasks.series.data import Part
from tasks.series.metrics import Errors
from tasks.series.rolling import Forecast
from tasks.series.windows import EvaluationWindows, Layout, TrainingWindows, prompt

Baseline = Callable[[Tensor], Tensor]  # histories (R, C, context), filled, to forecasts (R, C, horizon)
MOST = 20_000  # windows that the linear layer is fitted on, evenly over all
RIDGE = 0.1  # of the mean variance of an input
AT_ONCE = 256  # windows


def filled(history: Tensor) -> Tensor:
    """NaN replaced by the value before it, else by the first there is, else by 0."""
    there = ~history.isnan()
    place = torch.where(there, torch.arange(history.shape[-1]), -1).cummax(-1).values
    first = there.int().argmax(-1, keepdim=True)
    return history.gather(-1, torch.where(place < 0, first, place)).nan_to_num(0.0)


def last_value(horizon: int) -> Baseline:
    return lambda history: history[..., -1:].expand(*history.shape[:-1], horizon)


def seasonal_naive(horizon: int, season: int) -> Baseline:
    def forecast(history: Tensor) -> Tensor:
        again = history[..., -min(season, history.shape[-1]) :]
        return again[..., torch.arange(horizon) % again.shape[-1]]

    return forecast


def linear(parts: Sequence[Part], context: int, horizon: int, *, scaled: bool) -> Baseline | None:
    """Fitted to the training parts; None where these are too short. scaled: values are comparable between rows, or
    each is divided by the deviation of its look-back."""
    windows = TrainingWindows(parts, Layout(1, horizon, context, 0, mixed=False))
    count = min(MOST, len(windows))
    if count < 2 or min(part.end - part.begin for part in parts) < horizon + 2:
        return None
    chosen = np.linspace(0, len(windows) - 1, count).astype(int)
    gram = torch.zeros(context + 1, context + 1, dtype=torch.float64)
    cross = torch.zeros(context + 1, horizon, dtype=torch.float64)
    for some in np.array_split(chosen, -(-count // 2048)):
        rows = windows.rows(some)[0][:, 0]
        rows = rows[~rows[:, context:].isnan().any(1)]
        x, level, scale = _relative(filled(rows[:, :context]), scaled)
        y = (rows[:, context:] - level) / scale
        gram += (x.T @ x).double()
        cross += (x.T @ y).double()
    ridge = RIDGE * gram.diagonal()[:-1].mean().clamp(min=1e-9)
    weight = torch.linalg.solve(gram + ridge * torch.eye(context + 1), cross).float()

    def forecast(history: Tensor) -> Tensor:
        x, level, scale = _relative(history.flatten(0, 1), scaled)
        return ((x @ weight) * scale + level).unflatten(0, history.shape[:2])

    return forecast


def _relative(history: Tensor, scaled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """history (N, context) -> differences to the last value with a column of ones, that value, and the scale."""
    level = history[:, -1:]
    scale = torch.ones_like(level) if scaled else history.std(1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    return torch.cat(((history - level) / scale, torch.ones_like(level)), dim=1), level, scale


def errors_of(
    forecasts: dict[str, Baseline], windows: EvaluationWindows, horizons: Sequence[int], levels: Sequence[float]
) -> dict[str, float]:
    """`<baseline>/<metric>` over all windows. All quantiles of a baseline are its one value."""
    variables = windows.parts[0].panel.values.shape[1]
    apart = replace(windows.layout, mixed=False)
    found = {name: Errors(horizons, levels, variables) for name in forecasts}
    for places in torch.arange(len(windows)).split(AT_ONCE):
        history, future, known = windows.raw(places)
        batch = prompt(
            history, future, known[:, :0], windows.fits[places], windows.errors[windows.which[places]], apart
        )
        past = filled(history.flatten(0, 1).unsqueeze(1))
        for name, forecast in forecasts.items():
            found[name].add(batch, Forecast(forecast(past), None, list(levels)), degenerate=True)
    wanted = ("mse", "mae", "mase", "wql")
    return {
        f"{name}/{key}": value
        for name, errors in found.items()
        for key, value in errors.compute().items()
        if key.split("_")[0] in wanted
    }
