"""Trains a series recipe with several mixers and seeds and scores each run on the test split, every window.

    python scripts/series_peers.py series/etth1 --jobs 8 --out peers.jsonl
    python scripts/series_peers.py series/ettm1 --evaluate task.stride=1 --out peers.jsonl task.stride=8
    python scripts/series_peers.py series/etth1 --mixers gatedfwa --name wider --out peers.jsonl model.backbone.width=96

Words such as task.stride=8 belong to the training, those after --evaluate to the scoring alone; all mixers share them.
A line of --out is a finished run: its numbers, and what `zoo evaluate` writes beside each of them. Runs that the file
has are skipped; another --size, another word of the training or of the scoring makes another run.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

from series_runs import Row, quiet_place, read_rows, rows_of, timed, trained

SETTINGS = ("recipe", "settings", "mixer", "size", "words", "scoring")  # of a run, but for its seed


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
    for row in rows_of(run, missing(args, known), args.jobs, args.out):
        known.append(row)
        print(line(row), flush=True)
    print(table([row for row in known if row["recipe"] == args.recipe and "error" not in row]))


def missing(args: argparse.Namespace, known: list[Row]) -> list[Row]:
    """The runs that are asked for and not among the rows: each what identifies it, as its row says it."""
    shared = {"recipe": args.recipe, "settings": args.name or " ".join(args.word), "size": args.size}
    shared |= {"words": args.word, "scoring": args.evaluate}
    jobs = [shared | {"mixer": mixer, "seed": seed} for seed in args.seeds for mixer in args.mixers]
    done = {identity(row, *SETTINGS, "seed") for row in known if "error" not in row}
    return [job for job in jobs if identity(job, *SETTINGS, "seed") not in done]


def identity(row: Row, *names: str) -> str:
    return json.dumps([row.get(name) for name in names])  # rows of old lack some


def run(job: Row) -> Row:
    """One run, trained and scored; a row with its numbers, or with what it failed of."""
    recipe, scoring = job["recipe"], job["scoring"]
    words = [f"model=series_{job['mixer']}_{job['size']}", f"train.seed={job['seed']}", *job["words"]]
    commands = [f"zoo train {recipe} {' '.join(words)}", f"zoo evaluate RUN {' '.join(scoring)}".strip()]
    return timed(job | {"commands": commands}, lambda: train_and_score(recipe, words, scoring))


def train_and_score(recipe: str, words: list[str], scoring: list[str]) -> Row:
    from zoo.evaluate import evaluate_run
    from zoo.train import load_run

    with quiet_place() as place:
        trained(recipe, words, place)
        evaluate_run(place, overrides=scoring)
        rows = read_rows(place / "results.jsonl")
        parameters = sum(parameter.numel() for parameter in load_run(place)[2].parameters())
    facts = {name: value for name, value in rows[0].items() if name not in ("name", "value", "kind", "command", "run")}
    numbers: dict[str, dict[str, float]] = {"metric": {}, "baseline": {}}
    for row in rows:
        numbers[row["kind"]][row["name"]] = row["value"]
    return {"parameters": parameters, "values": numbers["metric"], "baselines": numbers["baseline"], "facts": facts}


def headline(values: dict[str, float]) -> dict[str, float]:
    """Mean squared error over the horizons, and by horizon; of M4 its two scores."""
    names = [name for name in values if name == "mse" or name.startswith("mse_")]
    scores = [name for name in values if name.startswith(("mase_", "wql_"))]
    return {name: values[name] for name in (sorted(names, key=len) if "mse" in values else scores)}


def line(row: Row) -> str:
    if "error" in row:
        found = row["error"]
    else:
        found = " ".join(f"{name} {value:.4f}" for name, value in headline(row["values"]).items())
    return f"{row['recipe']} {row['mixer']} seed {row['seed']}: {found}  {row['seconds']:.0f} s  {label(row)}"


def label(row: Row) -> str:
    """Size, name and words of a row."""
    words = [] if row["settings"] == " ".join(row.get("words", ())) else row.get("words", ())
    scoring = ["--evaluate", *row["scoring"]] if row.get("scoring") else []
    return " ".join(filter(None, (row.get("size", ""), row["settings"], *words, *scoring)))


def table(rows: list[Row]) -> str:
    """A line for each mixer, size and settings: mean and sample standard deviation over seeds."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[identity(row, *SETTINGS)].append(row)
    lines = []
    for own in groups.values():
        found = []
        for name in headline(own[0]["values"]):
            values = [row["values"][name] for row in own]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            found.append(f"{name} {statistics.mean(values):.4f} ± {spread:.4f}")
        facts = f"{len(own)} seeds, {own[0]['parameters']:,}"
        lines.append(f"{own[0]['mixer']} ({facts}): {', '.join(found)}  {label(own[0])}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
