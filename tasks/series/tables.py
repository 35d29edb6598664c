"""A user's own table: .csv, .parquet or a DataFrame, wide (a column for each target) or long (an id column as well).

What is safe is repaired and said in a warning: rows out of order are sorted, rows that stand twice are dropped, gaps
and empty cells become missing values, dates such as 13/01/2024 are read in the one way that they can be, and so is a
file with semicolons between its columns. Everything else is a TableError that names the column and the row, counted
from 1 after the header, and the option to change.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tasks.series.data import SPLITS, Panel, Part, check_split
from tasks.series.dates import readings
from zoo.files import check_sha256
from zoo.registry import nearest

log = logging.getLogger(__name__)

FREQUENCIES = "h, 15min, D, B, W, MS, ME, QS, YS"
TIME_NAMES = ("time", "date", "datetime", "timestamp", "ds")


def option(name: str) -> str:
    """How a column or the frequency is given: to a command, and in a recipe."""
    return f"--{name.removesuffix('s')}, in a recipe task.dataset.{name}"


class TableError(ValueError):
    """A table that cannot be forecast from as it is."""


@dataclass
class Columns:
    """What stands where. An empty name is found: the time column by its name or as the first that holds dates, the
    targets as all other columns.

    time       of time stamps
    id         of series, in a long table
    targets    to forecast
    known      covariates that are known ahead; for a forecast the table has them for the steps to come
    frequency  of the steps, as pandas names it (h, 15min, D, MS); "": what most steps are apart
    """

    time: str = ""
    id: str = ""
    targets: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    frequency: str = ""


@dataclass(frozen=True)
class Read:
    """The series, their frequency, and what was repaired, in words."""

    panels: list[Panel]
    offset: pd.offsets.BaseOffset
    notes: list[str]


def read_frame(path: Path) -> pd.DataFrame:
    """A .csv (values as they are written, so that a wrong one can be shown) or .parquet file."""
    if not path.is_file():
        raise FileNotFoundError(f"the table {str(path)!r} does not exist")
    try:
        if path.suffix.lower() == ".csv":
            frame = _read_csv(path)
        elif path.suffix.lower() in (".parquet", ".pq"):
            frame = pd.read_parquet(path)
        else:
            raise TableError(f"{path} is no table that can be read; accepted endings: .csv, .parquet")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise TableError(f"{path} cannot be read: {error}") from error
    return frame


def _read_csv(path: Path) -> pd.DataFrame:
    """With semicolons between its columns, a comma in a number is its decimal point: so spreadsheets write both."""
    with path.open(encoding="utf-8-sig") as file:
        header = file.readline()
    if ";" not in header or "," in header:
        return pd.read_csv(path, dtype=str, skipinitialspace=True)
    log.warning("%s: semicolons stand between its columns; a comma in a number is read as its decimal point", path)
    frame = pd.read_csv(path, dtype=str, skipinitialspace=True, sep=";")
    return frame.replace(r"^([+-]?\d+),(\d+)$", r"\1.\2", regex=True)


def panels_of(frame: pd.DataFrame, columns: Columns, where: str = "the table") -> Read:
    """The series of a table, each on an even grid of time. Raises TableError."""
    if not len(frame):
        raise TableError(f"{where} has no rows")
    frame = frame.reset_index() if isinstance(frame.index, pd.DatetimeIndex) else frame.reset_index(drop=True)
    frame.columns = [str(name) for name in frame.columns]
    if len(set(frame.columns)) < len(frame.columns):
        twice = frame.columns[frame.columns.duplicated()][0]
        raise TableError(f"{where} has two columns named {twice!r}")
    columns = _found(frame, columns, where)
    notes: list[str] = []
    groups = frame[columns.id].astype(str) if columns.id else pd.Series([""] * len(frame))
    if columns.id and frame[columns.id].isna().any():
        raise TableError(f"{where}: column {columns.id!r}, row {_first(frame[columns.id].isna())} names no series")
    times = _times(frame[columns.time], groups, columns.frequency, where, notes)
    numbers = {name: _numbers(frame[name], where) for name in (*columns.targets, *columns.known)}
    table = pd.DataFrame(numbers)
    prepared = []
    for name in groups.unique():
        inside = (groups == name).to_numpy()
        label = f"{where}, series {name!r}" if columns.id else where
        prepared.append((name, *_ordered(times[inside], table[inside], label, columns, notes), label))
    offset = _frequency([part[1] for part in prepared], columns.frequency, where)
    panels = [_panel(name, stamps, part, offset, label, columns, notes) for name, stamps, part, label in prepared]
    for note in notes:
        log.warning("%s", note)
    return Read(panels, offset, notes)


# ---------------------------------------------------------------------------------------------------------------------
# Steps of panels_of


def _first(flags: Any) -> int:
    """The row, counted from 1, of the first True."""
    return int(np.argmax(np.asarray(flags))) + 1


def _found(frame: pd.DataFrame, columns: Columns, where: str) -> Columns:
    """The columns with names filled in."""
    named = [columns.time, columns.id, *columns.targets, *columns.known]
    for name in filter(None, named):
        if name not in frame.columns:
            raise TableError(f"{where} has no column {name!r}{nearest(name, frame.columns)}")
    time = columns.time
    if not time:
        likely = [name for name in frame.columns if name.lower() in TIME_NAMES]
        likely += [name for name in frame.columns if pd.api.types.is_datetime64_any_dtype(frame[name])]
        if not likely:
            raise TableError(
                f"{where}: no column is named {', '.join(TIME_NAMES)}; name the one with time stamps "
                f"({option('time')}): {', '.join(frame.columns)}"
            )
        time = likely[0]
    targets = columns.targets or [n for n in frame.columns if n not in (time, columns.id, *columns.known)]
    if not targets:
        raise TableError(f"{where} has no column to forecast beside {time!r}")
    return replace(columns, time=time, targets=targets)


def _times(column: pd.Series, groups: pd.Series, frequency: str, where: str, notes: list[str]) -> pd.DatetimeIndex:
    """Of several readings of dates the one that makes times of all stamps, or the one that makes even steps of them."""
    if pd.api.types.is_numeric_dtype(column):
        raise TableError(f"{where}: column {column.name!r} holds numbers, no time stamps")
    found = readings(column)
    whole = {how: times for how, times in found.items() if not times.isna().any()}
    if not whole:
        row = _first(min(found.values(), key=lambda times: times.isna().sum()).isna())
        raise TableError(f"{where}: column {column.name!r}, row {row}: {column.iloc[row - 1]!r} is no time stamp")
    how, times = next(iter(whole.items()))
    differ = np.any([times != other for other in found.values()], axis=0)
    if not differ.any():
        return times
    row = _first(differ)
    if len(whole) > 1:
        even = [name for name in whole if _even(whole[name], groups, frequency)]
        if len(even) != 1:
            may_be = " or ".join(str(other[row - 1]) for other in whole.values())
            raise TableError(
                f"{where}: column {column.name!r}, row {row}: {column.iloc[row - 1]!r} is {may_be}, and "
                f"{'both make' if even else 'neither makes'} even steps of the column; write time stamps as ISO 8601, "
                "year first: 2024-01-31 or 2024-01-31 13:00"
            )
        how, times = even[0], whole[even[0]]
    notes.append(f"{where}: {column.name!r} is read {how}: {column.iloc[row - 1]!r} (row {row}) is {times[row - 1]}")
    return times


def _even(times: pd.DatetimeIndex, groups: pd.Series, frequency: str) -> bool:
    """Whether the steps of each series of three or more are even, none missing, and of the frequency where one is
    given."""
    series = [times[(groups == name).to_numpy()].unique().sort_values() for name in groups.unique()]
    tellable = [stamps for stamps in series if len(stamps) >= 3]
    if frequency:
        return all(pd.date_range(s[0], s[-1], freq=_offset(frequency)).equals(s) for s in series)
    return bool(tellable) and all(pd.DatetimeIndex(s, freq="infer").freq is not None for s in tellable)


def _numbers(column: pd.Series, where: str) -> np.ndarray:
    values = pd.to_numeric(column, errors="coerce")
    empty = column.isna() | (column.astype(str).str.strip() == "")
    wrong = values.isna() & ~empty
    if wrong.any():
        row = _first(wrong)
        raise TableError(
            f"{where}: column {column.name!r}, row {row}: {column.iloc[row - 1]!r} is no number; name the columns to "
            f"forecast ({option('targets')}), or the one that names the series of a long table ({option('id')})"
        )
    numbers = values.to_numpy(np.float64, na_value=np.nan)
    if np.isinf(numbers).any():
        raise TableError(f"{where}: column {column.name!r}, row {_first(np.isinf(numbers))} is infinite")
    return numbers


def _ordered(
    times: pd.DatetimeIndex, table: pd.DataFrame, where: str, columns: Columns, notes: list[str]
) -> tuple[pd.DatetimeIndex, pd.DataFrame]:
    """Sorted, each time once; the table's index becomes its rows, counted from 1."""
    rows = table.index.to_numpy() + 1
    table = table.set_axis(rows)
    if not times.is_monotonic_increasing:
        order = np.argsort(times.to_numpy(), kind="stable")
        late = rows[1:][times.to_numpy()[1:] < times.to_numpy()[:-1]][0]
        notes.append(f"{where}: rows are not in the order of {columns.time!r} (first at row {late}): sorted")
        times, table, rows = times[order], table.iloc[order], rows[order]
    twice = times.duplicated()
    if twice.any():
        for place in np.flatnonzero(twice):
            same = table.iloc[place].equals(table.iloc[place - 1])
            if not same:
                differing = [n for n in table if not _equal(table[n].iloc[place], table[n].iloc[place - 1])]
                hint = "" if columns.id else "; is this a long table, with an id column to name?"
                raise TableError(
                    f"{where}: row {rows[place]} has the time {times[place]} of row {rows[place - 1]}, and another "
                    f"value in column {differing[0]!r}{hint}"
                )
        notes.append(f"{where}: {int(twice.sum())} rows stand twice (first: row {rows[np.argmax(twice)]}): dropped")
        times, table = times[~twice], table[~twice]
    return times, table


