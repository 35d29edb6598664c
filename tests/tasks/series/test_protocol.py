"""The published protocol: how many windows there are, what they are scaled by, and what a seasonal naive forecast makes
of them; test_naive_by_hand computes the same from the files alone."""

import numpy as np
import pandas as pd
import pytest

from tasks.series import baselines
from tasks.series.data import scaler
from tasks.series.task import SeriesTask
from zoo.config import build
from zoo.registry import datasets

WINDOWS = {
    "series/etth1": {96: 2785, 192: 2689, 336: 2545, 720: 2161},
    "series/ettm1": {96: 11425, 192: 11329, 336: 11185, 720: 10801},
}
HOUR = {"series/etth1": 1, "series/ettm1": 4}  # steps
SCALER = {  # mean and deviation of the training part
    "series/etth1": (
        [7.937742, 2.021039, 5.079771, 0.746186, 2.781762, 0.788453, 17.128262],
        [5.812749, 2.090105, 5.518794, 1.926379, 1.023523, 0.630237, 9.176491],
    ),
    "series/ettm1": (
        [7.990013, 2.038748, 5.109928, 0.756224, 2.804702, 0.791186, 17.124950],
        [5.833093, 2.089646, 5.519043, 1.924161, 1.040554, 0.632442, 9.173035],
    ),
}
NAIVE = {  # MSE and MAE of the day before
    "series/etth1": {96: (0.5122, 0.4333), 192: (0.5808, 0.4692), 336: (0.6499, 0.5008), 720: (0.6554, 0.5141)},
    "series/ettm1": {96: (0.4227, 0.3865), 192: (0.4631, 0.4057), 336: (0.4961, 0.4258), 720: (0.5739, 0.4645)},
}


def make(name, **fields) -> SeriesTask:
    return SeriesTask(build(SeriesTask.Config, {"dataset": {"name": name}, **fields}))


@pytest.mark.parametrize("name", WINDOWS)
def test_every_test_window_is_counted(data_root, name):
    task = make(name)
    for horizon, count in WINDOWS[name].items():
        alone = make(name, horizons=[horizon])
        alone._prepared = task._prepared  # read once
        assert len(alone.windows("test")) == count
    # one pass over all horizons scores the same windows, the last batch and the last window among them
    windows = task.windows("test")
    fits = windows.fits.numpy()
    assert {h: int((fits >= h).sum()) for h in WINDOWS[name]} == WINDOWS[name]
    sizes = [len(batch.targets) // 7 for batch in task.stream("test", batch_size=1000)]
    assert sum(sizes) == WINDOWS[name][96]


@pytest.mark.parametrize("name", SCALER)
def test_the_scaler_is_that_of_the_training_part(data_root, name):
    for found, pinned in zip(scaler(datasets.get(name)(None).parts("train")), SCALER[name], strict=True):
        np.testing.assert_allclose(found, pinned, atol=1e-6)


def naive(task: SeriesTask, horizons, season):
    forecasts = {"naive": baselines.seasonal_naive(max(horizons), season)}
    return baselines.errors_of(forecasts, task.windows("test"), horizons, task.config.levels)


@pytest.mark.parametrize("name", NAIVE)
def test_seasonal_naive(data_root, name):
    found = naive(make(name), list(NAIVE[name]), 24 * HOUR[name])
    assert {h: (round(found[f"naive/mse_{h}"], 4), round(found[f"naive/mae_{h}"], 4)) for h in NAIVE[name]} == NAIVE[
        name
    ]


@pytest.mark.parametrize("name", NAIVE)
def test_naive_by_hand(data_root, name):
    """The same numbers, and the scaler's, from the file, with nothing of ours in between."""
    table = pd.read_csv(data_root / f"ett/{name[7:10].upper()}{name[10:]}.csv").drop(columns="date").to_numpy()
    month, season = 30 * 24 * HOUR[name], 24 * HOUR[name]
    train = table[: 12 * month]
    mean, deviation = scaler(datasets.get(name)(None).parts("train"))
    np.testing.assert_allclose(mean, train.mean(0), rtol=1e-12)
    np.testing.assert_allclose(deviation, train.std(0), rtol=1e-12)
    scaled = (table - train.mean(0)) / train.std(0)
    for horizon, pinned in NAIVE[name].items():
        origins = np.arange(16 * month, 20 * month - horizon + 1)
        assert len(origins) == WINDOWS[name][horizon]
        errors = [scaled[origins + k] - scaled[origins + k % season - season] for k in range(horizon)]
        found = np.mean([np.mean(e**2) for e in errors]), np.mean([np.mean(np.abs(e)) for e in errors])
        assert tuple(np.round(found, 4)) == pinned


def test_m4_is_scored_as_in_the_competition(data_root):
    """MASE 1.193 and WQL .0483 are the published figures of the seasonal naive forecast on the hourly series."""
    found = naive(make("series/m4_hourly", patch=24, predict=48, context=504, horizons=[48]), [48], 24)
    assert round(found["naive/mase_48"], 3) == 1.193
    assert round(found["naive/wql_48"], 4) == 0.0483


def test_splits_of_m4_hold_out_the_end_of_training(data_root):
    held = datasets.get("series/m4_hourly")
    for hold_out, end, begin in ((48, -96, -96), (192, -240, -240), (0, -48, -96)):
        source = held(held.Config(hold_out=hold_out))
        train, valid, test = (source.parts(split)[0] for split in ("train", "valid", "test"))
        steps = len(train.panel.values)
        assert (train.end, valid.begin, valid.end) == (steps + end, steps + begin, steps - 48)
        assert (test.begin, test.end) == (steps - 48, steps)
    assert len(source.parts("test")) == 414
    with pytest.raises(ValueError, match="hold_out = 24; it takes 0, or 48 to 600 steps"):
        held.Config(hold_out=24)


def test_an_unknown_split_is_named(data_root):
    with pytest.raises(ValueError, match="split 'dev' of series/etth1 does not exist; accepted: train, valid, test"):
        make("series/etth1").windows("dev")
