"""Trains many settings of a series recipe and ranks them by their validation errors; the test split is never read.

    python scripts/series_grid.py series/etth1 --jobs 8 --axis task.patch=24,48 --axis train.optimizer.lr=5e-4,1e-3,2e-3
    python scripts/series_grid.py series/etth1 --try "task.ahead=26" --try "model.head.highway=0" --seeds 0,1
    python scripts/series_grid.py series/ettm1 train.steps=400 task.stride=4 --out grid.jsonl
    python scripts/series_grid.py series/m4_hourly --by wql --axis train.optimizer.lr=5e-4,1e-3

Axes are crossed; what `--try` names comes beside them, each over the words that all share, and the settings as they are
come first. A worker process trains one setting after another, so it imports and warms up once. Of each run the
evaluation with the least mean error counts, as `train.best` would keep it. Settings are ranked by the mean over seeds.
Evaluations roll means alone; weights go to a temporary folder.
"""

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import signal
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

SHARED = ["task.roll=point", "task.plots=0", "train.sample_every=0", "train.save_every=0"]
SHARED += ["train.best=''", "train.patience=0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("word", nargs="*", help="field=value that all settings share")
    parser.add_argument("--axis", action="append", default=[], metavar="FIELD=A,B,…", help="values to cross")
    parser.add_argument("--try", dest="tries", action="append", default=[], metavar="WORDS", help="one more setting")
    parser.add_argument("--by", default="mse", help="the error that ranks: mse, mae, mase, wql, crps")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="processes; one GPU takes 8 and more of these models")
    parser.add_argument("--out", type=Path, help="a .jsonl file that rows are added to; those that it has are skipped")
    args = parser.parse_intermixed_args()

    axes = [[f"{field}={value}" for value in values.split(",")] for field, values in map(split_word, args.axis)]
    settings = [list(words) for words in itertools.product(*axes)] + [words.split() for words in args.tries]
    known = read_rows(args.out)
    done = {(row["recipe"], row["setting"], row["seed"]) for row in known}
    jobs = [
        (args.recipe, args.word, setting, int(seed), args.by)
        for seed in args.seeds.split(",")
        for setting in ([[], *settings] if [] not in settings else settings)
        if (args.recipe, " ".join([*args.word, *setting]), int(seed)) not in done
    ]
    began = time.perf_counter()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and leaves no workers behind
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for row in pool.imap_unordered(run, jobs, chunksize=1):
            known.append(row)
            print(line(row, args.by), flush=True)
            if args.out is not None:
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    print(f"\n{len(jobs)} runs in {time.perf_counter() - began:.0f} s; mean over seeds, best first:")
    print(ranking([row for row in known if row["recipe"] == args.recipe], args.by))
    print(beside(args.recipe, args.word, args.by))


def split_word(word: str) -> tuple[str, str]:
    field, _, values = word.partition("=")
    return field, values


def run(job: tuple[str, list[str], list[str], int, str]) -> dict[str, Any]:
    """One training run; a row with its best evaluation, or with what it failed of."""
    recipe, shared, setting, seed, by = job
    row: dict[str, Any] = {"recipe": recipe, "setting": " ".join([*shared, *setting]), "seed": seed}
    began = time.perf_counter()
    try:
        row |= best_of(train(recipe, [*SHARED, *shared, *setting, f"train.seed={seed}"]), by)
    except Exception as error:  # one bad setting ends no grid
        row["error"] = f"{type(error).__name__}: {error}"
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def train(recipe: str, words: list[str]) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    from zoo.config import build, recipe_layers
    from zoo.train import Recipe, train

    silence = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stderr(silence),
        contextlib.redirect_stdout(silence),
    ):
        train(build(Recipe, *recipe_layers(recipe, words)), Path(folder) / "run")
        lines = (Path(folder) / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(text) for text in lines]


def best_of(rows: list[dict[str, Any]], by: str) -> dict[str, Any]:
    """step, mse, and mse_96 … of the evaluation with the least mean error over the horizons; all such means; and, in
    `others`, all that this evaluation found."""
    evaluations = [row for row in rows if any(name.startswith(f"valid/{by}_") for name in row)]
    best = min(evaluations, key=lambda row: mean_error(row, by))
    errors = {name.removeprefix("valid/"): value for name, value in best.items() if name.startswith(f"valid/{by}_")}
    curve = [round(mean_error(row, by), 4) for row in evaluations]
    others = {name.removeprefix("valid/"): value for name, value in best.items() if name.startswith("valid/")}
    return {"step": best["step"], by: mean_error(best, by), **errors, "curve": curve, "others": others}


def mean_error(row: dict[str, Any], by: str) -> float:
    errors = [value for name, value in row.items() if name.startswith(f"valid/{by}_")]
    return sum(errors) / len(errors)


def read_rows(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.exists():
        return []
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def line(row: dict[str, Any], by: str) -> str:
    found = " ".join(f"{row[name]:.4f}" for name in row if name.startswith(by)) or row.get("error", "")
    return f"{found}  step {row.get('step', '-')}  {row['seconds']:.0f} s  seed {row['seed']}  {row['setting']}"


def ranking(rows: list[dict[str, Any]], by: str) -> str:
    """A line a setting: mean over horizons and seeds, how far seeds are apart, each horizon, the steps of the best."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if by in row:
            groups[row["setting"]].append(row)
    lines = []
    for setting, own in sorted(groups.items(), key=lambda item: sum(r[by] for r in item[1]) / len(item[1])):
        names = [name for name in own[0] if name.startswith(by)]
        means = " ".join(f"{sum(row[name] for row in own) / len(own):.4f}" for name in names)
        apart = max(row[by] for row in own) - min(row[by] for row in own)
        lines.append(f"{means}  ±{apart / 2:.4f}  steps {[row['step'] for row in own]}  {setting or '(as it is)'}")
    return "\n".join(lines)


def beside(recipe: str, words: list[str], by: str) -> str:
    """The baselines on the same windows, in the same columns."""
    from zoo.config import build, recipe_layers
    from zoo.train import Recipe
    from zoo.train.recipe import make_task

    task = make_task(build(Recipe, *recipe_layers(recipe, words)))
    errors: dict[str, list[float]] = defaultdict(list)
    for name, value in task.baselines("valid").items():
        baseline, _, metric = name.partition("/")
        if metric.startswith(f"{by}_"):
            errors[baseline].append(value)
    return "\n".join(
        f"{sum(values) / len(values):.4f} {' '.join(f'{value:.4f}' for value in values)}  {baseline} (no model)"
        for baseline, values in errors.items()
    )


if __name__ == "__main__":
    main()
