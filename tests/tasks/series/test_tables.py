"""Users' tables: what is repaired and said, and what is refused by column and row."""

import logging

import numpy as np
import pandas as pd
import pytest

from tasks.series.tables import Columns, Table, TableError, panels_of, read_frame, season_of


def frame(steps=60, freq="h", **extra):
    times = pd.date_range("2024-01-01", periods=steps, freq=freq)
    return pd.DataFrame({"date": times, "load": np.sin(np.arange(steps)), **extra})


def test_a_wide_table():
    read = panels_of(frame(wind=np.arange(60.0)), Columns())
    assert [p.names for p in read.panels] == [("load", "wind")]
    assert read.panels[0].values.shape == (60, 2)
    assert (read.offset.freqstr, season_of(read.offset), read.notes) == ("h", 24, [])


def test_a_long_table_of_unequal_series():
    long = pd.concat([frame(40).assign(site="a"), frame(25).assign(site="b")]).sample(frac=1, random_state=0)
    read = panels_of(long, Columns(id="site", targets=["load"]))
    assert sorted((p.id, len(p.values)) for p in read.panels) == [("a", 40), ("b", 25)]
    assert all("sorted" in note for note in read.notes)
    for panel in read.panels:
        np.testing.assert_allclose(panel.values[:, 0], np.sin(np.arange(len(panel.values))))


def test_unsorted_doubled_and_missing_rows_are_repaired_and_said(caplog):
    table = frame()
    table = pd.concat([table.iloc[[3]], table.iloc[:20], table.iloc[23:]])
    with caplog.at_level(logging.WARNING):
        read = panels_of(table, Columns(), "t.csv")
    assert len(read.panels[0].values) == 60
    assert np.isnan(read.panels[0].values[20:23]).all()
    text = caplog.text
    assert "t.csv: rows are not in the order of 'date' (first at row 2): sorted" in text
    assert "1 rows stand twice (first: row 5): dropped" in text
    assert "3 of 60 steps are missing (first: 2024-01-01 20:00:00, after row 21): left empty" in text


def stamped(stamps, **extra):
    return pd.DataFrame({"date": stamps, "load": np.sin(np.arange(len(stamps))), **extra})


def written(form, start="2024-01-01", steps=12, freq="D"):
    """Stamps as text, days and months by strftime."""
    return pd.date_range(start, periods=steps, freq=freq).strftime(form)


def spoil(column, row, value):
    table = frame().astype(object)
    table.loc[row, column] = value
    return table


