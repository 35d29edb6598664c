"""Errors of forecasts by horizon, as sums over values and windows: independent of batches and ranks.

Of the values y of all windows in which a horizon fits, with the point forecast m and quantiles q_a at levels a:

    MSE, MAE      mean (y - m)^2, mean |y - m|                                       m: the mean that the model predicts
    WQL           mean over a of  sum 2 max(a (y - q_a), (a - 1) (y - q_a)) / sum |y|         (arXiv 2403.07815, app. D)
    CRPS          the same loss by value: 2 integral of the pinball loss over a, as a mean over the levels, in y's units
    MASE          mean over series of mean |y - m'| / in-sample mean |y_t - y_(t - season)|    (Hyndman, Koehler 2006)
    coverage_80   per cent of y between q_0.1 and q_0.9

MASE takes the median for m', as its absolute error wants, where there is one. A missing y is not counted.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tasks.series.outputs import pinball
from tasks.series.rolling import Forecast, Mode, roll
from zoo.model import Batch


class Errors:
    """Sums for each horizon; `add` takes batches of forecasts, from a model or a baseline.

    rows  of a window: its channels where these are rows of their own
    """

    def __init__(self, horizons: Sequence[int], levels: Sequence[float], rows: int):
        self.horizons, self.levels, self.rows = list(horizons), list(levels), rows
        self.names = ["squared", "absolute", "values", "rows", "scaled", "series", "size", "spread"]
        self.names += [f"pinball_{level:g}" for level in levels] + [f"inside_{level:g}" for level in self.nominal]
        self.sums = torch.zeros(len(self.horizons), len(self.names), dtype=torch.float64)

    @property
    def nominal(self) -> dict[float, tuple[int, int]]:
        """Per cent of an interval -> the places of its ends among the levels."""
        pairs = [(i, len(self.levels) - 1 - i) for i in range(len(self.levels) // 2)]
        return {
            round(100 * (self.levels[j] - self.levels[i]), 2): (i, j)
            for i, j in pairs
            if abs(self.levels[i] + self.levels[j] - 1) < 1e-9
        }

    def add(self, batch: Batch, forecast: Forecast) -> None:
        target = batch.targets
        mean = forecast.mean.float()
        quantiles = None if forecast.quantiles is None else forecast.quantiles.float()
        there = ~target.isnan()
        y = target.masked_fill(~there, 0).float()
        for place, horizon in enumerate(self.horizons):
            fits = (batch.condition["fits"] >= horizon)[:, None, None] & there[..., :horizon]
            here, guess = y[..., :horizon], mean[..., :horizon]
            error = (here - guess).masked_fill(~fits, 0).double()
            middle = guess if quantiles is None or 0.5 not in self.levels else quantiles[..., :horizon, self.median]
            apart = (here - middle).masked_fill(~fits, 0).double().abs().sum(-1)
            counts = fits.sum(-1)
            scorable = (counts > 0) & (batch.condition["error"] > 0)
            scaled = apart / counts.clamp(min=1) / batch.condition["error"].double()
            row = {
                "squared": error.square().sum(),
                "absolute": error.abs().sum(),
                "values": counts.sum(),
                "rows": (batch.condition["fits"] >= horizon).sum(),
                "scaled": scaled[scorable].sum(),
                "series": scorable.sum(),
                "size": here.masked_fill(~fits, 0).double().abs().sum(),
            }
            if quantiles is not None:
                at = quantiles[..., :horizon, :]
                lost = pinball(at, here, at.new_tensor(self.levels)).masked_fill(~fits.unsqueeze(-1), 0)
                row["spread"] = counts.sum()
                row |= {
                    f"pinball_{a:g}": v for a, v in zip(self.levels, lost.double().flatten(0, -2).sum(0), strict=True)
                }
                for level, (i, j) in self.nominal.items():
                    inside = (here >= at[..., i]) & (here <= at[..., j]) & fits
                    row[f"inside_{level:g}"] = inside.sum()
            for name, value in row.items():
                self.sums[place, self.names.index(name)] += value.double().cpu()

    @property
    def median(self) -> int:
        return self.levels.index(0.5)

    def compute(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for place, horizon in enumerate(self.horizons):
            at = dict(zip(self.names, self.sums[place].tolist(), strict=True))
            if not at["values"]:
                continue
            row = {"mse": at["squared"] / at["values"], "mae": at["absolute"] / at["values"]}
            if at["series"]:
                row["mase"] = at["scaled"] / at["series"]
            if at["spread"]:
                lost = sum(at[f"pinball_{level:g}"] for level in self.levels) / len(self.levels)
                row["wql"] = lost / at["size"] if at["size"] else float("nan")
                row["crps"] = lost / at["values"]
                row |= {f"coverage_{p:g}": 100 * at[f"inside_{p:g}"] / at["values"] for p in self.nominal}
            row["windows"] = at["rows"] / self.rows
            found |= {f"{name}_{horizon}": value for name, value in row.items()}
        if len(self.horizons) > 1:
            for name in ("mse", "mae"):
                values = [found[f"{name}_{h}"] for h in self.horizons if f"{name}_{h}" in found]
                if len(values) == len(self.horizons):
                    found[name] = sum(values) / len(values)
        return found


class ForecastErrors:
    """One roll to the longest horizon for each window; shorter ones are its beginning."""

    def __init__(
        self,
        horizons: Sequence[int],
        levels: Sequence[float],
        rows: int,
        *,
        mode: Mode = "quantiles",
        samples: int = 100,
    ):
        self.errors = Errors(horizons, levels, rows)
        self.mode, self.samples = mode, samples

    @torch.no_grad()
    def update(self, model: Any, batch: Batch) -> None:
        levels = self.errors.levels
        horizon = batch.targets.shape[-1]
        self.errors.add(batch, roll(model, batch, horizon, levels=levels, mode=self.mode, samples=self.samples))

    def reduce(self, ranks: Any) -> None:
        self.errors.sums = ranks.sum(self.errors.sums)

    def compute(self) -> dict[str, float]:
        return self.errors.compute()


def seasonal_error(past: Tensor, season: int) -> Tensor:
    """past (V, T) -> (V,): mean |y_t - y_(t - season)| over what is not missing; 0 where that is nothing."""
    if past.shape[1] <= season:
        return torch.zeros(len(past), dtype=past.dtype)
    return (past[:, season:] - past[:, :-season]).abs().nanmean(dim=1).nan_to_num(0.0)
