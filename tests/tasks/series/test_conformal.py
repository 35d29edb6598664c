"""Spread intervals: exact coverage where it is known, what stays as it is, and what they may not see."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import zoo
from tasks.series.conformal import fit, follow, pairs, scores, spread
from tasks.series.rolling import Forecast
from zoo import weights
from zoo.config import build
from zoo.evaluate import evaluate_run
from zoo.publish import About, publish
from zoo.train import Recipe, load_published, load_run, train

NINE = [i / 10 for i in range(1, 10)]


def forecasts(windows, steps, generator, width=0.3):
    """Truths and too narrow forecasts of them, whose spread and error grow with the step and with the row."""
    size = torch.linspace(1, 3, steps) * torch.rand(windows, 1, 1, generator=generator).add(0.5)
    centre = torch.randn(windows, 1, steps, generator=generator) * 10
    truth = centre + size * torch.randn(windows, 1, steps, generator=generator)
    normal = torch.distributions.Normal(0, 1).icdf(torch.tensor(NINE))
    return truth, Forecast(centre, centre.unsqueeze(-1) + width * size.unsqueeze(-1) * normal, NINE)


def covered(truth, forecast):
    q = forecast.quantiles
    return (
        torch.stack([(truth >= q[..., i]) & (truth <= q[..., j]) for i, j in pairs(NINE)], -1).float().mean((0, 1, 2))
    )


def test_exchangeable_windows_are_covered_as_promised():
    """Fitted to some, other windows of the same kind fall inside with the nominal probability: over 200 x 50 x 40 of
    them the standard error, that of the fitted windows included, is below half a point."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(20):
        truth, forecast = forecasts(400, 5, generator)
        factors = fit(scores(truth, forecast.quantiles, NINE), NINE)
        fresh, other = forecasts(2000, 5, generator)
        found.append(covered(fresh, spread(other, factors)))
        assert (covered(fresh, other) < torch.tensor([0.4, 0.25, 0.15, 0.1])).all()  # far too narrow before
    assert torch.stack(found).mean(0).tolist() == pytest.approx([0.8, 0.6, 0.4, 0.2], abs=0.01)


