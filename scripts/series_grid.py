"""Trains many settings of a series recipe and ranks them by their validation errors; the test split is never read.

    python scripts/series_grid.py series/etth1 --jobs 8 --axis task.patch=24,48 --axis train.optimizer.lr=5e-4,1e-3,2e-3
    python scripts/series_grid.py series/etth1 --try "task.ahead=26" --try "model.head.highway=0" --seeds 0,1
    python scripts/series_grid.py series/ettm1 train.steps=400 task.stride=4 --out grid.jsonl
    python scripts/series_grid.py series/m4_hourly --by wql --axis train.optimizer.lr=5e-4,1e-3

Axes are crossed; what `--try` names comes beside them, each over the words that all share, and the settings as they are
come first. Of each run the evaluation with the least mean error counts, as `train.best` would keep it. Settings are
ranked by the mean over seeds. Evaluations roll means alone; weights go to a temporary folder.

A line of --out is a run with all its evaluations. Runs that the file has are skipped, and ranked by whichever error
--by now names.
"""

import argparse
import itertools
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from series_runs import Row, quiet_place, read_rows, rows_of, timed, trained

SHARED = ["task.roll=point", "task.plots=0", "train.sample_every=0", "train.save_every=0"]
SHARED += ["train.best=''", "train.patience=0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("word", nargs="*", help="field=value that all settings share")
    parser.add_argument("--axis", action="append", default=[], metavar="FIELD=A,B,…", help="values to cross")
    parser.add_argument("--try", dest="tries", action="append", default=[], metavar="WORDS", help="one more setting")
    parser.add_argument("--by", default="mse", choices=("mse", "mae", "mase", "wql", "crps"), help="what ranks")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="processes; one GPU takes 8 and more of these models")
    parser.add_argument("--out", type=Path, help="a .jsonl file that rows are added to; those that it has are skipped")
    args = parser.parse_intermixed_args()

    known = read_rows(args.out)
    jobs = missing(args, known)
    began = time.perf_counter()
    for row in rows_of(run, jobs, args.jobs, args.out):
        known.append(row)
        print(line(row, args.by), flush=True)
    print(f"\n{len(jobs)} runs in {time.perf_counter() - began:.0f} s; mean over seeds, best first:")
    print(ranking([row for row in known if row["recipe"] == args.recipe], args.by))
    print(beside(args.recipe, args.word, args.by))


def missing(args: argparse.Namespace, known: list[Row]) -> list[Row]:
    """The runs that are asked for and not among the rows."""
    axes = [[f"{field}={value}" for value in values.split(",")] for field, values in map(split_word, args.axis)]
    settings = [list(words) for words in itertools.product(*axes)] + [words.split() for words in args.tries]
    done = {identity(row) for row in known if "evaluations" in row}
    lists = [[*args.word, *setting] for setting in ([[], *settings] if [] not in settings else settings)]
    jobs = [
        {"recipe": args.recipe, "setting": " ".join(words), "words": words, "seed": int(seed)}
        for seed in args.seeds.split(",")
        for words in lists
    ]
    return [job for job in jobs if identity(job) not in done]


def identity(row: Row) -> tuple[Any, ...]:
    return row["recipe"], row["setting"], row["seed"]


def split_word(word: str) -> tuple[str, str]:
    field, _, values = word.partition("=")
    return field, values


def run(job: Row) -> Row:
    """One training run; a row with its evaluations, or with what it failed of."""
    words = [*SHARED, *job["words"], f"train.seed={job['seed']}"]
    return timed(job, lambda: {"evaluations": evaluations(job["recipe"], words)})


def evaluations(recipe: str, words: Sequence[str]) -> list[Row]:
    """step, mse_96 and all else that each evaluation found."""
    with quiet_place() as place:
        trained(recipe, words, place)
        rows = read_rows(place / "metrics.jsonl")
    found = [
        {name.removeprefix("valid/"): value for name, value in row.items() if name.startswith("valid/")} for row in rows
    ]
    return [{"step": row["step"]} | values for row, values in zip(rows, found, strict=True) if values]


def best_of(row: Row, by: str) -> Row | None:
    """Of a row's evaluations the one with the least mean error over the horizons; None where none has this error."""
    measured = [evaluation for evaluation in row.get("evaluations", ()) if errors_of(evaluation, by)]
    return min(measured, key=lambda evaluation: mean(errors_of(evaluation, by)), default=None)


def errors_of(evaluation: Row, by: str) -> list[float]:
    """By horizon, the shortest first."""
    return [value for name, value in evaluation.items() if name.startswith(f"{by}_")]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def line(row: Row, by: str) -> str:
    best = best_of(row, by)
    if best is None:
        found = row.get("error", f"no evaluation has {by}")
    else:
        errors = errors_of(best, by)
        found = " ".join(f"{value:.4f}" for value in (mean(errors), *errors)) + f"  step {best['step']}"
    return f"{found}  {row['seconds']:.0f} s  seed {row['seed']}  {row['setting']}"


def ranking(rows: list[Row], by: str) -> str:
    """A line a setting: mean over horizons and seeds, how far seeds are apart, each horizon, the steps of the best."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        best = best_of(row, by)
        if best is not None:
            groups[row["setting"]].append(best)
    found = []
    for setting, own in groups.items():
        errors = [errors_of(best, by) for best in own]  # by seed, by horizon
        means = [mean(seed) for seed in errors]
        columns = " ".join(f"{value:.4f}" for value in (mean(means), *map(mean, zip(*errors, strict=True))))
        apart = max(means) - min(means)
        steps = [best["step"] for best in own]
        found.append((mean(means), f"{columns}  ±{apart / 2:.4f}  steps {steps}  {setting or '(as it is)'}"))
    return "\n".join(text for _, text in sorted(found))


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
        f"{' '.join(f'{value:.4f}' for value in (mean(values), *values))}  {baseline} (no model)"
        for baseline, values in errors.items()
    )


if __name__ == "__main__":
    main()
