"""Time stamps as they are written, and the times that they can mean."""

import pandas as pd
from pandas.tseries.api import guess_datetime_format

# 1/2/2024, 01.02.24 13:00: whether day or month comes first cannot be seen; the year is the last of the three
NUMBERS = r"^(?P<first>\d{1,2})[/.-](?P<second>\d{1,2})[/.-](?P<year>\d{4}|\d{2})(?P<rest>\D.*)?$"


def readings(column: pd.Series) -> dict[str, pd.DatetimeIndex]:
    """What a column's stamps mean, (T,), NaT where one is none: {"as written": times}; or, where the first one is of
    the kind of 01/02/2024, both {"day first": times, "month first": times}. Stamps with a zone are taken to UTC, where
    no hour is missing and none stands twice."""
    if pd.api.types.is_datetime64_any_dtype(column):
        return {"as written": _naive(pd.to_datetime(column, utc=True))}
    text = column.astype(str).str.strip().mask(column.isna())
    utc = bool(text.str.contains(r"\d(?:Z|[+-]\d\d:?\d\d)$", regex=True, na=False).any())
    numbers = text.str.extract(NUMBERS)
    if numbers["first"][text.notna()].notna().head(1).any():
        orders = {"day first": ("second", "first"), "month first": ("first", "second")}
        return {name: _naive(_parsed(_as_iso(numbers, *order), utc)) for name, order in orders.items()}
    return {"as written": _naive(_parsed(text, utc))}


def _as_iso(numbers: pd.DataFrame, month: str, day: str) -> pd.Series:
    """Texts that begin with year-month-day. A year of two digits is one of 1969 to 2068, as Python's %y has it."""
    short = numbers["year"].str.len() == 2
    century = pd.Series("20", numbers.index).mask(numbers["year"] >= "69", "19")
    year = numbers["year"].mask(short, century + numbers["year"])
    text = year + "-" + numbers[month].str.zfill(2) + "-" + numbers[day].str.zfill(2) + numbers["rest"].fillna("")
    return text.where(pd.to_numeric(numbers[month]).between(1, 12))


def _parsed(text: pd.Series, utc: bool) -> pd.Series:
    """ISO 8601, where midnight may be a date alone, if the first stamp is that; else in the form that pandas guesses
    from it."""
    times = pd.to_datetime(text, errors="coerce", format="ISO8601", utc=utc)
    there = text.dropna()
    if there.empty or pd.notna(times[there.index[0]]):
        return times
    return pd.to_datetime(text, errors="coerce", format=guess_datetime_format(there.iloc[0]) or "mixed", utc=utc)


def _naive(times: pd.Series) -> pd.DatetimeIndex:
    found = pd.DatetimeIndex(times)
    return found.tz_convert(None) if found.tz is not None else found