def _equal(a: float, b: float) -> bool:
    return a == b or (np.isnan(a) and np.isnan(b))


def _offset(given: str) -> pd.offsets.BaseOffset:
    try:
        return pd.tseries.frequencies.to_offset(given)
    except ValueError as error:
        raise TableError(
            f"frequency {given!r} is unknown; it takes one of pandas': {FREQUENCIES} ({option('frequency')})"
        ) from error


def _frequency(all_times: Sequence[pd.DatetimeIndex], given: str, where: str) -> pd.offsets.BaseOffset:
    if given:
        return _offset(given)
    longest = max(all_times, key=len)
    if len(longest) < 3:
        raise TableError(
            f"{where} has {len(longest)} time steps, too few to tell their frequency: give it ({option('frequency')})"
        )
    inferred = pd.DatetimeIndex(longest, freq="infer").freq
    if inferred is not None:
        return inferred
    apart, counts = np.unique(np.diff(longest.to_numpy()), return_counts=True)
    if counts.max() * 2 <= counts.sum():
        raise TableError(
            f"{where} has no frequency: its steps are most often {pd.Timedelta(apart[counts.argmax()])} apart, and "
            f"that in {counts.max()} of {counts.sum()} cases only. Give the frequency ({option('frequency')}): "
            f"{FREQUENCIES}"
        )
    return pd.tseries.frequencies.to_offset(pd.Timedelta(apart[counts.argmax()]))


