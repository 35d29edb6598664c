"""The series task: windows of series as rows of patches, forecasts as DataFrames."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from tasks.series import baselines, plots
from tasks.series.calendar import WIDTH, calendar
from tasks.series.conformal import spread
from tasks.series.data import Panel, Part, scaler
from tasks.series.intervals import ROWS, Intervals
from tasks.series.metrics import ForecastErrors, seasonal_error
from tasks.series.outputs import check_levels, nine
from tasks.series.rolling import Forecast, roll
from tasks.series.tables import Columns, Read, TableError, panels_of, read_frame, season_of
from tasks.series.windows import EvaluationWindows, Layout, TrainingWindows, cut, cut_known, prompt, too_short
from zoo import config as configs
from zoo.config import Choice
from zoo.data import Shuffled, SourceStream
from zoo.model import Batch, Model, ModelConfig
from zoo.registry import datasets
from zoo.task import Media, Metric, Request, Task
from zoo.weights import replace_file

log = logging.getLogger(__name__)


class SeriesTask(Task):
    domain = "series"

    @dataclass
    class Config:
        """patch     steps of a token
        predict   steps predicted from a token, a multiple of patch; longer horizons are rolled
        context   look-back in steps, a multiple of patch
        ahead     patches of a training row after the look-back: predictions that a longer roll would make
        channels  independent: each value of a step is a series of its own; mixed: all in one row
        calendar  the phase of day, week and year as covariates known ahead
        horizons  that are scored; of a roll to the longest the shorter ones are the beginning
        stride    between windows that are scored; published protocols take every one, 1
        roll      how a forecast longer than predict carries its uncertainty on (rolling.py); samples: paths of
                  `samples`
        levels    of the predicted quantiles
        calibrate validation windows that intervals of trained weights are spread to cover (conformal.py), unless
                  they were trained on; 0: none
        follow    rate at which they then follow how often they held in the series' past (conformal.py), such as 0.5;
                  0: they stay as fitted
        linear    fit the linear layer among the baselines
        plots     windows that TensorBoard shows, evenly over the validation split
        """

        dataset: Choice | None = configs.choice(datasets, "series/etth1")
        patch: int = 24
        predict: int = 96
        context: int = 672
        ahead: int = 0
        channels: Literal["independent", "mixed"] = "independent"
        calendar: bool = False
        horizons: list[int] = field(default_factory=lambda: [96, 192, 336, 720])
        stride: int = 1
        roll: Literal["point", "quantiles", "samples"] = "point"
        samples: int = 100
        levels: list[float] = field(default_factory=nine)
        calibrate: int = 512
        follow: float = 0.0
        linear: bool = True
        plots: int = 4

        def __post_init__(self):
            for name in ("patch", "predict", "context", "stride", "samples"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} = {getattr(self, name)}; it takes 1 or more")
            for name in ("predict", "context"):
                if getattr(self, name) % self.patch:
                    raise ValueError(f"{name} = {getattr(self, name)}; it takes a multiple of patch = {self.patch}")
            if min(self.ahead, self.plots, self.calibrate, self.follow) < 0:
                raise ValueError("ahead, plots, calibrate and follow take 0 or more")
            if not self.horizons or min(self.horizons) < 1 or sorted(set(self.horizons)) != list(self.horizons):
                raise ValueError(f"horizons = {self.horizons}; they take rising numbers of steps, such as [96, 192]")
            check_levels(self.levels)

    def __init__(self, config: Config, assets: Path | None = None):
        self.config = config = configs.build(self.Config, config)
        assert config.dataset is not None
        self.source = datasets.get(config.dataset.name)(config.dataset.config)
        self.layout = Layout(config.patch, config.predict, config.context, config.ahead, config.channels == "mixed")
        self._assets = assets
        self._prepared: dict[str, list[Part]] = {}
        self.intervals: Intervals | None = None  # of the trained model that the task came with

    # -- what the data decides -----------------------------------------------------------------------------------------

    @cached_property
    def card(self) -> dict[str, Any]:
        """What weights need of their data: names of the values, number of covariates, and what these are scaled by."""
        if self._assets is not None:
            return json.loads((self._assets / "series.json").read_text(encoding="utf-8"))
        parts = self.source.parts("train")
        panel = parts[0].panel
        own = 0 if panel.known is None else panel.known.shape[1]
        mean, deviation = scaler(parts) if self.source.scaled else (np.zeros(1), np.ones(1))
        known = (np.zeros(0), np.ones(0))
        if own:
            known = scaler([replace(part, panel=replace(part.panel, values=part.panel.known)) for part in parts])
        return {
            "names": list(panel.names),
            "mean": mean.tolist(),
            "deviation": deviation.tolist(),
            "known": own,
            "known_mean": known[0].tolist(),
            "known_deviation": known[1].tolist(),
            "season": self.source.season,
        }

    @property
    def season(self) -> int:
        """Steps of a season of the training data. Weights from before it was kept are of data sets that know it."""
        season = self.card.get("season")
        return self.source.season if season is None else season

    def save_assets(self, folder: Path) -> None:
        replace_file(folder / "series.json", json.dumps(self.card, indent=1).encode())

    def model_config(self, config: ModelConfig) -> ModelConfig:
        mixed = self.layout.mixed
        filled = {
            "patch": self.config.patch,
            "predict": self.config.predict,
            "channels": len(self.card["names"]) if mixed else 1,
            "known": self.card["known"] + (WIDTH if self.config.calendar else 0),
        }
        given = config.head
        if given is not None and not given.config.prefix:
            filled["prefix"] = self.config.context // self.config.patch
        return configs.build(ModelConfig, config, {"head": filled})

    def provenance(self) -> dict[str, Any]:
        return self.source.provenance()

    def parts(self, split: str) -> list[Part]:
        """The parts of a split, scaled where the protocol scales, with their covariates."""
        if split not in self._prepared:
            mean, deviation = np.array(self.card["mean"]), np.array(self.card["deviation"])
            done: dict[int, Panel] = {}
            parts = self.source.parts(split)
            for part in parts:
                if id(part.panel) not in done:
                    values = (part.panel.values - mean) / deviation
                    done[id(part.panel)] = replace(part.panel, values=values, known=self._known(part.panel, 0))
            self._prepared[split] = [replace(part, panel=done[id(part.panel)]) for part in parts]
        return self._prepared[split]

    def _units(self, panel: Panel) -> tuple[np.ndarray, np.ndarray]:
        """What the values of a user's panel are standardised by before a forecast, and forecasts back, (V,) each: what
        the training data's were, by name, and the panel's own mean and deviation for columns that it did not have."""
        mean, deviation = np.zeros(len(panel.names)), np.ones(len(panel.names))
        if not self.source.scaled:
            return mean, deviation
        mean, deviation = scaler([Part(panel, 0, len(panel.values))])
        learnt = dict(zip(self.card["names"], zip(self.card["mean"], self.card["deviation"], strict=True), strict=True))
        for place, name in enumerate(panel.names):
            mean[place], deviation[place] = learnt.get(name, (mean[place], deviation[place]))
        return mean, deviation

    def _known(self, panel: Panel, ahead: int) -> np.ndarray | None:
        """Covariates of the panel's steps and `ahead` more, (T + ahead, K) float32."""
        steps, found = len(panel.values) + ahead, []
        if self.card["known"]:
            if panel.known is None or panel.known.shape[1] != self.card["known"]:
                raise TableError(f"series {panel.id!r} lacks the {self.card['known']} covariates of the training data")
            if len(panel.known) < steps and ahead:
                raise TableError(
                    f"series {panel.id!r} has covariates for {len(panel.known) - len(panel.values)} steps to come, "
                    f"of {ahead}: add rows with times and covariates, and no targets"
                )
            own = (panel.known - np.array(self.card["known_mean"])) / np.array(self.card["known_deviation"])
            found.append(own[:steps].astype(np.float32))
        if self.config.calendar:
            if panel.times is None:
                raise ValueError("task.calendar = true, but this data set has no time stamps")
            offset = pd.DatetimeIndex(panel.times, freq="infer").freq
            found.append(calendar(pd.date_range(panel.times[0], periods=steps, freq=offset)))
        return np.concatenate(found, axis=1) if found else None

    # -- streams -------------------------------------------------------------------------------------------------------

    def stream(self, split: str, *, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0) -> SourceStream:
        """train: a row of patches is an example. valid, test: a window is, with all its channels."""
        training = split == "train"
        if training:
            self._check_horizons()
            windows: Any = TrainingWindows(self.parts(split), self.layout)
            source = Shuffled(windows, windows.collate, seed=seed)
            if windows.short is not None and not rank:
                log.warning("%s", windows.short)
        else:
            windows = self.windows(split)
            source = Shuffled(windows, windows.collate, seed=None)
        if not len(windows):
            longest = max(part.end - part.begin for part in self.parts(split))
            raise ValueError(
                f"split {split} has no window: its longest series has {longest} steps, fewer than "
                + ("two" if training else f"the shortest of task.horizons = {self.config.horizons}")
            )
        return SourceStream(source, batch_size=batch_size, rank=rank, world=world, endless=training)

    def _check_horizons(self) -> None:
        """Before a step is taken: the mean over horizons, which recipes choose weights by, needs windows of each."""
        longest = max(part.end - part.begin for part in self.parts("valid"))
        if unfit := [horizon for horizon in self.config.horizons if horizon > longest]:
            raise ValueError(
                f"task.horizons = {self.config.horizons}: the longest series of the validation split has {longest} "
                f"steps, so no window of {', '.join(map(str, unfit))} fits; name shorter ones, or hold out more of a "
                "table (task.dataset.share)"
            )

    def windows(self, split: str) -> EvaluationWindows:
        parts = self.parts(split)
        errors = [
            seasonal_error(torch.from_numpy(part.panel.values[: part.begin].T), self.source.season).numpy()
            for part in parts
        ]
        return EvaluationWindows(parts, errors, self.layout, self.config.horizons, self.config.stride)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def metrics(self, split: str) -> dict[str, Metric]:
        rows = 1 if self.layout.mixed else len(self.card["names"])
        config = self.config
        tried = self.intervals if split == "test" else None  # of what they are fitted to they would say nothing
        factors = None if tried is None else tried.of_test()
        errors = ForecastErrors(
            config.horizons, config.levels, rows, mode=config.roll, samples=config.samples, factors=factors
        )
        return {"forecast": errors}

    def baselines(self, split: str) -> dict[str, float]:
        horizon, season = max(self.config.horizons), self.source.season
        forecasts = {
            "last_value": baselines.last_value(horizon),
            "seasonal_naive": baselines.seasonal_naive(horizon, season),
        }
        if self.config.linear:
            fitted = baselines.linear(self.parts("train"), self.config.context, horizon, scaled=self.source.scaled)
            forecasts |= {} if fitted is None else {"linear": fitted}
        return baselines.errors_of(forecasts, self.windows(split), self.config.horizons, self.config.levels)

    def describe(self, split: str) -> str:
        config = self.config
        every = "every window" if config.stride == 1 else f"every {config.stride}th window"
        units = "standardised" if self.source.scaled else "original"
        tried = split == "test" and self.intervals is not None and self.intervals.fitted
        calibrated = ", intervals spread on the validation split" if tried else ""
        calibrated += f" and following at rate {config.follow}" if calibrated and config.follow else ""
        return (
            f"{every} of the split, look-back {config.context}, {config.predict} steps at a time rolled to "
            f"{max(config.horizons)} ({config.roll}), {units} values{calibrated}"
        )

    def media(self, model: nn.Module, batch: Batch) -> Media:
        assert isinstance(model, Model)
        windows = self.windows("valid")
        count = min(self.config.plots, len(windows))
        if not count:
            return Media()
        chosen = torch.linspace(0, len(windows) - 1, count).long()
        history, future, _ = windows.raw(chosen)
        device = next(model.parameters()).device
        intervals = self._intervals_of(model)
        factors = None if intervals is None else intervals.factors
        forecast = spread(self.roll(model, windows.collate(chosen).to(device), windows.horizon), factors)
        images = {}
        for number in range(count):
            row = number if self.layout.mixed else number * len(self.card["names"])
            point, quantiles = _one(forecast, row, 0)
            past, truth = history[number, 0].numpy(), future[number, 0].numpy()
            title = self.card["names"][0]
            figure = plots.draw(past, point, quantiles, self.config.levels, truth=truth, title=title)
            images[f"forecast/{number}"] = plots.as_image(figure)
        return Media(images=images)

    def show(self, model: nn.Module) -> Media:
        """The forecast of a made-up series: a day with two peaks, a slow drift and noise. Of a model that needs
        covariates, nothing."""
        if self.card["known"]:
            return Media()
        steps, horizon, season = 2 * self.config.context, max(self.config.horizons), self.season
        place = np.arange(steps) / season
        names = self.card["names"] if self.layout.mixed else ["made up"]
        noise = np.random.default_rng(0).normal(scale=0.15, size=(steps, len(names)))
        curve = np.sin(2 * np.pi * place) + 0.5 * np.sin(4 * np.pi * place + 1) + 0.3 * np.sin(2 * np.pi * place / 9)
        frame = pd.DataFrame(5 + curve[:, None] + noise, columns=names)
        frequency = pd.Timedelta(days=1) / season if season > 12 else "D"
        frame.insert(0, "time", pd.date_range("2024-01-01", periods=steps, freq=frequency))
        table = self.forecast(frame, horizon, columns=Columns(time="time"), model=model)
        first = table[table["target"] == names[0]]
        levels = [level for level in self.config.levels if f"{level:g}" in first]
        quantiles = first[[f"{level:g}" for level in levels]].to_numpy() if levels else None
        history, title = frame[names[0]].to_numpy(), "forecast of a made-up series"
        figure = plots.draw(history, first["mean"].to_numpy(), quantiles, levels, title=title)
        return Media(images={"forecast": plots.as_image(figure)})

    def roll(self, model: Model, batch: Batch, horizon: int) -> Forecast:
        config = self.config
        return roll(model, batch, horizon, levels=config.levels, mode=config.roll, samples=config.samples)

    # -- a user's own table --------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module, kept: Path | None = None, *, sealed: bool = False) -> None:
        """The model that `forecast` takes, whose intervals are spread; whoever opens a run does this."""
        assert isinstance(model, Model)
        if self._intervals_of(model) is None or kept is not None:
            self.intervals = Intervals(self, model, kept, sealed=sealed)

    def _intervals_of(self, model: nn.Module) -> Intervals | None:
        """Of other models than the attached one nothing is known."""
        return self.intervals if self.intervals is not None and self.intervals.model is model else None

    def prompt(self, obj: pd.DataFrame | Sequence[Panel], horizon: int = 1) -> Batch:
        """A table, or series, as histories to forecast `horizon` steps from, in the units of the training data; in the
        condition, too, the "mean" and "deviation" (R, C) that they were standardised by."""
        if isinstance(obj, pd.DataFrame):
            panels: Sequence[Panel] = self._read(obj, self._columns()).panels
        elif isinstance(obj, Sequence) and obj and all(isinstance(one, Panel) for one in obj):
            panels = obj
        else:
            raise ValueError(
                "a forecast begins with a pandas DataFrame that has a column of time stamps, or with a list of Panel, "
                f"not with {repr(obj)[:60]}; of a file: task.forecast(pandas.read_csv(…), horizon)"
            )
        batch = self._histories([self._standard(panel, horizon) for panel in panels], horizon)
        units = np.array([self._units(panel) for panel in panels])  # (B, 2, V)
        mean, deviation = (torch.from_numpy(x).reshape(len(batch.inputs), -1) for x in units.swapaxes(0, 1))
        batch.condition |= {"mean": mean, "deviation": deviation}
        return batch

    def _read(self, frame: pd.DataFrame, columns: Columns) -> Read:
        read = panels_of(frame, columns, "the table")
        short = too_short("history", {panel.id: len(panel.values) for panel in read.panels}, self.layout.context)
        if short is not None:
            log.warning("the table: %s", short)
        if season_of(read.offset) != self.season:
            log.warning(
                "the table has steps of %s, %d to a season; these weights have learnt from series of %d, and their "
                "forecasts of others may be far off",
                *(read.offset.freqstr, season_of(read.offset), self.season),
            )
        return read

    def _standard(self, panel: Panel, horizon: int) -> Panel:
        """A user's panel as `parts` has those of the data set, with covariates for `horizon` more steps."""
        names = self.card["names"]
        if self.layout.mixed and len(panel.names) != len(names):
            raise TableError(
                f"this model takes {len(names)} values a step together ({', '.join(names)}); series {panel.id!r} has "
                f"{len(panel.names)}: {', '.join(panel.names)}"
            )
        mean, deviation = self._units(panel)
        return replace(panel, values=(panel.values - mean) / deviation, known=self._known(panel, horizon))

    def _histories(self, panels: Sequence[Panel], horizon: int) -> Batch:
        """The ends of standardised panels, as rows to forecast from."""
        context, later = self.layout.context, self.layout.rolled(horizon)
        history = torch.from_numpy(np.stack([cut(p.values, len(p.values) - context, len(p.values)) for p in panels]))
        known = [cut_known(p.known, len(p.values) - context, len(p.values) + later) for p in panels]
        missing = history.new_full((*history.shape[:2], horizon), torch.nan)
        nothing = torch.zeros(len(history), dtype=torch.int64), torch.zeros(history.shape[:2])
        return prompt(history, missing, torch.from_numpy(np.stack(known)), *nothing, self.layout)

    def ask(self, request: Request) -> Any:
        raise ValueError("a forecast needs --csv FILE --horizon N, the table and the number of steps")

    def artefacts(self, prompt: Batch, drawn: Tensor) -> list[pd.DataFrame]:
        """drawn (R, N, C + K m, P), back in the units of the table that `prompt` was made of."""
        mean, deviation = (prompt.condition[name].cpu() for name in ("mean", "deviation"))
        values = drawn[:, :, : mean.shape[1]] * deviation[:, None, :, None] + mean[:, None, :, None]
        return [self.artefact(row) for row in values]

    def artefact(self, inputs: Tensor) -> pd.DataFrame:
        """Generated tokens (N, C + K m, P) of one row -> their values, one column a channel."""
        channels = len(self.card["names"]) if self.layout.mixed else 1
        values = inputs[:, :channels].transpose(0, 1).flatten(1)
        names = self.card["names"] if self.layout.mixed else ["value"]
        return pd.DataFrame(values.T.numpy(), columns=names)

    def forecast(
        self, frame: pd.DataFrame, horizon: int, *, columns: Columns | None = None, model: nn.Module | None = None
    ) -> pd.DataFrame:
        """The `horizon` steps after a table's end, one row for each series, target and step: id (in a long table),
        target, time, mean, and a column for each quantile, named by its level.

        columns  what stands where in the table; None: as in the training data, or as can be found
        model    None: that of the pipeline the task came with
        Raises TableError, ValueError.
        """
        return self._forecast(frame, horizon, columns, model)[0]

    def _forecast(
        self, frame: pd.DataFrame, horizon: int, columns: Columns | None, model: nn.Module | None
    ) -> tuple[pd.DataFrame, list[Panel]]:
        if model is None and self.intervals is not None:
            model = self.intervals.model
        if not isinstance(model, Model):
            raise ValueError("a task alone cannot forecast: pass model=, or take the task of zoo.pipeline(…)")
        if horizon < 1:
            raise ValueError(f"horizon = {horizon}; it takes 1 or more steps")
        read = self._read(frame, columns or self._columns())
        device, intervals = next(model.parameters()).device, self._intervals_of(model)
        tables = []
        each = max(1, ROWS // max(len(panel.names) for panel in read.panels))
        for begin in range(0, len(read.panels), each):
            panels = read.panels[begin : begin + each]
            ready = [self._standard(panel, horizon) for panel in panels]
            forecast = self.roll(model, self._histories(ready, horizon).to(device), horizon)
            forecast = spread(forecast, None if intervals is None else intervals.at_end(ready, horizon))
            row = 0
            for panel in panels:
                assert panel.times is not None
                mean, deviation = self._units(panel)
                times = pd.date_range(panel.times[-1], periods=horizon + 1, freq=read.offset)[-horizon:]
                for channel, name in enumerate(panel.names):
                    place = (row, channel) if self.layout.mixed else (row + channel, 0)
                    point, quantiles = _one(forecast, *place)
                    values = {"mean": point}
                    if quantiles is not None:
                        values |= {f"{level:g}": q for level, q in zip(forecast.levels, quantiles.T, strict=True)}
                    table = pd.DataFrame(values) * deviation[channel] + mean[channel]
                    stands = pd.DataFrame({"id": panel.id, "target": name, "time": times})
                    tables.append(pd.concat((stands, table), axis=1))
                row += 1 if self.layout.mixed else len(panel.names)
        whole = pd.concat(tables, ignore_index=True)
        return (whole if any(panel.id for panel in read.panels) else whole.drop(columns="id")), read.panels

    def forecast_file(
        self,
        path: Path,
        horizon: int,
        *,
        columns: dict[str, Any],
        out: Path | None = None,
        plot: Path | None = None,
    ) -> pd.DataFrame:
        """`forecast` of a .csv or .parquet file, written to `out` (either, too); its first series drawn to `plot`."""
        if out is not None and out.suffix.lower() not in (".csv", ".parquet"):
            raise ValueError(f"a forecast cannot be written as {out.name!r}; accepted endings: .csv, .parquet")
        named = replace(self._columns(), **{name: value for name, value in columns.items() if value})
        table, panels = self._forecast(read_frame(path), horizon, named, None)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            table.to_csv(out, index=False) if out.suffix.lower() == ".csv" else table.to_parquet(out)
        if plot is not None:
            panel, first = panels[0], table.iloc[:horizon]
            assert panel.times is not None
            levels = [level for level in self.config.levels if f"{level:g}" in first]
            quantiles = first[[f"{level:g}" for level in levels]].to_numpy() if levels else None
            times = panel.times.append(pd.DatetimeIndex(first["time"]))
            title = " ".join(filter(None, (panel.id, panel.names[0])))
            figure = plots.draw(
                panel.values[:, 0], first["mean"].to_numpy(), quantiles, levels, times=times, title=title
            )
            plots.save(figure, plot)
        return table

    def _columns(self) -> Columns:
        """Those of the training table, where that was a user's."""
        given = getattr(self.source, "config", None)
        if isinstance(given, Columns):
            return Columns(given.time, given.id, given.targets, given.known, given.frequency)
        return Columns()


def _one(forecast: Forecast, row: int, channel: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Point (H,) and quantiles (H, Q) of one series."""
    point = forecast.mean[row, channel].cpu().double().numpy()
    if forecast.quantiles is None:
        return point, None
    return point, forecast.quantiles[row, channel].cpu().double().numpy()
