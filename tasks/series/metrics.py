"""Errors of forecasts by horizon, as sums over values and windows: independent of batches and ranks.

Of the values y of all windows in which a horizon fits, with the point forecast m and quantiles q_a at levels a:

    MSE, MAE      mean (y - m)^2, mean |y - m|                                       m: the mean that the model predicts
    WQL           mean over a of  sum 2 max(a (y - q_a), (a - 1) (y - q_a)) / sum |y|         (arXiv 2403.07815, app. D)
    CRPS          the same loss by value: 2 integral of the pinball loss over a, as a mean over the levels, in y's units
    MASE          mean over series of mean |y - m'| / in-sample mean |y_t - y_(t - season)|    (Hyndman, Koehler 2006)
    coverage_80   per cent of y between q_0.1 and q_0.9

MASE takes the median for m', as its absolute error wants, where there is one. A missing y is not counted.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tasks.series.conformal import spread
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
        self.sums = torch.zeros(len(self.horizons), len(self.names), dtype=torch.float64)  # moves to the first batch

    @property
    def nominal(self) -> dict[float, tuple[int, int]]:
        """Per cent of an interval -> the places of its ends among the levels."""
        pairs = [(i, len(self.levels) - 1 - i) for i in range(len(self.levels) // 2)]
        return {
            round(100 * (self.levels[j] - self.levels[i]), 2): (i, j)
            for i, j in pairs
            if abs(self.levels[i] + self.levels[j] - 1) < 1e-9
        }

    def add(self, batch: Batch, forecast: Forecast, *, degenerate: bool = False) -> None:
        """Nothing is read on the host. degenerate: of a forecast without quantiles the mean stands for each of them."""
        there = ~batch.targets.isnan()
        y = batch.targets.masked_fill(~there, 0).float()
        mean = forecast.mean.float()
        quantiles = None if forecast.quantiles is None else forecast.quantiles.float().unbind(-1)
        if quantiles is None and degenerate:
            quantiles = (mean,) * len(self.levels)
        fits = batch.condition["fits"].unsqueeze(-1) >= torch.tensor(self.horizons, device=y.device)  # (R, K)

        def by_row(value: Tensor) -> Tensor:
            """(R, C, H) -> (R, C, K): sums over the steps there are up to each horizon, of windows in which it fits."""
            value = value.masked_fill(~there, 0)
            ends = [0, *self.horizons]
            parts = [value[..., a:b].sum(-1, dtype=torch.float64) for a, b in itertools.pairwise(ends)]
            return torch.stack(parts, dim=-1).cumsum(-1) * fits.unsqueeze(1)

        def by_horizon(value: Tensor) -> Tensor:
            return by_row(value).sum((0, 1))

        error = y - mean
        middle = mean if quantiles is None or 0.5 not in self.levels else quantiles[self.levels.index(0.5)]
        apart, counts = by_row((y - middle).abs()), by_row(there)
        season = batch.condition["error"].double().unsqueeze(-1)
        scorable = (counts > 0) & (season > 0)
        scaled = torch.where(scorable, apart / counts.clamp(min=1) / season, 0)
        row = {
            "squared": by_horizon(error.square()),
            "absolute": by_horizon(error.abs()),
            "values": counts.sum((0, 1)),
            "rows": fits.sum(0),
            "scaled": scaled.sum((0, 1)),
            "series": scorable.sum((0, 1)),
            "size": by_horizon(y.abs()),
        }
        if quantiles is not None:
            row["spread"] = row["values"]
            for level, at in zip(self.levels, quantiles, strict=True):
                row[f"pinball_{level:g}"] = by_horizon(pinball(at.unsqueeze(-1), y, level)[..., 0])
            for percent, (i, j) in self.nominal.items():
                row[f"inside_{percent:g}"] = by_horizon((y >= quantiles[i]) & (y <= quantiles[j]))
        self.sums = self.sums.to(y.device)
        for name, value in row.items():
            self.sums[:, self.names.index(name)] += value

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
        factors: Callable[[Batch], Tensor | None] | None = None,
    ):
        """factors: of a batch, that intervals are spread by (conformal.py)."""
        self.errors = Errors(horizons, levels, rows)
        self.mode, self.samples, self.factors = mode, samples, factors

    @torch.no_grad()
    def update(self, model: Any, batch: Batch) -> None:
        levels = self.errors.levels
        horizon = batch.targets.shape[-1]
        forecast = roll(model, batch, horizon, levels=levels, mode=self.mode, samples=self.samples)
        self.errors.add(batch, spread(forecast, self.factors(batch) if self.factors else None))

    def reduce(self, ranks: Any) -> None:
        self.errors.sums = ranks.sum(self.errors.sums)

    def compute(self) -> dict[str, float]:
        return self.errors.compute()


def seasonal_error(past: Tensor, season: int) -> Tensor:
    """past (V, T) -> (V,): mean |y_t - y_(t - season)| over what is not missing; 0 where that is nothing."""
    if past.shape[1] <= season:
        return torch.zeros(len(past), dtype=past.dtype)
    return (past[:, season:] - past[:, :-season]).abs().nanmean(dim=1).nan_to_num(0.0)
