"""scripts/series_grid.py and series_peers.py: what counts as the same run, what their tables bring together, and a grid
from end to end."""

import importlib.util
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd

SCRIPTS = Path(__file__).parents[3] / "scripts"


def script(name):
    sys.path.insert(0, str(SCRIPTS))  # as where a script lies is
    try:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPTS))
    return module


peers, grid, runs = (script(name) for name in ("series_peers", "series_grid", "series_runs"))


def asked(**changes):
    shared = {"recipe": "series/etth1", "name": "", "size": "100k", "seeds": [0, 1], "mixers": ["swa"]}
    return Namespace(**{**shared, "word": [], "evaluate": [], **changes})


def rows(args, mse):
    return [job | {"values": {"mse": mse}, "parameters": 7} for job in peers.missing(args, [])]


def test_only_the_same_run_is_skipped():
    known = rows(asked(word=["task.stride=8"]), 0.5)
    assert peers.missing(asked(word=["task.stride=8"]), known) == []
    assert [job["seed"] for job in peers.missing(asked(word=["task.stride=8"], seeds=[0, 1, 2]), known)] == [2]
    for changes in ({"size": "1m"}, {"evaluate": ["task.stride=1"]}, {"name": "a"}, {"mixers": ["softmax"]}):
        assert len(peers.missing(asked(word=["task.stride=8"], **changes), known)) == 2, changes
    named = rows(asked(name="a", word=["task.stride=8"]), 0.5)
    assert len(peers.missing(asked(name="a", word=["task.stride=4"]), named)) == 2
    failed = [row | {"error": "out of memory"} for row in known]
    assert len(peers.missing(asked(word=["task.stride=8"]), failed)) == 2


def test_the_table_averages_over_seeds_alone():
    small, large = rows(asked(), 0.5), rows(asked(size="1m"), 0.25)
    scored = rows(asked(evaluate=["task.stride=1"]), 0.125)
    assert peers.table([*small, *large, *scored]).splitlines() == [
        "swa (2 seeds, 7): mse 0.5000 ± 0.0000  100k",
        "swa (2 seeds, 7): mse 0.2500 ± 0.0000  1m",
        "swa (2 seeds, 7): mse 0.1250 ± 0.0000  100k --evaluate task.stride=1",
    ]


def grid_asked(**changes):
    shared = {"recipe": "series/etth1", "word": ["task.stride=8"], "axis": ["train.optimizer.lr=1e-3,2e-3"]}
    return Namespace(**{**shared, "tries": ["task.ahead=0 task.patch=8"], "seeds": "0,1", **changes})


def test_a_grid_crosses_its_axes_beside_the_settings_as_they_are():
    asked = [(job["setting"], job["seed"]) for job in grid.missing(grid_asked(), [])]
    settings = ["", "train.optimizer.lr=1e-3", "train.optimizer.lr=2e-3", "task.ahead=0 task.patch=8"]
    assert asked == [(f"task.stride=8 {setting}".strip(), seed) for seed in (0, 1) for setting in settings]


def test_a_grid_skips_what_it_has_evaluations_of():
    jobs = grid.missing(grid_asked(), [])
    known = [job | {"evaluations": [{"step": 1, "mse_24": 1.0}]} for job in jobs[:-1]]
    assert grid.missing(grid_asked(), known) == jobs[-1:]
    assert len(grid.missing(grid_asked(word=[]), known)) == len(jobs)
    failed = [job | {"error": "out of memory"} for job in jobs]
    of_old = [job | {"mse": 1.0, "others": {}} for job in jobs]
    assert grid.missing(grid_asked(), [*failed, *of_old]) == jobs


def test_a_run_is_ranked_by_its_best_evaluation_for_each_error():
    def row(setting, seed, *evaluations):
        names = ("step", "mse_24", "mse_36", "wql_24", "wql_36")
        found = [dict(zip(names, values, strict=True)) for values in evaluations]
        return {"setting": setting, "seed": seed, "seconds": 1.0, "evaluations": found}

    rows = [
        row("a", 0, (10, 1, 3, 0.5, 0.7), (20, 2, 4, 0.1, 0.3)),
        row("a", 1, (10, 2, 4, 0.5, 0.7), (20, 3, 5, 0.3, 0.5)),
        row("", 0, (10, 1, 1, 0.8, 0.8)),
        {"setting": "b", "seed": 0, "seconds": 1.0, "error": "ValueError: b"},
    ]
    assert grid.ranking(rows, "mse").splitlines() == [
        "1.0000 1.0000 1.0000  ±0.0000  steps [10]  (as it is)",
        "2.5000 1.5000 3.5000  ±0.5000  steps [10, 10]  a",
    ]
    assert grid.ranking(rows, "wql").splitlines() == [
        "0.3000 0.2000 0.4000  ±0.1000  steps [20, 20]  a",
        "0.8000 0.8000 0.8000  ±0.0000  steps [10]  (as it is)",
    ]
    assert grid.line(rows[0], "wql") == "0.2000 0.1000 0.3000  step 20  1 s  seed 0  a"
    assert grid.line(rows[-1], "wql") == "ValueError: b  1 s  seed 0  b"


def test_a_grid_from_end_to_end(tmp_path, monkeypatch, capsys):
    hours = np.arange(500)
    table = pd.DataFrame({"time": pd.date_range("2024-01-01", periods=500, freq="h")})
    table["load"] = np.sin(2 * np.pi * hours / 24) + 0.1 * np.random.default_rng(0).normal(size=500)
    table.to_csv(tmp_path / "mine.csv", index=False)
    words = ["task.dataset.name=series/csv", f"task.dataset.path={tmp_path / 'mine.csv'}", "task.horizons=[24, 36]"]
    words += ["task.context=48", "model.head.highway=48", "task.stride=8", "train.steps=4", "train.eval_every=2"]
    words += ["--out", str(tmp_path / "grid.jsonl")]
    command = [sys.executable, str(SCRIPTS / "series_grid.py"), "series/smoke", *words]
    command += ["--axis", "train.optimizer.lr=1e-3,none"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "\n3 runs in " in done.stdout
    rows = runs.read_rows(tmp_path / "grid.jsonl")
    assert [row["setting"].split()[-1] for row in rows if "error" in row] == ["train.optimizer.lr=none"]
    whole = [row["evaluations"] for row in rows if "error" not in row]
    assert [[evaluation["step"] for evaluation in run] for run in whole] == [[2, 4], [2, 4]]
    assert {"mse_24", "mse_36", "wql_24", "coverage_80_36"} <= set(whole[0][0])

    again = ["series_grid.py", "series/smoke", "--axis", "train.optimizer.lr=1e-3", "--by", "wql", *words]
    monkeypatch.setattr(sys, "argv", again)
    grid.main()
    assert runs.read_rows(tmp_path / "grid.jsonl") == rows
    printed = capsys.readouterr().out
    assert "0 runs in " in printed
    wql = min((evaluation["wql_24"] + evaluation["wql_36"]) / 2 for run in whole for evaluation in run)
    assert f"first:\n{wql:.4f} " in printed
    assert "linear (no model)" in printed
