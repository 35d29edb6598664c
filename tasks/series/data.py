"""Published series, split as their benchmarks split them. Files are found through `zoo.files.fetch` and checked.

A data set is a class with a Config and `parts(split)`: of each series the steps that the split may predict. What lies
before them may be looked at, so that the first test window has its whole look-back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pandas as pd

from zoo.files import fetch

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Panel:
    """One series of T steps with V values each.

    values  (T, V) float64, NaN where a value is missing
    names   of the V values
    times   (T,) of the steps, in order and evenly spaced; None where the source has none
    known   (T', K) float32, T' >= T: covariates that are known ahead
    """

    id: str
    values: np.ndarray
    names: tuple[str, ...]
    times: pd.DatetimeIndex | None = None
    known: np.ndarray | None = None


@dataclass(frozen=True)
class Part:
    """Of a panel the steps begin <= t < end that a split predicts; earlier ones may be looked at."""

    panel: Panel
    begin: int
    end: int


class SeriesSet(Protocol):
    """season: steps after which the series repeats themselves, for the seasonal naive forecast and MASE.
    scaled: metrics are on values that are standardised with the training part's mean and deviation."""

    Config: ClassVar[type]
    season: int
    scaled: bool

    def parts(self, split: str) -> list[Part]: ...

    def provenance(self) -> dict[str, Any]: ...


def check_split(split: str, name: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split {split!r} of {name} does not exist; accepted: {', '.join(SPLITS)}")


def overlap(parts: Sequence[Part], others: Sequence[Part]) -> bool:
    """Whether some step of a series is in both."""
    spans: dict[str, list[Part]] = {}
    for other in others:
        spans.setdefault(other.panel.id, []).append(other)
    return any(
        one.begin < other.end and other.begin < one.end for one in parts for other in spans.get(one.panel.id, [])
    )


def scaler(parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray]:
    """(mean, deviation), each (V,) float64, over all steps of the training parts, as scikit-learn's StandardScaler:
    population deviation, 1 where it is 0."""
    values = np.concatenate([part.panel.values[part.begin : part.end] for part in parts])
    mean, deviation = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
    return mean, np.where(deviation > 0, deviation, 1.0)


# ---------------------------------------------------------------------------------------------------------------------


class Published:
    """A data set of files that are known by their digests; there is nothing to set."""

    NAME: ClassVar[str]
    LICENCE: ClassVar[str]
    URL: ClassVar[str]
    SHA256: ClassVar[dict[str, str]]
    season: ClassVar[int]
    scaled: ClassVar[bool] = True

    @dataclass
    class Config:
        pass

    def __init__(self, config: Config):
        pass

    def read(self, name: str) -> Path:
        return fetch(name, [self.URL.format(name.rpartition("/")[2])], self.SHA256[name])

    def provenance(self) -> dict[str, Any]:
        return {"series": self.NAME, "sha256": self.SHA256, "licence": self.LICENCE}


class Dated(Published):
    """One table with a column `date`; consecutive parts train, validate and test."""

    @cached_property
    def panel(self) -> Panel:
        frame = pd.read_csv(self.read(next(iter(self.SHA256))))
        times = pd.DatetimeIndex(pd.to_datetime(frame.pop("date")))
        return Panel(self.NAME, frame.to_numpy(np.float64), tuple(frame.columns), times)

    def borders(self) -> tuple[int, int, int]:
        """The ends of the three parts."""
        raise NotImplementedError

    def parts(self, split: str) -> list[Part]:
        check_split(split, self.NAME)
        ends = (0, *self.borders())
        place = SPLITS.index(split)
        return [Part(self.panel, ends[place], ends[place + 1])]


class ETT(Dated):
    """Electricity transformer temperature (Zhou et al., arXiv 2012.07436): 12 / 4 / 4 months of 30 days."""

    LICENCE = "CC BY-ND 4.0"
    URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/{}"
    HOUR: ClassVar[int]  # steps

    def borders(self) -> tuple[int, int, int]:
        month = 30 * 24 * self.HOUR
        return 12 * month, 16 * month, 20 * month


class ETTh1(ETT):
    NAME, HOUR, season = "series/etth1", 1, 24
    SHA256: ClassVar = {"ett/ETTh1.csv": "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066"}


class ETTh2(ETT):
    NAME, HOUR, season = "series/etth2", 1, 24
    SHA256: ClassVar = {"ett/ETTh2.csv": "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b"}


class ETTm1(ETT):
    NAME, HOUR, season = "series/ettm1", 4, 96
    SHA256: ClassVar = {"ett/ETTm1.csv": "6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e"}


class ETTm2(ETT):
    NAME, HOUR, season = "series/ettm2", 4, 96
    SHA256: ClassVar = {"ett/ETTm2.csv": "db973ca252c6410a30d0469b13d696cf919648d0f3fd588c60f03fdbdbadd1fd"}


class Exchange(Dated):
    """Daily exchange rates of eight countries, 1990 to 2010 (Lai et al., arXiv 1703.07015): 70 / 10 / 20 per cent, cut
    as the Time-Series-Library cuts them. Calendar days with no trade repeat the day before."""

    NAME, LICENCE, season = "series/exchange", "not stated", 7
    URL = "https://huggingface.co/datasets/thuml/Time-Series-Library/resolve/main/exchange_rate/{}"
    SHA256: ClassVar = {
        "exchange_rate/exchange_rate.csv": "48b4d9d3d508f5104162e85b9a6042e3557fde11aa9f2944eba8c0d0efc89842"
    }

    def borders(self) -> tuple[int, int, int]:
        steps = len(self.panel.values)
        return int(0.7 * steps), steps - int(0.2 * steps), steps


class M4Hourly(Published):
    """The 414 hourly series of the M4 competition (Makridakis et al., 2020), 700 to 960 steps and 48 to predict.

    Series have no dates. test: the 48 steps of the competition's test file. valid: the last ones of its training file.
    """

    NAME, LICENCE, season, scaled = "series/m4_hourly", "not stated", 24, False
    URL = "https://raw.githubusercontent.com/Mcompetitions/M4-methods/master/Dataset/{}"
    HORIZON = 48
    SHA256: ClassVar = {
        "m4/Hourly-train.csv": "ea59b7783573c49077a835ab6465c7d66f1474783360f310988a9a737fbca62f",
        "m4/Hourly-test.csv": "71a57fccb15e534d973626ada4fb87febf789e9317715b7cc6dd3b5f90db6f42",
    }

    @dataclass
    class Config:
        """hold_out  steps at the end of the training file that are left out of training, and validate. More than 48
        hold several windows, and no single event decides; 0, for the last run: the last 48 validate and were trained on
        """

        hold_out: int = 48

        def __post_init__(self):
            if self.hold_out and not 48 <= self.hold_out <= 600:
                raise ValueError(f"hold_out = {self.hold_out}; it takes 0, or 48 to 600 steps")

    def __init__(self, config: Config):
        self.config = config

    def read(self, name: str) -> Path:
        folder = "Train" if "train" in name else "Test"
        return fetch(name, [self.URL.format(f"{folder}/{name.rpartition('/')[2]}")], self.SHA256[name])

    @cached_property
    def panels(self) -> list[Panel]:
        past, future = (pd.read_csv(self.read(name), index_col=0) for name in self.SHA256)
        panels = []
        for (name, before), after in zip(past.iterrows(), future.to_numpy(np.float64), strict=True):
            values = np.concatenate((before.dropna().to_numpy(np.float64), after))
            panels.append(Panel(str(name), values[:, None], ("value",)))
        return panels

    def parts(self, split: str) -> list[Part]:
        check_split(split, self.NAME)
        return [self._part(panel, split) for panel in self.panels]

    def _part(self, panel: Panel, split: str) -> Part:
        past = len(panel.values) - self.HORIZON
        if split == "test":
            return Part(panel, past, past + self.HORIZON)
        if split == "valid":
            return Part(panel, past - (self.config.hold_out or self.HORIZON), past)
        return Part(panel, 0, past - self.config.hold_out)
