"""The calendar as covariates: where a step stands in its day, week and year, each as a point on a circle."""

import numpy as np
import pandas as pd

NAMES = ("hour", "weekday", "year")


def calendar(times: pd.DatetimeIndex) -> np.ndarray:
    """(T,) -> (T, 6) float32: sine and cosine of the phase in the day, the week and the year."""
    day = (times.hour * 60 + times.minute + times.second / 60) / 1440
    week = (times.day_of_week + day) / 7
    year = (times.day_of_year - 1 + day) / 365.25
    phases = 2 * np.pi * np.stack([np.asarray(part, dtype=np.float64) for part in (day, week, year)], axis=1)
    return np.concatenate((np.sin(phases), np.cos(phases)), axis=1).astype(np.float32)


WIDTH = 2 * len(NAMES)
