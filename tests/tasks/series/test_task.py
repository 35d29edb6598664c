"""The series task: training beats the naive forecast, metrics against brute force, forecasts of a user's table."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

import zoo
from tasks.series import baselines, plots
from tasks.series.metrics import Errors
from tasks.series.rolling import Forecast
from tasks.series.tables import Columns
from tasks.series.task import SeriesTask
from zoo import cli, registry
from zoo.config import build, list_recipes, recipe_layers
from zoo.evaluate import evaluate_run
from zoo.model import Batch
from zoo.task import run_metrics
from zoo.train import Recipe, train
from zoo.train.recipe import make_model, make_task


def waves(steps=700, sites=("",), seed=0):
    """Hourly, with a day and a week, two columns; a long table where there are sites."""
    rng, hours = np.random.default_rng(seed), np.arange(steps)
    tables = []
    for number, site in enumerate(sites):
        day = np.sin(2 * np.pi * hours / 24 + number)
        load = 100 * (1 + number) + 10 * day + 3 * np.sin(2 * np.pi * hours / 168) + rng.normal(size=steps)
        table = pd.DataFrame({"time": pd.date_range("2024-01-01", periods=steps, freq="h"), "load": load})
        table["wind"] = 5 - 2 * day + 0.3 * rng.normal(size=steps)
        tables.append(table.assign(site=site) if site else table)
    return pd.concat(tables, ignore_index=True)


def recipe_of(path: Path, head="series", **layers) -> Recipe:
    tokens = {"patch": 1, "predict": 1, "horizons": [12, 24]}
    small = {
        "task": {
            "name": "series",
            "dataset": {"name": "series/csv", "path": str(path)},
            **{"patch": 12, "predict": 24, "context": 96, "horizons": [24, 36], "plots": 1},
            **(tokens if head == "series_tokens" else {}),
        },
        "model": {
            "name": "series_gatedfwa_100k",
            "backbone": {"width": 16, "depth": 1, "heads": 2},
            "head": {"name": "series", "highway": 96} if head == "series" else {"name": head},
        },
        "train": {"steps": 30, "batch_size": 16, "sample_every": 30, "save_every": 30, "optimizer": {"lr": 0.01}},
    }
    return build(Recipe, small, layers)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("series")
    waves().to_csv(folder / "mine.csv", index=False)
    train(recipe_of(folder / "mine.csv"), folder / "run")
    return folder


def test_smoke_beats_seasonal_naive(data_root, tmp_path):
    """On every 24th test window of ETTh1, two and four days ahead."""
    train(build(Recipe, *recipe_layers("series/smoke")), tmp_path / "run")
    scores = evaluate_run(tmp_path / "run", device="cpu")
    for horizon in (48, 96):
        assert scores.values[f"mse_{horizon}"] < scores.baselines[f"seasonal_naive/mse_{horizon}"]
        assert scores.values[f"mae_{horizon}"] < scores.baselines[f"seasonal_naive/mae_{horizon}"]
    assert scores.baselines["linear/mse_96"] < scores.baselines["seasonal_naive/mse_96"]
    board = EventAccumulator(str(tmp_path / "run/tensorboard"))
    board.Reload()
    pictures = {tag: board.Tensors(tag) for tag in board.Tags()["tensors"] if tag.startswith("forecast/")}
    assert sorted(pictures) == ["forecast/0", "forecast/1"]  # task.plots: 2
    for events in pictures.values():
        assert [event.step for event in events] == [120]
        width, height, png = events[0].tensor_proto.string_val
        assert int(width) > int(height) > 100
        assert png.startswith(b"\x89PNG")


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.startswith("series/")])
def test_every_recipe_takes_a_step(data_root, name):
    recipe = build(Recipe, *recipe_layers(name))
    task = make_task(recipe)
    model = make_model(recipe, task)
    batch = next(iter(task.stream("train", batch_size=2)))
    output = model(batch)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert output.count > 0
    some = next(iter(task.stream("valid", batch_size=1)))
    for metric in task.metrics("valid").values():
        if task.config.roll == "samples":
            metric.samples = 3
        metric.update(model.eval(), some)
        assert all(math.isfinite(value) for value in metric.compute().values())


@pytest.mark.parametrize("name", registry.models.names("series_*_100k"))
def test_every_mixer_rolls(run, name):
    recipe = recipe_of(run / "mine.csv", model={"name": name, "backbone": {"width": 32}})
    task = make_task(recipe)
    model = make_model(recipe, task).eval()
    values = run_metrics(model, task.metrics("test"), task.stream("test", batch_size=7))
    assert math.isfinite(values["mse_36"])


@pytest.mark.parametrize("channels", ["independent", "mixed"])
def test_errors_do_not_depend_on_batches_and_are_right(run, channels):
    recipe = recipe_of(run / "mine.csv", task={"channels": channels, "roll": "point"})
    task = make_task(recipe)
    torch.manual_seed(0)
    model = make_model(recipe, task).eval()
    found = [run_metrics(model, task.metrics("test"), task.stream("test", batch_size=size)) for size in (1, 5, 64)]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)
    # by hand: each window alone
    panel = task.parts("test")[0].panel.values
    assert found[0]["windows_24"] == 70 - 24 + 1
    assert found[0]["windows_36"] == 70 - 36 + 1
    squares = []
    for origin in range(630, 700 - 24 + 1):
        one = [origin - 630]
        guess = task.roll(model, task.windows("test").collate(one), 36).mean.reshape(2, 36)[:, :24].numpy()
        squares.append((panel[origin : origin + 24].T - guess) ** 2)
    assert found[0]["mse_24"] == pytest.approx(np.mean(squares), rel=1e-4)


@pytest.mark.parametrize("channels", ["independent", "mixed"])
def test_media_shows_the_same_windows_each_time(run, monkeypatch, channels):
    """Evenly over the validation split: the first and the last among them, whatever the batch and the weights."""
    drawn = []
    draw = plots.draw
    monkeypatch.setattr(plots, "draw", lambda *args, **words: drawn.append((args, words)) or draw(*args, **words))
    recipe = recipe_of(run / "mine.csv", task={"plots": 3, "channels": channels})
    task = make_task(recipe)
    shown = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = make_model(recipe, task).eval()
        shown.append(task.media(model, list(task.stream("valid", batch_size=2))[seed]).images)
    assert [list(images) for images in shown] == [["forecast/0", "forecast/1", "forecast/2"]] * 2
    for images in shown:
        for image in images.values():
            assert image.shape[0] == 3
            assert image.std() > 0.01  # something is drawn
    values = task.parts("valid")[0].panel.values[:, 0]
    ends = (560, 583, 630 - 24)  # of 70 steps the first 24 can be forecast from 47 origins
    for (before, after), origin in zip(zip(drawn[:3], drawn[3:], strict=True), ends, strict=True):
        for args, words in (before, after):
            np.testing.assert_allclose(args[0], values[origin - 96 : origin], rtol=1e-6)
            there = min(36, 630 - origin)
            np.testing.assert_allclose(words["truth"][:there], values[origin : origin + there], rtol=1e-6)
            assert np.isnan(words["truth"][there:]).all()
        assert not np.allclose(before[0][1], after[0][1])  # other weights forecast something else


def test_errors_by_their_definitions():
    target = torch.tensor([[[1.0, 2.0, torch.nan, 4.0]], [[0.0, 5.0, 1.0, torch.nan]]])
    quantiles = torch.tensor([0.0, 1.0, 3.0]).expand(2, 1, 4, 3)
    condition = {"fits": torch.tensor([4, 3]), "error": torch.tensor([[2.0], [0.5]])}
    errors = Errors([2, 4], [0.1, 0.5, 0.9], 1)
    errors.add(Batch(None, target, condition=condition), Forecast(torch.full((2, 1, 4), 1.5), quantiles, []))
    found = errors.compute()
    assert found["windows_2"] == 2
    assert found["windows_4"] == 1
    assert found["mse_2"] == pytest.approx((0.25 + 0.25 + 2.25 + 12.25) / 4)
    assert found["mae_4"] == pytest.approx((0.5 + 0.5 + 2.5) / 3)
    assert found["mase_2"] == pytest.approx(((0 + 1) / 2 / 2.0 + (1 + 4) / 2 / 0.5) / 2)
    assert found["coverage_80_2"] == pytest.approx(75.0)
    lost = 0.0
    for y in (1.0, 2.0, 0.0, 5.0):
        lost += sum(2 * max(a * (y - q), (a - 1) * (y - q)) for a, q in ((0.1, 0.0), (0.5, 1.0), (0.9, 3.0))) / 3
    assert found["crps_2"] == pytest.approx(lost / 4)
    assert found["wql_2"] == pytest.approx(lost / 8)


def test_baselines():
    history = torch.tensor([[[torch.nan, 1.0, 2.0, torch.nan, 4.0]]])
    filled = baselines.filled(history)
    assert filled.tolist() == [[[1.0, 1.0, 2.0, 2.0, 4.0]]]
    assert baselines.last_value(3)(filled).tolist() == [[[4.0, 4.0, 4.0]]]
    assert baselines.seasonal_naive(5, 3)(filled).tolist() == [[[2.0, 2.0, 4.0, 2.0, 2.0]]]


def test_linear_finds_a_wave(run):
    task = make_task(recipe_of(run / "mine.csv"))
    found = task.baselines("test")
    assert found["linear/mse_24"] < found["seasonal_naive/mse_24"] < found["last_value/mse_24"]


# -- a user's own table -----------------------------------------------------------------------------------------------


def test_forecast_of_a_frame(run):
    pipe = zoo.pipeline(run / "run", device="cpu")
    table = pipe.task.forecast(waves(500, seed=3), 50)
    assert list(table.columns) == ["target", "time", "mean", *(f"{q / 10:g}" for q in range(1, 10))]
    assert len(table) == 100
    load = table[table["target"] == "load"]
    assert load["time"].iloc[0] == pd.Timestamp("2024-01-01") + pd.Timedelta(hours=500)
    assert (np.diff(load[[f"{q / 10:g}" for q in range(1, 10)]], axis=1) >= 0).all()
    truth = waves(550, seed=3)["load"].to_numpy()[500:]
    assert np.abs(load["mean"] - truth).mean() < np.abs(truth - truth.mean()).mean()


def test_forecast_of_a_long_table_and_of_short_histories(run):
    pipe = zoo.pipeline(run / "run", device="cpu")
    long = pd.concat([waves(300, ("a", "b")), waves(20, ("c",))], ignore_index=True)
    table = pipe.task.forecast(long, 10, columns=Columns(id="site", targets=["load"]))
    assert table.groupby("id").size().to_dict() == {"a": 10, "b": 10, "c": 10}
    alone = pipe.task.forecast(waves(300, ("a", "b"))[300:], 10, columns=Columns(id="site", targets=["load"]))
    both = table[table["id"] == "b"].reset_index(drop=True)
    np.testing.assert_allclose(alone["mean"], both["mean"], rtol=1e-4)
    assert np.isfinite(table["mean"]).all()


def test_a_history_shorter_than_the_look_back_is_said_once(run, caplog):
    pipe = zoo.pipeline(run / "run", device="cpu")
    pipe.task.forecast(waves(96), 10)
    assert "history" not in caplog.text
    pipe.task.forecast(waves(20), 10)
    assert caplog.messages == ["the table: history has 20 of 96 steps: the others count as missing"]
    caplog.clear()
    long = pd.concat([waves(300, ("a", "b")), waves(20, ("c",)), waves(30, ("d",))], ignore_index=True)
    pipe.task.forecast(long, 10, columns=Columns(id="site", targets=["load"]))
    assert caplog.messages == [
        "the table: history of series 'c', the shortest of 2 such, has 20 of 96 steps: the others count as missing"
    ]
    caplog.clear()
    pipe.task.prompt(waves(95))
    assert caplog.messages == ["the table: history has 95 of 96 steps: the others count as missing"]


def test_a_training_part_too_short_for_a_row_is_said_once(tmp_path, caplog):
    """80 per cent of 148 steps are a look-back and a prediction, of 147 not."""
    for steps, said in ((148, []), (147, ["training part has 119 of 120 steps: the others count as missing"])):
        waves(steps).to_csv(tmp_path / "mine.csv", index=False)
        task = make_task(recipe_of(tmp_path / "mine.csv", task={"horizons": [12]}))
        caplog.clear()
        next(iter(task.stream("train", batch_size=4)))
        next(iter(task.stream("train", batch_size=4, rank=1, world=2)))
        task.baselines("valid")
        assert caplog.messages == said


def test_a_table_too_short_for_a_horizon_is_refused_before_the_first_step(tmp_path):
    waves(400).to_csv(tmp_path / "mine.csv", index=False)
    task = make_task(recipe_of(tmp_path / "mine.csv", task={"horizons": [12, 41]}))
    with pytest.raises(ValueError, match=r"validation split has 40 steps, so no window of 41 fits"):
        task.stream("train", batch_size=4)
    make_task(recipe_of(tmp_path / "mine.csv", task={"horizons": [12, 40]})).stream("train", batch_size=4)


@pytest.mark.parametrize(
    ("head", "channels"), [("series", "independent"), ("series", "mixed"), ("series_tokens", "independent")]
)
def test_a_forecast_is_what_evaluation_scores(run, head, channels):
    """Of the same window: a table comes in its own units, the test split standardised with the training part."""
    recipe = recipe_of(run / "mine.csv", head, task={"channels": channels})
    task = make_task(recipe)
    model = make_model(recipe, task).eval()
    scored = task.roll(model, task.windows("test").collate([7]), 24)
    table = task.forecast(pd.read_csv(run / "mine.csv")[: 630 + 7], 24, model=model)
    for column, name in enumerate(("load", "wind")):
        own, mean, deviation = table[table["target"] == name], task.card["mean"][column], task.card["deviation"][column]
        expected = scored.quantiles.reshape(2, 24, 9)[column].double() * deviation + mean
        np.testing.assert_allclose(own[[f"{q / 10:g}" for q in range(1, 10)]], expected, atol=1e-4 * deviation)
        expected = scored.mean.reshape(2, 24)[column].double() * deviation + mean
        np.testing.assert_allclose(own["mean"], expected, atol=1e-4 * deviation)


@pytest.mark.parametrize("head", ["series", "series_tokens"])
def test_units_of_columns_that_training_did_not_have_are_their_own(run, head):
    """Kelvin or degrees: the forecast is the same, in other units."""
    recipe = recipe_of(run / "mine.csv", head)
    task = make_task(recipe)
    model = make_model(recipe, task).eval()
    degrees = waves(300, seed=4)[["time", "wind"]].set_axis(["time", "heat"], axis=1)
    kelvin = degrees.assign(heat=1.8 * degrees["heat"] + 1000)
    first, second = (task.forecast(table, 12, model=model)[["mean", "0.1", "0.9"]] for table in (degrees, kelvin))
    np.testing.assert_allclose(second, 1.8 * first + 1000, atol=1e-3)


def test_samples_come_in_the_units_of_the_table(run):
    recipe = recipe_of(run / "mine.csv", "series_tokens")
    task = make_task(recipe)
    pipe = zoo.Pipeline(make_model(recipe, task).eval(), task)
    drawn = pipe.sample(waves(300, seed=3), max_new=5, seed=0)
    given = task.prompt(waves(300, seed=3))
    standard = zoo.generate(pipe.model, given, max_new=5, seed=0)[0, :, 0, 0]
    assert drawn["value"].tolist() == pytest.approx(
        (standard * task.card["deviation"][0] + task.card["mean"][0]).tolist(), rel=1e-5
    )


def test_asking_for_more_steps_changes_none(run):
    pipe = zoo.pipeline(run / "run", device="cpu")
    first, longer = (pipe.task.forecast(waves(300, seed=5), horizon) for horizon in (20, 48))
    load = longer[longer["target"] == "load"]["mean"].to_numpy()[:20]
    np.testing.assert_allclose(first[first["target"] == "load"]["mean"], load, rtol=1e-5)


def test_a_forecast_does_not_see_later_rows(run):
    """Series "b" goes on for 100 hours after the end of "a": what it does then is nothing to "a"."""
    pipe = zoo.pipeline(run / "run", device="cpu")
    table = waves(400, ("a", "b"), seed=5).drop(range(300, 400)).reset_index(drop=True)
    later = (table["site"] == "b") & (table["time"] > table["time"][299])
    assert later.sum() == 100
    other = table.copy()
    other.loc[later, ["load", "wind"]] *= -7
    first, second = (pipe.task.forecast(rows, 48, columns=Columns(id="site")) for rows in (table, other))
    is_a = first["id"] == "a"
    pd.testing.assert_frame_equal(first[is_a], second[is_a])
    assert not np.isclose(first[~is_a]["mean"], second[~is_a]["mean"]).any()


@pytest.mark.parametrize(
    ("head", "channels"), [("series", "independent"), ("series", "mixed"), ("series_tokens", "independent")]
)
def test_an_evaluated_forecast_does_not_see_its_truth(run, head, channels):
    """A window of the test split holds what comes; with it and all after it altered the forecast is the same."""
    recipe = recipe_of(run / "mine.csv", head, task={"channels": channels})
    model = make_model(recipe, make_task(recipe)).eval()
    found, truths = [], []
    for begin in (700, 630 + 7, 630 + 7 - 1):
        task = make_task(recipe)
        (part,) = task.parts("test")
        values = part.panel.values.copy()
        values[begin:] = 3 - 7 * values[begin:]
        task._prepared["test"] = [replace(part, panel=replace(part.panel, values=values))]
        batch = task.windows("test").collate([7])
        found.append(task.roll(model, batch, 24))
        truths.append(batch.targets)
    assert not torch.isclose(truths[0], truths[1]).any()
    assert torch.equal(found[0].mean, found[1].mean)
    assert torch.equal(found[0].quantiles, found[1].quantiles)
    assert not torch.equal(found[0].mean, found[2].mean)  # the last step before it counts


@pytest.mark.parametrize(("freq", "said"), [("h", False), ("15min", True), ("D", True)])
def test_steps_of_another_frequency_than_trained_on_are_said(run, caplog, freq, said):
    table = waves(96).assign(time=pd.date_range("2024-01-01", periods=96, freq=freq))
    zoo.pipeline(run / "run", device="cpu").task.forecast(table, 3)
    assert ("these weights have learnt from series of 24" in caplog.text) == said


def test_what_a_forecast_begins_with_is_said(run):
    pipe = zoo.pipeline(run / "run", device="cpu")
    for wrong in ("mine.csv", [], ["a"], 3):
        with pytest.raises(ValueError, match="a forecast begins with a pandas DataFrame"):
            pipe.sample(wrong)


def test_known_covariates_and_calendar(tmp_path):
    table = waves(600).drop(columns="wind")
    table["promotion"] = (np.random.default_rng(0).random(600) < 0.3).astype(float)
    table["load"] += 30 * table["promotion"]
    table.to_csv(tmp_path / "shop.csv", index=False)
    recipe = recipe_of(
        tmp_path / "shop.csv",
        task={"calendar": True, "dataset": {"known": ["promotion"], "targets": ["load"]}},
        train={"steps": 150, "sample_every": 0},
    )
    train(recipe, tmp_path / "run")
    pipe = zoo.pipeline(tmp_path / "run", device="cpu")
    past = table[:576].copy()
    with pytest.raises(ValueError, match="has covariates for 0 steps to come, of 24"):
        pipe.task.forecast(past, 24)
    asked = table.copy()
    asked.loc[576:, "load"] = np.nan
    found = pipe.task.forecast(asked, 24)["mean"].to_numpy()
    truth = table["load"].to_numpy()[576:]
    assert np.corrcoef(found, truth)[0, 1] > 0.7
    # Covariates of the steps to come count, those after them do not.
    longer = table.copy()
    longer.loc[560:, "load"] = np.nan
    found = pipe.task.forecast(longer, 24)["mean"].to_numpy()
    for steps, same in ((slice(560, 583), False), (slice(584, 599), True)):
        other = longer.copy()
        other.loc[steps, "promotion"] = 1 - other.loc[steps, "promotion"]
        assert np.array_equal(pipe.task.forecast(other, 24)["mean"], found) == same


def test_zoo_sample_writes_table_and_plot(run, capsys):
    waves(400, seed=2).to_csv(run / "new.csv", index=False)
    words = ["sample", str(run / "run"), "--csv", str(run / "new.csv"), "--target", "load", "--horizon", "48"]
    assert cli.main([*words, "--out", str(run / "f.csv"), "--plot", str(run / "f.png")]) == 0
    table = pd.read_csv(run / "f.csv")
    assert len(table) == 48
    assert set(table["target"]) == {"load"}
    assert (run / "f.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert cli.main(words[:-2]) == 2
    assert "a forecast needs --horizon" in capsys.readouterr().err
    assert cli.main([*words[:-1], "0"]) == 2
    assert "horizon = 0" in capsys.readouterr().err
    assert cli.main([*words, "--out", "f.doc"]) == 2
    assert "accepted endings: .csv, .parquet" in capsys.readouterr().err
    assert cli.main(["sample", str(run / "run")]) == 2
    assert "--csv FILE" in capsys.readouterr().err


def test_a_task_alone_cannot_forecast(run):
    with pytest.raises(ValueError, match="a task alone cannot forecast"):
        make_task(recipe_of(run / "mine.csv")).forecast(waves(), 3)


def test_mixed_channels_want_the_same_columns(run, tmp_path):
    recipe = recipe_of(run / "mine.csv", task={"channels": "mixed"})
    task = make_task(recipe)
    task.attach(make_model(recipe, task).eval())
    assert len(task.forecast(waves(300), 30)) == 60
    with pytest.raises(ValueError, match=r"takes 2 values a step together \(load, wind\); series '' has 1: load"):
        task.forecast(waves(300), 30, columns=Columns(targets=["load"]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"predict": 30}, "predict = 30; it takes a multiple of patch = 24"),
        ({"horizons": [96, 48]}, r"horizons = \[96, 48\]"),
        ({"levels": [0.5, 0.2]}, r"levels = \[0.5, 0.2\]"),
        ({"context": 0}, "context = 0"),
        ({"ahead": -1}, "ahead, plots, calibrate and follow"),
        ({"follow": -0.1}, "ahead, plots, calibrate and follow"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        build(SeriesTask.Config, fields)


def test_a_horizon_longer_than_the_data(run):
    task = make_task(recipe_of(run / "mine.csv", task={"horizons": [200]}))
    with pytest.raises(ValueError, match=r"longest series has 70 steps, fewer than the shortest of task.horizons"):
        task.stream("test", batch_size=2)


@pytest.mark.gpu
@pytest.mark.parametrize("head", [{}, {"level": "last"}, {"output": {"name": "student_t"}}], ids=str)
def test_on_a_gpu_recorded_steps_are_the_plain_ones(tmp_path, head):
    waves().to_csv(tmp_path / "mine.csv", index=False)
    losses = []
    for graph in (False, True):
        layer = {
            "model": {"backbone": {"width": 32}, "head": {"name": "series", "highway": 96, "dropout": 0.2, **head}},
            "train": {"device": "cuda", "graph": graph, "steps": 20, "log_every": 1, "eval_every": 10},
        }
        run = tmp_path / f"graph={graph}"
        train(build(Recipe, recipe_of(tmp_path / "mine.csv"), layer), run)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([row[name] for row in rows for name in ("train/loss", "valid/mse") if name in row])
        assert len(losses[-1]) == 22
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
