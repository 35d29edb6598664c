"""The suite `smoke` as a person runs it: rows, table, page and plots; a row that is deleted comes back alone."""

import json

import pytest
from matplotlib.figure import Figure

from zoo import cli
from zoo.evaluate import report
from zoo.evaluate.plots import drawn_digest, plan
from zoo.evaluate.rows import read_rows

pytestmark = pytest.mark.timeout(900)  # well under a minute of work, on machines that may be busy


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["evaluate", "smoke"]) == 0
    return folder


def test_every_measurement_leaves_rows_that_say_how_they_came_about(smoke):
    rows = read_rows(smoke / "runs/results/smoke.jsonl")
    assert {row["measurement"] for row in rows} == {"scores", "curve", "positions", "lengths", "speed"}
    for row in rows:
        carried = {"fingerprint", "commit", "seed", "data", "hardware", "command", "evaluated_with", "settings"}
        assert carried <= row.keys(), row
        assert isinstance(row["value"], float | int)
        assert row["stacked"] == (row["experiment"] == "recall")
        assert ("trained_on" in row) == (row["measurement"] != "speed")  # which trains nothing
        if "trained_on" in row:
            cell = smoke / "runs/suites/smoke" / row["experiment"] / row["model"] / row["arm"]
            provenance = json.loads((cell / f"lr{row['lr']:g}-seed{row['seed']}/provenance.json").read_text())
            assert row["trained_on"] == [session["device"] for session in provenance["sessions"]]
    recall = [row for row in rows if row["experiment"] == "recall" and row["name"] == "accuracy"]
    assert len(recall) == 2 * 2 * 2 * 2  # models, arms, rates, seeds
    assert len({row["fingerprint"] for row in recall}) == 16
    assert {row["state_bytes"] for row in recall if row["model"] == "recall_swa_d32"} == {1280, 4352}
    sizes = {row["parameters"] for row in rows if row["experiment"] == "text" and row["measurement"] == "scores"}
    assert max(sizes) < 1.01 * min(sizes)
    windowed, whole = (
        {row["value"] for row in rows if row["name"] == "state_bytes" and row["model"] == model}
        for model in ("text_gatedfwa_1m", "text_softmax_1m")
    )
    assert len(windowed) == 1  # the lengths are above its window
    assert max(windowed) < min(whole)


def test_runs_that_begin_say_nothing_of_resuming(smoke):
    logs = list((smoke / "runs/suites/smoke").glob("text/*/*/log.txt"))
    assert len(logs) == 2 * 2  # models, seeds
    assert not any("nothing to resume" in log.read_text() for log in logs)


def test_the_page_and_the_plots_are_those_of_the_rows(smoke):
    out = smoke / "runs/results"
    rows = read_rows(out / "smoke.jsonl")
    page = (smoke / "runs/results.md").read_text()
    for plot in plan(rows):
        assert drawn_digest(out / plot.file) == plot.digest, plot.file
        assert f"(results/{plot.file})" in page
    assert "| model | arm | parameters |" in page
    assert "\n| --- | --- | ---: |" in page
    kinds = {plot.file.split(".")[-2] for plot in plan(rows)}
    assert kinds == {"state", "tokens", "position", "length", "speed"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(smoke)
        assert page == report.render({"smoke": rows}, type(out)("runs/results"))


def test_the_arms_of_a_plot_against_state_are_told_in_its_legend(smoke):
    (plot,) = (plot for plot in plan(read_rows(smoke / "runs/results/smoke.jsonl")) if plot.file.endswith("state.png"))
    plot.draw(figure := Figure(), plot.rows)
    (axes,) = figure.axes
    told = [text.get_text() for text in axes.get_legend().get_texts()]
    assert told == ["window-4", "window-16", "recall_gatedfwa_d32", "recall_swa_d32"]
    assert not axes.texts  # which would cover each other, and leave the frame


def test_a_deleted_row_comes_back_alone(smoke, monkeypatch):
    monkeypatch.chdir(smoke)
    path = smoke / "runs/results/smoke.jsonl"
    lines, page = path.read_text().splitlines(), (smoke / "runs/results.md").read_bytes()
    gone = next(i for i, line in enumerate(lines) if json.loads(line)["name"] == "accuracy_24x2")
    path.write_text("".join(line + "\n" for i, line in enumerate(lines) if i != gone) + '{"half a li')

    def trained(*_, **__):
        raise AssertionError("the run is there; nothing is to be trained")

    monkeypatch.setattr("zoo.evaluate.runner.train", trained)
    monkeypatch.setattr("zoo.train.sweeps.Stack.train_step", trained)
    measured = []
    real = __import__("zoo.evaluate.runner", fromlist=["as_rows"]).as_rows
    monkeypatch.setattr("zoo.evaluate.runner.as_rows", lambda *words: measured.append(words) or real(*words))
    assert cli.main(["evaluate", "smoke"]) == 0
    after = path.read_text().splitlines()
    assert after[:gone] + after[gone + 1 :] == lines[:gone] + lines[gone + 1 :]  # the others stay, to the letter
    old, new = json.loads(lines[gone]), json.loads(after[gone])
    assert len(measured) == 1
    assert new["value"] == pytest.approx(old["value"])
    assert {**new, "value": 0, "command": ""} == {**old, "value": 0, "command": ""}
    assert (smoke / "runs/results.md").read_bytes() == page
    assert cli.main(["evaluate", "smoke"]) == 0
    assert len(measured) == 1  # nothing is missing any more