def test_the_factor_is_the_right_order_statistic():
    """Of 9 scores 1 … 9 the 80 per cent pair takes the ceil(10 * 0.8) = 8th; a step without truth has factor 1."""
    quantiles = torch.tensor([-1.0, 0.0, 1.0]).expand(9, 1, 2, 3)
    truth = torch.arange(1.0, 10.0).view(9, 1, 1).repeat(1, 1, 2) * torch.tensor([1, -1] * 4 + [1]).view(9, 1, 1)
    truth[..., 1] = torch.nan
    factors = fit(scores(truth, quantiles, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9])
    assert factors.tolist() == [[8.0], [1.0]]
    few = fit(scores(truth[:2], quantiles[:2], [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9])
    assert few[0].tolist() == [2.0]  # too few for the promise: the largest


def test_mean_and_median_stay_and_quantiles_rise():
    _, forecast = forecasts(4, 6, torch.Generator().manual_seed(1))
    factors = torch.tensor([[0.5, 1.0, 3.0, 0.0]]).repeat(3, 1)  # the third pair would reach beyond the outer ones
    other = spread(forecast, factors)
    assert torch.equal(other.mean, forecast.mean)
    assert torch.equal(other.quantiles[..., 4], forecast.quantiles[..., 4])
    assert (other.quantiles.diff(dim=-1) >= 0).all()
    assert spread(forecast, None) is forecast
    doubled = spread(forecast, torch.full((1, 4), 2.0)).quantiles  # the last factors hold for all later steps
    middle = forecast.quantiles[..., 4:5]
    torch.testing.assert_close(doubled - middle, 2 * (forecast.quantiles - middle))


def test_levels_without_pairs_are_left_alone():
    assert pairs(NINE) == [(0, 8), (1, 7), (2, 6), (3, 5)]
    assert pairs([0.1, 0.9]) == pairs([0.1, 0.5, 0.8]) == pairs([0.5]) == []


def test_factors_follow_a_series_that_changes():
    """Errors twice as large as on the validation split, then half: fitted factors cover far too little and too much,
    those that follow come back to nominal each time. 300 origins, a standard error of half a point."""
    generator = torch.Generator().manual_seed(2)
    truth, forecast = forecasts(400, 6, generator)
    factors = fit(scores(truth, forecast.quantiles, NINE), NINE)
    truth, forecast = forecasts(1200, 6, generator)
    median = forecast.quantiles[..., 4]
    size = torch.cat((torch.full((600,), 2.0), torch.full((600,), 0.5))).view(-1, 1, 1)
    found = scores(median + size * (truth - median), forecast.quantiles, NINE)
    at = follow(factors, found.unflatten(0, (-1, 2)).flatten(1, 2), NINE, 2, 0.1)  # two channels
    assert at.shape == (601, 6, 4)
    torch.testing.assert_close(at[0], factors)
    nominal = torch.tensor([0.8, 0.6, 0.4, 0.2])
    apart = found.unflatten(0, (-1, 2)).squeeze(2)  # (600, 2, 6, 4)
    for lately in (slice(100, 300), slice(400, 600)):
        fixed, followed = ((apart[lately] <= f).float().mean((0, 1, 2)) for f in (factors, at[lately].unsqueeze(1)))
        assert (fixed - nominal).abs().max() > 0.15
        torch.testing.assert_close(followed, nominal, rtol=0, atol=0.03)


def test_factors_know_what_lies_before_them_and_nothing_else():
    """Blocks of two steps: of the forecast from origin i, block b is known at origin i + b + 1."""
    found = torch.zeros(8, 1, 5, 4)  # always inside
    plain = follow(torch.ones(5, 4), found, NINE, 2, 0.5)
    for origin in range(8):
        for step in range(5):
            other = found.clone()
            other[origin, :, step] = 1000.0
            changed = (follow(torch.ones(5, 4), other, NINE, 2, 0.5) != plain).any(-1)  # (9, 5)
            assert not changed[: origin + step // 2 + 1].any()
            assert not changed[:, [s for s in range(5) if s // 2 != step // 2]].any()
            if origin + step // 2 + 1 < 9:
                assert changed[origin + step // 2 + 1, step // 2 * 2]


def test_a_step_of_following_by_hand():
    """One origin, one block of two steps, one inside of the outermost pair and none of the others; then no truth."""
    found = torch.tensor([[[[0.5, 3, 3, 3], [2, 3, 3, 3]]], [[[torch.nan] * 4] * 2]])
    at = follow(torch.full((1, 4), 1.5), found, NINE, 2, 0.2)
    expected = 1.5 * torch.tensor([0.2 * 0.3, 0.2 * 0.6, 0.2 * 0.4, 0.2 * 0.2]).exp()
    assert torch.equal(at[0], torch.full((2, 4), 1.5))
    torch.testing.assert_close(at[1], expected.expand(2, 4))
    assert torch.equal(at[2], at[1])


# -- with a run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intervals")
    rng, hours = np.random.default_rng(0), np.arange(1200)
    load = 10 * np.sin(2 * np.pi * hours / 24) + rng.normal(size=1200)
    pd.DataFrame({"time": pd.date_range("2024-01-01", periods=1200, freq="h"), "load": load}).to_csv(
        folder / "mine.csv", index=False
    )
    recipe = build(
        Recipe,
        {
            "task": {
                "name": "series",
                "dataset": {"name": "series/csv", "path": str(folder / "mine.csv"), "share": 0.25},
                **{"patch": 12, "predict": 24, "context": 96, "horizons": [24, 72], "plots": 1, "linear": False},
            },
            "model": {
                "name": "series_gatedfwa_100k",
                "backbone": {"width": 16, "depth": 1, "heads": 2},
                "head": {"name": "series", "highway": 96},
            },
            "train": {"steps": 60, "batch_size": 16, "ema": 0.9, "optimizer": {"lr": 0.01}},
        },
    )
    train(recipe, folder / "run")
    return folder


def test_a_run_keeps_what_was_fitted_and_every_way_uses_it(run, caplog):
    scores = evaluate_run(run / "run", device="cpu")
    (kept,) = (run / "run/fitted").glob("*/intervals-*.safetensors")
    factors = weights.read(kept)["factors"]
    assert factors.shape == (72, 4)
    assert not torch.equal(factors, torch.ones_like(factors))
    raw = evaluate_run(run / "run", device="cpu", overrides=["task.calibrate=0"])
    for name in ("mse_24", "mse_72", "mae_72", "mase_72"):
        assert scores.values[name] == raw.values[name]
    assert scores.values["coverage_80_72"] == pytest.approx(80, abs=6)  # a stationary series, 228 windows of one path
    assert scores.values["coverage_80_72"] != raw.values["coverage_80_72"]
    assert "intervals spread" in scores.title
    assert "intervals spread" not in raw.title

    weights.save({"factors": 3 * torch.ones_like(factors)}, kept)  # read back, not fitted again
    table = pd.read_csv(run / "mine.csv")
    wide = zoo.pipeline(run / "run", device="cpu").task.forecast(table, 30)
    _, task, model = load_run(run / "run", overrides={"task": {"calibrate": 0}})
    plain = task.forecast(table, 30, model=model)
    np.testing.assert_allclose(wide["mean"], plain["mean"])
    np.testing.assert_allclose(wide["0.5"], plain["0.5"])
    np.testing.assert_allclose(wide["0.9"] - wide["0.5"], 3 * (plain["0.9"] - plain["0.5"]), rtol=1e-4)
    raw_weights = load_run(run / "run", ema=False)[1]
    assert raw_weights.intervals.kept != task.intervals.kept  # other weights, other intervals
    weights.save({"factors": factors}, kept)


def test_the_test_split_is_not_seen(run):
    """Fitted with the test split altered, the factors are the same; with the validation split altered, not."""
    found = []
    for split in (None, "test", "valid"):
        _, task, _ = load_run(run / "run")
        task.intervals.kept = None
        if split:
            part = task.parts(split)[0]
            values = part.panel.values.copy()
            values[part.begin : part.end] *= -7
            for name in ("valid", "test"):
                task._prepared[name] = [
                    replace(own, panel=replace(own.panel, values=values)) for own in task.parts(name)
                ]
        found.append(task.intervals.factors)
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_intervals_follow_what_came_before_each_window(run):
    """With the test split's later half altered, windows that begin before have the same factors, later ones others;
    the first window's are those of the validation split, followed to its end."""
    found = []
    for factor in (1, 5):
        _, task, model = load_run(run / "run", overrides={"task": {"follow": 0.3, "stride": 7}})
        part = task.parts("test")[0]
        values, middle = part.panel.values.copy(), (part.begin + part.end) // 2
        values[middle:] *= factor
        task._prepared["test"] = [replace(part, panel=replace(part.panel, values=values))]
        metric = task.metrics("test")["forecast"]
        batches = list(task.stream("test", batch_size=16))
        found.append(torch.cat([metric.factors(batch) for batch in batches]))
    origins = task.windows("test").origins
    same = (found[0] == found[1]).flatten(1).all(1)
    assert same[origins <= middle].all()
    assert not same[origins >= middle + 2 * 12].any()  # a patch's truths count when they are all known
    assert len(found[0].flatten(1).unique(dim=0)) > 10
    valid = task.parts("valid")[0]
    at_end = task.intervals.follow([valid], task.intervals.factors, 72)[0][-1]
    torch.testing.assert_close(found[0][0], at_end)
    for horizon in (1, task.layout.patch + 1):  # less than a patch, and no whole number of them: the same first steps
        shorter = task.intervals.follow([valid], task.intervals.factors, horizon)[0][-1]
        torch.testing.assert_close(shorter, at_end[:horizon])
    values = evaluate_run(run / "run", device="cpu", overrides=["task.follow=0.3"])
    assert "following at rate 0.3" in values.title
    assert values.values["mse_72"] == evaluate_run(run / "run", device="cpu").values["mse_72"]


def test_a_forecast_follows_its_tables_past(run):
    """A table that has become noisier than the training data has wider intervals; one no longer than a look-back keeps
    those of the validation split. Mean and median stay."""
    table = pd.read_csv(run / "mine.csv")
    table.loc[600:, "load"] += 4 * np.random.default_rng(1).normal(size=600)
    tables = {}
    for rate in (0.0, 0.3):
        _, task, _ = load_run(run / "run", overrides={"task": {"follow": rate}})
        tables[rate] = task.forecast(table, 30), task.forecast(table[-96:], 30)
    (plain, short), (followed, alike) = tables[0.0], tables[0.3]
    np.testing.assert_allclose(followed[["mean", "0.5"]], plain[["mean", "0.5"]])
    assert ((followed["0.9"] - followed["0.1"]) > 1.5 * (plain["0.9"] - plain["0.1"])).all()
    pd.testing.assert_frame_equal(short, alike)


def test_validation_is_scored_as_predicted(run):
    """On the windows that it was fitted to, coverage would be right by construction."""
    _, task, _ = load_run(run / "run")
    assert task.metrics("valid")["forecast"].factors is None
    assert task.metrics("test")["forecast"].factors is not None


def test_weights_that_were_trained_on_validation_keep_their_intervals(run, caplog):
    """As M4's last run is, with hold_out = 0: what was learned by heart says nothing of what is to come."""
    _, task, _ = load_run(run / "run")
    task.intervals.kept = None
    source = task.source
    whole = [replace(part, end=part.end + 1) for part in source.parts("train")]
    task.source = SimpleNamespace(parts=lambda split: whole if split == "train" else source.parts(split))
    assert task.intervals.factors is None
    assert "the validation split was trained on" in caplog.text


def test_published_weights_bring_their_intervals(run, tmp_path, monkeypatch):
    """Fitted to the rounded weights, by digest, and found without the data; the folder is never written to."""
    monkeypatch.setattr(weights.weights, "_entries", {})
    monkeypatch.setattr(weights.weights, "_load", None)
    about = About("a toy", "Apache-2.0", "a made-up series, CC0-1.0", "it knows nothing")
    folder = publish(
        run / "run", "mine", about, out=tmp_path / "weights", table=tmp_path / "weights.yaml", device="cpu"
    )
    (kept,) = (folder / "fitted").glob("intervals-*.safetensors")
    card = weights.open_card(folder.name)
    assert f"fitted/{kept.name}" in card.facts["files"]
    table = pd.read_csv(run / "mine.csv")
    (run / "mine.csv").rename(tmp_path / "away.csv")
    try:
        task = zoo.pipeline(folder.name, device="cpu").task
        assert len(task.forecast(table, 30)) == 30
        assert torch.equal(task.intervals.factors, weights.read(kept)["factors"])
    finally:
        (tmp_path / "away.csv").rename(run / "mine.csv")
    _, task, _ = load_published(folder.name, overrides={"task": {"roll": "quantiles"}})
    assert task.intervals.factors is not None  # of other rolls they are fitted anew
    assert list((folder / "fitted").iterdir()) == [kept]
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    with pytest.raises(weights.WeightsError, match="damaged"):
        load_published(folder.name)


def test_without_the_data_forecasts_go_on(run, tmp_path, caplog):
    _, task, model = load_run(run / "run")
    task.intervals.kept = None
    table = pd.read_csv(run / "mine.csv")
    (run / "mine.csv").rename(tmp_path / "away.csv")
    try:
        assert len(task.forecast(table, 24, model=model)) == 24
    finally:
        (tmp_path / "away.csv").rename(run / "mine.csv")
    assert caplog.text.count("the validation split cannot be read") == 1