def _panel(
    name: str,
    times: pd.DatetimeIndex,
    table: pd.DataFrame,
    offset: pd.offsets.BaseOffset,
    where: str,
    columns: Columns,
    notes: list[str],
) -> Panel:
    grid = pd.date_range(times[0], times[-1], freq=offset)
    off = ~times.isin(grid)
    if off.any():
        place = int(np.argmax(off))
        raise TableError(
            f"{where}: column {columns.time!r}, row {table.index[place]}: {times[place]} does not fit a frequency of "
            f"{offset.freqstr} from {times[0]} (row {table.index[0]}). Give another frequency "
            f"({option('frequency')}: {FREQUENCIES}), or bring the table to one"
        )
    if len(grid) > len(times):
        first = int(np.argmax(~grid.isin(times)))
        notes.append(
            f"{where}: {len(grid) - len(times)} of {len(grid)} steps are missing (first: {grid[first]}, after row "
            f"{table.index[first - 1]}): left empty"
        )
    rows = pd.Series(table.index, times).reindex(grid)  # NaN where a step has none
    table = table.set_axis(times).reindex(grid)
    targets, known = table[columns.targets].to_numpy(np.float64), table[columns.known].to_numpy(np.float32)
    there = ~np.isnan(targets).all(axis=1)
    for column, values in zip(columns.targets, targets.T, strict=True):
        if np.isnan(values).all():
            raise TableError(f"{where}: column {column!r} has no value in any of its {len(values)} rows")
        empty = np.isnan(values) & (there if columns.known else rows.notna().to_numpy())  # but steps to come
        if empty.any():
            place = int(np.argmax(empty))
            notes.append(
                f"{where}: column {column!r} has no value in {empty.sum()} of its {len(values)} steps (first: row "
                f"{rows.iloc[place]:.0f}): left empty"
            )
        if len(values) > 1 and np.nanmin(values) == np.nanmax(values):
            notes.append(f"{where}: column {column!r} is constant at {np.nanmin(values):g}")
    steps = len(targets)
    if columns.known:  # rows at the end with covariates alone are the steps to come
        steps = int(np.flatnonzero(there)[-1]) + 1
        if np.isnan(known).any():
            step = int(np.argmax(np.isnan(known).any(axis=1)))
            column = columns.known[int(np.argmax(np.isnan(known[step])))]
            row = f"row {rows.iloc[step]:.0f}" if rows.notna().iloc[step] else f"after row {rows.iloc[step - 1]:.0f}"
            raise TableError(
                f"{where}: column {column!r}, {row}: missing at {grid[step]}; covariates that are known have no gaps"
            )
    return Panel(name, targets[:steps], tuple(columns.targets), grid[:steps], known if columns.known else None)


