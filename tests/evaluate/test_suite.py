"""Suites: what they unfold into, crashes and going on, processes side by side, errors that name the field."""

import json
import queue
import random
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from zoo import cli, config, registry
from zoo.config import ConfigError, list_suites
from zoo.evaluate import find_suite, report, run_suite, runner
from zoo.evaluate.rows import group_of, in_order, is_complete, merge, read_rows
from zoo.evaluate.suite import fitting_mlp, parameter_count, read_suite
from zoo.evaluate.summary import lines, sections
from zoo.train import Recipe, Replica


def quiet(suite, tmp_path, **options):
    return run_suite(suite, out=tmp_path / "out", work=tmp_path / "work", **options)


@pytest.mark.parametrize("name", list_suites())
def test_every_suite_unfolds_into_recipes_that_fit(name):
    cells = find_suite(name).cells()
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        recipe = config.build(Recipe, *config.recipe_layers(cell.settings.recipe, list(cell.words)))
        assert recipe.model.name == cell.model
        assert cell.settings.published.keys() <= {f"{c.model}/{c.arm}".rstrip("/") for c in cells}


def test_every_registered_mixer_is_in_cross_domain_and_speed():
    for suite in ("cross_domain", "speed"):
        models = {cell.model for cell in find_suite(suite).cells()}
        assert {f"text_{mixer}_8m" for mixer in registry.mixers} <= models
    recall = {cell.model: parameter_count(cell.recipe) for cell in find_suite("cross_domain").cells(["recall-"])}
    assert {f"recall_{mixer}_d64" for mixer in registry.mixers} == recall.keys()
    assert max(recall.values()) < 1.02 * min(recall.values())


@pytest.mark.parametrize("data", ["wikitext2", "gutenberg"])
def test_the_gate_is_told_from_the_token_shift_on_text(data):
    """Windowed with and without a gate, and full, each with and without the shift, in one table at one size."""
    cells = [c for c in find_suite("cross_domain").cells() if (c.settings.section or c.experiment) == f"text-{data}"]
    assert len({(cell.model, cell.arm) for cell in cells}) == len(cells)
    found = {}
    for cell in cells:
        mixer = cell.recipe.model.config.backbone.mixer
        found.setdefault(mixer.name, {})[cell.arm] = mixer.config.token_shift if mixer.name != "baseconv" else None
    for gated in ("gatedfwa", "fox"):
        assert found[gated] == {"": True, "unshifted": False}
    for plain in ("swa", "softmax"):
        assert found[plain] == {"": False, "shifted": True}
    sizes = [parameter_count(cell.recipe) for cell in cells]
    assert max(sizes) < 1.02 * min(sizes)
    assert len({(cell.settings.recipe, *cell.settings.measure, *cell.settings.seeds) for cell in cells}) == 1
    assert sum("shift" in cell.settings.title for cell in cells) == len(registry.mixers.names())


@pytest.mark.parametrize("suite", ["cross_domain", "smoke"])
def test_every_length_that_is_measured_fits_the_recipe(suite):
    cells = [cell for cell in find_suite(suite).cells() if "lengths" in cell.settings.measure]
    for cell in cells:
        for length in cell.settings.lengths:
            word = config.dotted([f"{cell.settings.length_field}={length}"])
            assert config.build(Recipe, cell.recipe, word).task.config.context == length
    assert cells