REFUSED = {
    "text": (spoil("load", 6, "n/k"), {}, r"column 'load', row 7: 'n/k' is no number"),
    "infinite": (spoil("load", 6, np.inf), {}, r"column 'load', row 7 is infinite"),
    "no time": (spoil("date", 2, "soon"), {}, r"column 'date', row 3: 'soon' is no time stamp"),
    "no date among dates": (
        stamped(["13/01/2024", "14/01/2024", "soon"]),
        {},
        r"column 'date', row 3: 'soon' is no time stamp",
    ),
    "a date of another kind": (
        stamped(["2024-01-01", "2024-01-02", "01/03/2024"]),
        {},
        r"column 'date', row 3: '01/03/2024' is no time stamp",
    ),
    "days and months that change places": (
        stamped(["13/01/2024", "14/01/2024", "01/15/2024"]),
        {},
        r"column 'date', row 3: '01/15/2024' is no time stamp",
    ),
    "no stamp at all": (stamped(["2024-01-01", None, "2024-01-03"]), {}, r"column 'date', row 2: .* is no time stamp"),
    "no stamps": (stamped(["soon", "later", "now and then"]), {}, r"column 'date', row 1: 'soon' is no time stamp"),
    "all missing": (frame().assign(load=np.nan), {}, r"column 'load' has no value in any of its 60 rows"),
    "two values": (
        pd.concat([frame(), frame().iloc[[5]].assign(load=9.0)]),
        {},
        r"row 61 has the time 2024-01-01 05:00:00 of row 6, and another value in column 'load'; is this a long table",
    ),
    "no such column": (frame(), {"targets": ["laod"]}, r"no column 'laod'; did you mean 'load'\?"),
    "unnamed time": (frame().rename(columns={"date": "when"}).astype({"when": str}), {}, r"no column is named time"),
    "numbers as time": (frame().assign(date=range(60)), {}, r"column 'date' holds numbers"),
    "unknown frequency": (frame(), {"frequency": "hourly-ish"}, r"frequency 'hourly-ish' is unknown; it takes one of"),
    "wrong frequency": (
        frame(),
        {"frequency": "D"},
        r"column 'date', row 2: 2024-01-01 01:00:00 does not fit a frequency of D from 2024-01-01 00:00:00 \(row 1\)",
    ),
    "no frequency": (
        frame().assign(date=pd.Timestamp("2024-01-01") + pd.to_timedelta(np.arange(60) ** 2, unit="h")),
        {},
        r"has no frequency",
    ),
    "off the grid": (
        frame().assign(date=lambda t: t["date"].where(t.index != 30, t["date"] + pd.Timedelta("7min"))),
        {},
        r"column 'date', row 31: 2024-01-02 06:07:00 does not fit a frequency of h from 2024-01-01 00:00:00 \(row 1\)",
    ),
    "off the grid, in a table upside down, with a row twice": (
        pd.concat(
            [
                frame().assign(date=lambda t: t["date"].where(t.index != 40, t["date"] + pd.Timedelta("7min"))),
                frame()[:1],
            ]
        )[::-1],
        {},
        r"column 'date', row 21: 2024-01-02 16:07:00 does not fit a frequency of h from 2024-01-01 00:00:00 \(row 1\)",
    ),
    "too short": (frame(2), {}, r"has 2 time steps, too few to tell their frequency"),
    "empty": (frame(0), {}, r"has no rows"),
    "no target": (frame()[["date"]], {}, r"no column to forecast beside 'date'"),
    "covariate with a gap": (
        frame(hot=[1.0] * 30 + [np.nan] + [1.0] * 29),
        {"known": ["hot"]},
        r"column 'hot', row 31: missing at 2024-01-02 06:00:00",
    ),
    "covariate without a row": (
        frame(hot=1.0).drop(index=30),
        {"known": ["hot"]},
        r"column 'hot', after row 30: missing at 2024-01-02 06:00:00",
    ),
    "covariate with a gap in a long table": (
        pd.concat([frame(40, hot=1.0).assign(site="a"), frame(40, hot=[1.0] * 9 + [np.nan] * 31).assign(site="b")]),
        {"id": "site", "known": ["hot"]},
        r"series 'b': column 'hot', row 50: missing at 2024-01-01 09:00:00",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_repaired_names_column_and_row(case):
    table, columns, message = REFUSED[case]
    with pytest.raises(TableError, match=message):
        panels_of(table, Columns(**columns))


def test_a_constant_column_is_said():
    read = panels_of(frame().assign(load=3.5), Columns())
    assert read.notes == ["the table: column 'load' is constant at 3.5"]


@pytest.mark.parametrize("form", ["%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M:%S.%f", "%Y/%m/%d %H:%M"])
def test_midnight_may_be_a_date_alone(form):
    """As spreadsheets and to_csv write it; wherever it stands."""
    for first in (0, 7):
        stamps = written(form, f"2024-01-01 {first:02}:00", 60, "h").to_series()
        midnight = pd.date_range(f"2024-01-01 {first:02}:00", periods=60, freq="h").hour == 0
        stamps[midnight] = stamps[midnight].str[:10]
        (panel,) = panels_of(stamped(stamps.to_numpy()), Columns()).panels
        assert panel.times.equals(pd.date_range(f"2024-01-01 {first:02}:00", periods=60, freq="h"))


@pytest.mark.parametrize("sign", ["/", ".", "-"])
@pytest.mark.parametrize(("how", "order"), [("day first", "%d/%m/%Y"), ("month first", "%m/%d/%Y")])
def test_a_day_after_the_twelfth_says_how_dates_are_read(how, order, sign):
    form = order.replace("/", sign)
    table = stamped(written(form + " %H:%M", "2024-02-01", 24 * 20, "h"))
    read = panels_of(table, Columns(), "t.csv")
    assert read.panels[0].times.equals(pd.date_range("2024-02-01", periods=24 * 20, freq="h"))
    assert read.notes == [
        f"t.csv: 'date' is read {how}: '{table['date'][0]}' (row 1) is 2024-02-01 00:00:00",
    ]


def test_a_few_days_are_read_as_the_one_that_makes_even_steps():
    """Hours of three days, none after the twelfth: the other reading jumps a month each day."""
    for how, form in (("day first", "%d/%m/%Y %H:%M"), ("month first", "%m/%d/%y %I:%M %p")):
        read = panels_of(stamped(written(form, "2024-03-01", 72, "h")), Columns())
        assert read.panels[0].times.equals(pd.date_range("2024-03-01", periods=72, freq="h"))
        assert f"is read {how}" in read.notes[0]
    months = stamped(written("%d/%m/%Y", freq="MS"))
    assert panels_of(months, Columns(frequency="MS")).panels[0].times[-1] == pd.Timestamp("2024-12-01")
    assert panels_of(months, Columns(frequency="D")).panels[0].times[-1] == pd.Timestamp("2024-01-12")


def test_dates_that_read_two_ways_are_refused():
    """01/01/2024 to 01/12/2024 are months, or twelve days; with gaps hours are neither."""
    message = (
        r"t.csv: column 'date', row 2: '01/02/2024' is 2024-02-01 00:00:00 or 2024-01-02 00:00:00, and both make even "
        r"steps of the column; write time stamps as ISO 8601, year first: 2024-01-31 or"
    )
    months = stamped(written("%d/%m/%Y", freq="MS"))
    with pytest.raises(TableError, match=message):
        panels_of(months, Columns(), "t.csv")
    long = pd.concat([months.assign(site="a"), months[:5].assign(site="b")])
    with pytest.raises(TableError, match="and both make even steps"):
        panels_of(long, Columns(id="site"))
    hours = stamped(written("%d/%m/%Y %H:%M", "2024-03-01", 72, "h")).drop(index=40)
    with pytest.raises(TableError, match="row 1: '01/03/2024 00:00' is .*, and neither makes even steps"):
        panels_of(hours, Columns())


def test_dates_that_read_one_way_alone_need_no_word():
    read = panels_of(stamped(written("%d/%m/%Y %H:%M", "2024-03-03", 24, "h")), Columns())
    assert not read.notes
    named = panels_of(stamped(written("%b %d, %Y")), Columns())
    assert named.panels[0].times.equals(pd.date_range("2024-01-01", periods=12))
    assert not named.notes


def test_zones_are_taken_to_utc():
    """An hour that stands twice when clocks are set back is two hours."""
    times = pd.date_range("2024-10-26", periods=60, freq="h", tz="Europe/Berlin")
    read = panels_of(pd.DataFrame({"date": times, "load": np.arange(60.0)}), Columns())
    assert len(read.panels[0].values) == 60
    assert not read.notes


@pytest.mark.parametrize(
    ("freq", "season"), [("15min", 96), ("h", 24), ("D", 7), ("W", 52), ("MS", 12), ("QS", 4), ("YS", 1), ("B", 5)]
)
def test_frequencies_are_found(freq, season):
    read = panels_of(frame(40, freq=freq), Columns())
    assert season_of(read.offset) == season


def test_rows_to_come_hold_covariates_alone():
    table = frame(60, hot=np.arange(60.0))
    table.loc[48:, "load"] = np.nan
    panel = panels_of(table, Columns(known=["hot"])).panels[0]
    assert panel.values.shape == (48, 1)
    assert panel.known.shape == (60, 1)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_files_as_data_sets(tmp_path, ending):
    path = tmp_path / f"mine.{ending}"
    frame(100).to_csv(path, index=False) if ending == "csv" else frame(100).to_parquet(path)
    source = Table(Table.Config(path=str(path)))
    ends = [(part.begin, part.end) for split in ("train", "valid", "test") for part in source.parts(split)]
    assert ends == [(0, 80), (80, 90), (90, 100)]
    assert source.season == 24
    assert source.provenance()["frequency"] == "h"


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_frame(tmp_path / "nowhere.csv")
    (tmp_path / "a.xls").write_text("x")
    with pytest.raises(TableError, match=r"accepted endings: .csv, .parquet"):
        read_frame(tmp_path / "a.xls")
    (tmp_path / "b.csv").write_text("")
    with pytest.raises(TableError, match="cannot be read"):
        read_frame(tmp_path / "b.csv")
    with pytest.raises(ValueError, match="share = 0.5"):
        Table.Config(path="x", share=0.5)
    frame(6).to_csv(tmp_path / "short.csv", index=False)
    with pytest.raises(TableError, match="has 6 steps, of which task.dataset.share = 0.1 is none"):
        Table(Table.Config(path=str(tmp_path / "short.csv"))).parts("test")


def test_a_spreadsheets_semicolons_and_decimal_commas_are_read_and_said(tmp_path, caplog):
    path = tmp_path / "t.csv"
    frame(wind=np.arange(60) / 8).to_csv(path, index=False, sep=";", decimal=",")
    read = panels_of(read_frame(path), Columns(), "t.csv")
    np.testing.assert_allclose(read.panels[0].values, np.stack([np.sin(np.arange(60)), np.arange(60) / 8], axis=1))
    assert "semicolons stand between its columns" in caplog.text


def test_a_semicolon_in_a_name_parts_no_columns(tmp_path, caplog):
    path = tmp_path / "t.csv"
    frame().rename(columns={"load": "load; MW"}).to_csv(path, index=False)
    assert panels_of(read_frame(path), Columns()).panels[0].names == ("load; MW",)
    assert not caplog.text


def test_empty_cells_are_said_apart_from_missing_steps():
    table = frame(wind=np.arange(60.0)).drop(index=[30, 31])
    table.loc[[5, 9], "wind"] = np.nan
    read = panels_of(table, Columns(), "t.csv")
    assert np.isnan(read.panels[0].values).sum() == 2 * 2 + 2
    assert "t.csv: column 'wind' has no value in 2 of its 60 steps (first: row 6): left empty" in read.notes
    assert any("2 of 60 steps are missing" in note for note in read.notes)
    assert len(read.notes) == 2


def test_steps_to_come_are_no_empty_cells():
    table = frame(holiday=np.zeros(60))
    table.loc[50:, "load"] = np.nan
    assert not [note for note in panels_of(table, Columns(known=["holiday"])).notes if "no value" in note]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (frame(city="Bonn"), r"'Bonn' is no number; .* \(--target, in a recipe task\.dataset\.targets\)"),
        (frame(2), r"--frequency, in a recipe task\.dataset\.frequency"),
        (frame().rename(columns={"date": "when?"}).astype({"when?": str}), r"--time, in a recipe task\.dataset\.time"),
    ],
    ids=["target", "frequency", "time"],
)
def test_what_can_be_given_is_named(table, said):
    with pytest.raises(TableError, match=said):
        panels_of(table, Columns())