def season_of(offset: pd.offsets.BaseOffset) -> int:
    """Steps after which a series of this frequency is taken to repeat itself: a day of parts of one, a week of days, a
    year of months or quarters; 1 else."""
    named = {"D": 7, "B": 5, "W": 52, "MS": 12, "ME": 12, "BMS": 12, "BME": 12, "QS": 4, "QE": 4}
    try:
        step = pd.Timedelta(offset)  # type: ignore[arg-type]
    except ValueError:
        return named.get(offset.freqstr.split("-")[0], 1)
    day = pd.Timedelta(days=1)
    if step < day:
        return max(1, round(day / step))
    return 7 if step == day else 1


# ---------------------------------------------------------------------------------------------------------------------


class Table:
    """A user's file as a data set: of each series the last `share` tests, as much before it validates.

    path    a .csv or .parquet file
    sha256  refuse any other file; "" takes what is there
    """

    @dataclass
    class Config(Columns):
        path: str = ""
        share: float = 0.1
        sha256: str = ""

        def __post_init__(self):
            if not 0 < self.share < 0.4:
                raise ValueError(f"share = {self.share}; it takes a number between 0 and 0.4")

    scaled = True

    def __init__(self, config: Config):
        if not config.path:
            raise ValueError("this data set needs task.dataset.path, a .csv or .parquet file")
        self.config = config
        self.path = Path(config.path).expanduser()

    @cached_property
    def table(self) -> Read:
        frame = read_frame(self.path)
        if self.config.sha256:
            check_sha256(self.path, self.config.sha256)
        return panels_of(frame, self.config, str(self.path))

    @property
    def season(self) -> int:
        return season_of(self.table.offset)

    def parts(self, split: str) -> list[Part]:
        check_split(split, str(self.path))
        parts = []
        for panel in self.table.panels:
            steps = len(panel.values)
            held = int(self.config.share * steps)
            if held < 1:
                raise TableError(
                    f"{self.path}: series {panel.id!r} has {steps} steps, of which task.dataset.share = "
                    f"{self.config.share} is none to validate and test on"
                )
            ends = (0, steps - 2 * held, steps - held, steps)
            place = SPLITS.index(split)
            parts.append(Part(panel, ends[place], ends[place + 1]))
        return parts

    def provenance(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        names = sorted({name for panel in self.table.panels for name in panel.names})
        return {
            "series": self.path.name,
            "sha256": digest,
            "targets": names,
            "count": len(self.table.panels),
            "frequency": self.table.offset.freqstr,
            "repaired": self.table.notes,
        }