def test_recall_holds_the_published_calibration():
    cells = {cell.arm: cell for cell in find_suite("recall").cells(["calibration/"])}
    windows = {arm: cell.recipe.model.config.backbone.layers()[1].config.window for arm, cell in cells.items()}
    assert windows == {"window-33": 33, "window-65": 65, "window-129": 129, "window-257": 257}  # Zoology's see one more
    recipe = cells["window-33"].recipe
    assert recipe.train.steps == 8 * 707  # the protocol's 32 are in the recipe
    assert config.build(Recipe, *config.recipe_layers("recall/mqar_b", [])).train.steps == 32 * 707
    assert sum(-(-n // 256) for _, _, n in recipe.task.config.dataset.config.train) == 707


@pytest.mark.parametrize("suite", ["recall", "cross_domain"])
def test_what_stands_in_one_table_was_tuned_alike(suite):
    tuned, members = {}, []
    for cell in find_suite(suite).cells():
        section = cell.settings.section or cell.experiment
        tuned.setdefault(section, set()).add((*cell.settings.rates, "seeds", *cell.settings.seeds))
        members.append((section, cell.model, cell.arm))
    assert {section: len(ways) for section, ways in tuned.items()} == dict.fromkeys(tuned, 1)
    assert len(set(members)) == len(members)
    if suite == "recall":
        mixers = {model for section, model, _ in members if section == "mixture"}
        assert mixers == {f"recall_{name}_d128" for name in ("softmax", "swa", "gatedfwa", "gatedfwa_nsa")}


def test_rows_table_and_published_values(suite, tmp_path):
    done = quiet(suite, tmp_path)
    assert done.failed == {}
    assert len(done.ran) == done.cells == 2
    rows = read_rows(done.rows)
    curve = [row for row in rows if row["measurement"] == "curve" and row["name"] == "valid/loss"]
    assert {(row["at"]["step"], row["at"]["tokens"]) for row in curve} == {(2, 64 * (16 + 24)), (4, 2 * 64 * (16 + 24))}
    assert "accuracy, published" in done.table
    assert "± " in done.table
    swa = [row for row in rows if row["model"] == "recall_swa_d32" and "published" in row]
    assert {row["name"] for row in swa} == {"accuracy"}
    again = quiet(suite, tmp_path)
    assert again.ran == []
    assert read_rows(done.rows) == rows


def test_a_cell_that_fails_is_told_and_the_others_go_on(suite, tmp_path, monkeypatch):
    real = runner.MEASURE["scores"]

    def breaks(run, settings, device):
        if "gatedfwa" in str(run):
            raise RuntimeError("a broken measurement")
        return real(run, settings, device)

    monkeypatch.setitem(runner.MEASURE, "scores", breaks)
    done = quiet(suite, tmp_path)
    assert list(done.failed) == ["tiny/recall_gatedfwa_d32"]
    assert "a broken measurement" in done.failed["tiny/recall_gatedfwa_d32"]
    assert {row["model"] for row in read_rows(done.rows)} == {"recall_swa_d32"}
    monkeypatch.setitem(runner.MEASURE, "scores", real)

    def trained(*_, **__):
        raise AssertionError("it was trained already")

    monkeypatch.setattr("zoo.train.sweeps.Stack.train_step", trained)
    done = quiet(suite, tmp_path)
    assert done.failed == {}
    assert done.ran == ["tiny/recall_gatedfwa_d32"]


def test_a_cell_whose_data_are_missing_is_told_and_the_others_go_on(suite, tmp_path, monkeypatch):
    """Its recipe cannot even be resolved: a model's size is that of its data's vocabulary or frequency."""
    path = Path(suite)
    monkeypatch.setenv("ZOO_DATA", str(tmp_path / "none"))
    absent = ["  absent:", "    recipe: series/etth1", "    same_size: series_softmax_100k"]
    path.write_text(path.read_text().replace("experiments:\n", "\n".join(["experiments:", *absent, ""])))
    done = quiet(suite, tmp_path, only=["absent", "swa"], dry_run=True)
    (name,) = done.failed
    assert "absent/" in name
    assert "DataMissing" in done.failed[name]
    assert done.ran == ["tiny/recall_swa_d32"]
    done = quiet(suite, tmp_path, only=["absent", "swa"])
    assert list(done.failed) == [name]
    assert {row["model"] for row in read_rows(done.rows)} == {"recall_swa_d32"}


def test_side_by_side_the_longest_begins(suite, tmp_path, monkeypatch):
    path = Path(suite)
    arms = [
        "arms:",
        "  short: [train.steps=2]",
        "  long: [train.steps=9]",
        "  wide: [train.steps=4,train.batch_size=99]",
    ]
    path.write_text(path.read_text().replace("seeds: [0, 1]", "seeds: [0]\n    " + "\n    ".join(arms)))
    orders = []
    monkeypatch.setattr(runner, "reports", lambda todo, jobs: orders.append([job.cell.arm for job in todo]) or [])
    for jobs in (1, 2):
        quiet(suite, tmp_path, only=["swa"], jobs=jobs)
    assert orders == [["short", "long", "wide"], ["long", "wide", "short"]]
    todo, _ = runner.lacking(find_suite("recall").cells(["lengths/recall_swa"]), [], tmp_path)
    assert [job.cell.arm for job in runner.longest_first(todo)][:2] == ["length-512", "length-256"]


def test_a_replica_has_the_recipe_that_train_would_be_given():
    for recipe in (find_suite("recall").cells()[0].recipe, find_suite("cross_domain").cells(["jsb/*swa"])[0].recipe):
        given = config.build(Recipe, recipe, {"train": {"seed": 3, "optimizer": {"lr": 0.25}}})
        assert config.to_dict(Replica(0.25, 3).recipe(recipe)) == config.to_dict(given)
        assert recipe.train.seed == 0


def test_a_cell_that_breaks_off_leaves_the_rows_of_what_it_measured(suite, tmp_path, monkeypatch):
    real = runner.MEASURE["scores"]

    def breaks(run, settings, device):
        if "seed1" in str(run):
            raise RuntimeError("the time is up")
        return real(run, settings, device)

    monkeypatch.setitem(runner.MEASURE, "scores", breaks)
    done = quiet(suite, tmp_path, only=["swa"])
    assert list(done.failed) == ["tiny/recall_swa_d32"]
    before = read_rows(done.rows)
    assert {row["seed"] for row in before} == {0}
    monkeypatch.setitem(runner.MEASURE, "scores", real)
    after = read_rows(quiet(suite, tmp_path, only=["swa"]).rows)
    assert after[: len(before)] == before
    assert {row["seed"] for row in after[len(before) :]} == {1}


def test_any_row_that_is_deleted_comes_back_to_the_same_page(suite, tmp_path):
    path = Path(suite)
    path.write_text(path.read_text().replace("seeds: [0, 1]", "seeds: [0, 1]\n    rates: [1.0e-3, 1.0e-2]"))
    done = quiet(suite, tmp_path)
    rows = read_rows(done.rows)
    page = report.render({"tiny": rows}, tmp_path / "out")
    assert page == done.page.read_text()
    assert len(rows) > 40
    for gone, row in enumerate(rows):
        left = rows[:gone] + rows[gone + 1 :]
        again = [other for other in rows if group_of(other) == group_of(row)]  # as a measurement gives them
        assert merge(left, again) == rows
        assert report.render({"tiny": merge(left, again)}, tmp_path / "out") == page, row
    random.Random(0).shuffle(shuffled := [*rows])
    done.rows.write_text("".join(json.dumps(row) + "\n" for row in shuffled))
    assert report.write_page(tmp_path / "out").read_text() == page


def test_a_changed_recipe_replaces_its_rows(suite, tmp_path):
    quiet(suite, tmp_path, only=["swa"])
    before = read_rows(tmp_path / "out/tiny.jsonl")
    changed = quiet(suite, tmp_path / "other", only=["swa"], overrides=["train.optimizer.weight_decay=0.3"])
    rows = read_rows(changed.rows)
    assert {row["fingerprint"] for row in rows}.isdisjoint(row["fingerprint"] for row in before)
    assert merge(before, rows) == rows


@pytest.mark.slow
def test_side_by_side_in_processes_gives_the_same_numbers(suite, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["zoo", "evaluate", "tiny"])
    alone, together = quiet(suite, tmp_path / "a"), quiet(suite, tmp_path / "b", jobs=2)
    assert together.failed == {}
    values = [
        {(row["model"], row["seed"], row["name"], json.dumps(row["at"])): row["value"] for row in read_rows(done.rows)}
        for done in (alone, together)
    ]
    assert values[0] == pytest.approx(values[1])
    assert {row["command"] for row in read_rows(together.rows)} == {"zoo evaluate tiny"}
    assert (tmp_path / "b/work/tiny/tiny/recall_swa_d32/log.txt").read_text()


def test_ctrl_c_starts_no_further_process(tmp_path, monkeypatch):
    """Two wait for their turn, one for the time after its start: all end at once."""
    started, begun = [], threading.Event()

    class Process:
        exitcode = 0

        def start(self):
            started.append(self)
            begun.set()

        def join(self):
            pass

    class Interrupted(queue.SimpleQueue):
        def get(self):
            begun.wait()
            raise KeyboardInterrupt

    class Pipe:
        def recv(self):
            raise EOFError

        def close(self):
            pass

    context = SimpleNamespace(Process=lambda **_: Process(), Pipe=lambda **_: (Pipe(), Pipe()))
    monkeypatch.setattr(runner.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(runner, "queue", SimpleNamespace(SimpleQueue=Interrupted))
    monkeypatch.setattr(runner.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runner, "START_APART", 5.0)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(runner.reports([SimpleNamespace(folder=tmp_path)] * 3, 3))
    assert len(started) == 1
    assert time.monotonic() - began < 5


def test_whatever_ends_a_job_is_told(monkeypatch):
    def ends(*_):
        raise SystemExit("an exit, not an error")

    monkeypatch.setattr(runner, "in_process", ends)
    told: list = []
    reader = threading.Thread(target=lambda: told.extend(runner.reports(["a", "b"], 2)), daemon=True)
    reader.start()
    reader.join(timeout=10)
    assert sorted(job for job, _ in told) == ["a", "b"]
    assert all(isinstance(ending, SystemExit) for _, ending in told)


def test_dry_run_says_what_is_missing(suite, tmp_path, capsys):
    assert cli.main(["evaluate", suite, "--dry-run", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "tiny/recall_swa_d32: lr0.01-seed0 (scores, curve), lr0.01-seed1 (scores, curve)" in shown
    assert "2 of 2 cells lack something" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("recipe: recall/smoke", "recipe: recall/smke"), "did you mean 'recall/smoke'"),
        (("recipe: recall/smoke", "seedz: [1]"), "did you mean 'seeds'"),
        (("[scores, curve]", "[scors]"), "did you mean 'scores'"),
        (("[scores, curve]", "[speed]"), "`lengths` is empty"),
        (("recall_swa_d32]", "recall_sw_d32]"), "no model fits 'recall_sw_d32'"),
        (("train.steps=4", "train.stps=4"), "did you mean 'steps'"),
        (("experiments:", "experimants:"), "unknown field 'experimants'"),
    ],
)
def test_mistakes_in_a_suite_are_named(suite, tmp_path, change, words):
    path = Path(suite)
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(ConfigError, match=words):
        quiet(suite, tmp_path)


def test_other_mistakes_are_named(suite, tmp_path, capsys):
    assert cli.main(["evaluate", "smok"]) == 2
    assert "smok is no run folder and no suite" in (error := capsys.readouterr().err)
    assert "smoke" in error
    with pytest.raises(ConfigError, match="no cell of suite 'tiny' fits fox; there are: tiny/recall_gatedfwa_d32"):
        quiet(suite, tmp_path, only=["fox"])
    with pytest.raises(ConfigError, match="--jobs 1"):
        run_suite("speed", out=tmp_path, jobs=2)


def test_equal_parameters():
    def recipe(model, *words):
        return config.build(Recipe, *config.recipe_layers("text/demo", [f"model.name={model}", *words]))

    wanted = recipe("text_softmax_1m")
    for name in ("text_gatedfwa_1m", "text_nsa_1m", "text_baseconv_1m"):
        width = fitting_mlp(recipe(name), wanted)
        assert width % 8 == 0
        fitted = recipe(name, f"model.backbone.mlp_width={width}")
        assert parameter_count(fitted) == pytest.approx(parameter_count(wanted), rel=0.01)
    with pytest.raises(ConfigError, match="cannot have the"):
        fitting_mlp(recipe("text_gatedfwa_1m"), recipe("text_softmax_1m", "model.backbone.width=8"))


def test_rows_without_a_rate_stand_before_those_with_one():
    names = ("experiment", "model", "arm", "lr", "seed", "measurement")
    groups = [("a", "m", "", 0.1, 0, "speed"), ("a", "m", "", None, None, "speed"), ("a", "m", "", 0.01, 1, "speed")]
    rows = [dict(zip(names, group, strict=True)) for group in groups]
    assert in_order(rows) == [rows[1], rows[2], rows[0]]


def test_completeness_is_seen_from_the_rows():
    row = {"experiment": "e", "model": "m", "arm": "", "lr": 0.1, "seed": 0, "measurement": "scores"}
    row |= {"at": {}, "settings": "x", "of": 2}
    rows = [{**row, "name": "a"}, {**row, "name": "b"}]
    group = ("e", "m", "", 0.1, 0, "scores")
    assert is_complete(rows, group, "x")
    assert not is_complete(rows[:1], group, "x")
    assert not is_complete([rows[0], rows[0]], group, "x")
    assert not is_complete(rows, group, "y")


def test_the_order_of_the_rows_decides_nothing_on_the_page():
    base = {"measurement": "scores", "name": "accuracy", "at": {}, "value": 0.5, "lr": 0.1, "seed": 0}
    rows = [
        {**base, "experiment": name, "section": name, "model": "m", "arm": arm}
        for name in ("b", "a")
        for arm in ("length-128", "length-64", "length-1024")
    ]
    assert list(sections(rows)) == ["a", "b"]
    assert [line.arm for line in lines(rows[:3])] == ["length-64", "length-128", "length-1024"]


def test_a_suite_may_be_a_file_and_keeps_its_name(suite):
    assert read_suite(Path(suite)).name == find_suite(suite).name == "tiny"
    assert [r.name for r in find_suite(suite).cells()[0].replicas()] == [Replica(0.01, s).name for s in (0, 1)]
