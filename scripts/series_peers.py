"""Trains a series recipe with several mixers and seeds and scores each run on the test split, every window.

    python scripts/series_peers.py series/etth1 --jobs 8 --out peers.jsonl
    python scripts/series_peers.py series/ettm1 --evaluate task.stride=1 --out peers.jsonl task.stride=8
    python scripts/series_peers.py series/etth1 --mixers gatedfwa --name wider --out peers.jsonl model.backbone.width=96

Words such as task.stride=8 belong to the training, those after --evaluate to the scoring alone; all mixers share them.
A worker process takes one run after another, so it imports and warms up once. A line of --out is a finished run: its
numbers, and what `zoo evaluate` writes beside each of them. Runs that the file has are skipped.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("word", nargs="*", help="field=value of the training")
    parser.add_argument("--mixers", nargs="+", default=["gatedfwa", "swa", "softmax", "gatedfwa_nsa"])
    parser.add_argument("--size", default="100k")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--evaluate", nargs="+", default=[], metavar="WORD", help="field=value of the scoring")
    parser.add_argument("--jobs", type=int, default=1, help="processes; one GPU takes 8 and more of these models")
    parser.add_argument("--name", default="", help="of these settings, in the rows")
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file that rows are added to")
    args = parser.parse_intermixed_args()

    known = read_rows(args.out)
    done = {(row["recipe"], row["settings"], row["mixer"], row["seed"]) for row in known if "error" not in row}
    jobs = [
        (args.recipe, args.name or " ".join(args.word), mixer, args.size, seed, args.word, args.evaluate)
        for seed in args.seeds
        for mixer in args.mixers
    ]
    jobs = [job for job in jobs if (job[0], job[1], job[2], job[4]) not in done]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for row in pool.imap_unordered(run, jobs, chunksize=1):
            known.append(row)
            print(line(row), flush=True)
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    print(table([row for row in known if row["recipe"] == args.recipe and "error" not in row]))


def run(job: tuple[str, str, str, str, int, list[str], list[str]]) -> dict[str, Any]:
    """One run, trained and scored; a row with its numbers, or with what it failed of."""
    recipe, name, mixer, size, seed, words, scoring = job
    row: dict[str, Any] = {"recipe": recipe, "settings": name, "mixer": mixer, "seed": seed}
    words = [f"model=series_{mixer}_{size}", f"train.seed={seed}", *words]
    row["commands"] = [f"zoo train {recipe} {' '.join(words)}", f"zoo evaluate RUN {' '.join(scoring)}".strip()]
    began = time.perf_counter()
    try:
        row |= train_and_score(recipe, words, scoring)
    except Exception as error:  # one bad run ends no comparison
        row["error"] = f"{type(error).__name__}: {error}"
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def train_and_score(recipe: str, words: list[str], scoring: list[str]) -> dict[str, Any]:
    from zoo.config import build, recipe_layers
    from zoo.evaluate import evaluate_run
    from zoo.train import Recipe, load_run, train

    silence = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stderr(silence),
        contextlib.redirect_stdout(silence),
    ):
        place = Path(folder) / "run"
        train(build(Recipe, *recipe_layers(recipe, words)), place)
        evaluate_run(place, overrides=scoring)
        rows = [json.loads(text) for text in (place / "results.jsonl").read_text(encoding="utf-8").splitlines()]
        parameters = sum(parameter.numel() for parameter in load_run(place)[2].parameters())
    facts = {name: value for name, value in rows[0].items() if name not in ("name", "value", "kind", "command", "run")}
    numbers: dict[str, dict[str, float]] = {"metric": {}, "baseline": {}}
    for row in rows:
        numbers[row["kind"]][row["name"]] = row["value"]
    return {"parameters": parameters, "values": numbers["metric"], "baselines": numbers["baseline"], "facts": facts}


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def headline(values: dict[str, float]) -> dict[str, float]:
    """Mean squared error over the horizons, and by horizon; of M4 its two scores."""
    names = [name for name in values if name == "mse" or name.startswith("mse_")]
    scores = [name for name in values if name.startswith(("mase_", "wql_"))]
    return {name: values[name] for name in (sorted(names, key=len) if "mse" in values else scores)}


def line(row: dict[str, Any]) -> str:
    if "error" in row:
        found = row["error"]
    else:
        found = " ".join(f"{name} {value:.4f}" for name, value in headline(row["values"]).items())
    return f"{row['recipe']} {row['mixer']} seed {row['seed']}: {found}  {row['seconds']:.0f} s  {row['settings']}"


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each mixer and settings: mean and sample standard deviation over seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["settings"], row["mixer"]].append(row)
    lines = []
    for (settings, mixer), own in groups.items():
        found = []
        for name in headline(own[0]["values"]):
            values = [row["values"][name] for row in own]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            found.append(f"{name} {statistics.mean(values):.4f} ± {spread:.4f}")
        lines.append(f"{mixer} ({len(own)} seeds, {own[0]['parameters']:,}): {', '.join(found)}  {settings}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
