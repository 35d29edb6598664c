"""Forecasts as pictures: nothing covers the curves, and the axis says what it counts."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from tasks.series import plots

LEVELS = [0.1, 0.5, 0.9]


@pytest.mark.parametrize("every", [None, "15min", "h", "D", "MS"])
def test_the_legend_stands_outside_and_ticks_apart(every):
    times = None if every is None else pd.date_range("2016-12-30", periods=400 + 48, freq=every)
    point = np.zeros(48)
    quantiles = np.array([-1.0, 0.0, 1.0]).repeat(48).reshape(3, 48).T
    figure = plots.draw(np.arange(400.0), point, quantiles, LEVELS, truth=point, times=times, title="load")
    FigureCanvasAgg(figure).draw()
    (axes,), (legend,) = figure.axes, figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {"history", "truth", "0.1 to 0.9", "median"}
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
    assert len(boxes) > 3
    assert all(left.x1 + 4 < right.x0 for left, right in itertools.pairwise(boxes))
    assert axes.get_xlabel() == ("steps from the origin" if every is None else "")
