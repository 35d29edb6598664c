"""The `zoo` command.

Every sub-command is a function from parsed words to an exit code; heavy modules load inside it, so `zoo --help` is
instant. Errors that a user can mend are one line, no traceback; ZOO_DEBUG=1 shows it.
"""

import argparse
import difflib
import fnmatch
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from zoo.registry import nearest

EXAMPLES = """examples:
  zoo doctor                                        what this machine will run, and why
  zoo list "text_*"                                 names of model sizes
  zoo train text/demo                               train a recipe into runs/text-demo
  zoo train text/demo train.steps=600 --resume      go on, for longer
  zoo train text/demo --nproc 4                     on four GPUs, or four processes of a CPU
  zoo evaluate runs/text-demo                       score the held-out split
  zoo evaluate "text_*" --pretrained                do published numbers come back from their weights?
  zoo evaluate smoke                                bring a suite of comparisons up to date
  zoo sample runs/text-demo --prompt "def "         write text, as it is drawn
  zoo sample runs/image-mnist --class 3 --out threes.png
  zoo sample runs/audio-fsdd_codes --class 7 --seconds 2 --out seven.wav
  zoo sample runs/series-etth1 --csv mine.csv --target load --horizon 168 --out forecast.csv --plot forecast.png
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser, commands = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0][:1] != "-" and words[0] not in commands:
        parser.error(f"{words[0]!r} is no command{nearest(words[0], commands)}")
    args, rest = parser.parse_known_args(words)
    if rest and not (hasattr(args, "override") and all("=" in word and word[0] != "-" for word in rest)):
        commands[args.command].error(unrecognized(args.command, rest, commands[args.command]))
    if rest:  # argparse takes positional words in one place only; overrides may also follow the options
        args.override += rest
    try:
        if getattr(args, "nproc", 1) > 1 and "RANK" not in os.environ:
            return run_on_ranks(args.nproc, words)
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `zoo list | head`
        sys.stderr.close()
        return 0
    except Exception as error:
        if os.environ.get("ZOO_DEBUG") == "1" or not is_users_to_mend(error):
            raise
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"zoo {args.command}{rank}: {error}", file=sys.stderr)
        return 2


MEANT = {  # words that newcomers try, and what they are here
    "train": {"--batch-size": "train.batch_size=", "--device": "train.device=", "--steps": "train.steps="},
    "sample": {"--length": "--max-new", "--max-tokens": "--max-new", "--n": "--count"},
}


def unrecognized(command: str, rest: Sequence[str], parser: argparse.ArgumentParser) -> str:
    options = [option for action in parser._actions for option in action.option_strings]
    first = next((word.partition("=")[0] for word in rest if word.startswith("-")), rest[0])
    known = MEANT.get(command, {})
    meant = [known[first]] if first in known else difflib.get_close_matches(first, options, n=1)
    return f"unrecognized arguments: {' '.join(rest)}" + (f"; did you mean {meant[0]!r}?" if meant else "")


def is_users_to_mend(error: Exception) -> bool:
    """Wrong words, files and fields, rather than a fault of the program."""
    from zoo.registry import MissingExtra, Shadowed, UnknownName

    mendable: tuple[type[Exception], ...] = (UnknownName, Shadowed, MissingExtra, OSError, ValueError)
    if (training := sys.modules.get("zoo.train")) is not None:  # not imported for a mistyped name: it brings torch
        mendable += (training.Diverged, training.NonFinite)
    return isinstance(error, mendable)


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of its commands by name."""
    parser = argparse.ArgumentParser(
        prog="zoo", description="GatedFWA zoo", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", allow_abbrev=False, help="train a recipe")
    train.add_argument("recipe", help="a name under configs/, such as text/demo, or a path to a YAML file")
    train.add_argument(
        "override", nargs="*", default=[], help="field=value, such as train.steps=100 or model.backbone.depth=2"
    )
    train.add_argument("--run", dest="folder", type=Path, help="where the run lives (default: runs/<recipe>)")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of that folder")
    train.add_argument("--allow-changes", action="store_true", help="resume although the recipe has changed")
    train.add_argument("--nproc", type=int, default=1, help="processes on this machine; on a GPU each its own")
    train.add_argument("--profile", action="store_true", help="trace a few steps; a table of where their time goes")
    train.set_defaults(run=run_train)

    evaluate = commands.add_parser("evaluate", allow_abbrev=False, help="score a run, or bring a suite up to date")
    evaluate.add_argument("what", metavar="WHAT", help="a run folder, or a suite (zoo list --kind suites)")
    evaluate.add_argument("--split", choices=["test", "valid"], help="test (default), valid")
    evaluate.add_argument("--batch-size", type=int, help="default: train.eval_batch_size, or 16; or that of the card")
    evaluate.add_argument("--device", help="cpu, cuda; default: cuda where there is one")
    evaluate.add_argument("--no-ema", action="store_true", help="take the raw weights, not their average")
    evaluate.add_argument("--nproc", type=int, default=1, help="processes on this machine that share the split")
    evaluate.add_argument(
        "--pretrained",
        action="store_true",
        help="WHAT names published weights, such as 'text_*': are their numbers the published ones?",
    )
    evaluate.add_argument("--harness", metavar="TASKS", help="a text run on tasks of lm-evaluation-harness, a,b,c")
    suite = evaluate.add_argument_group("of suites")
    suite.add_argument(
        "--out", type=Path, default=Path("runs/results"), help="folder for rows and plots; page beside it"
    )
    suite.add_argument("--jobs", type=int, default=1, help="cells at once, each in a process of its own")
    suite.add_argument("--only", action="append", default=[], metavar="PATTERN", help="cells whose name fits")
    suite.add_argument("--dry-run", action="store_true", help="say what is missing, and do nothing")
    evaluate.add_argument(
        "override", nargs="*", default=[], help="fields of the recipe to change, such as task.stride=64"
    )
    evaluate.set_defaults(run=run_evaluate)

    sample = commands.add_parser("sample", allow_abbrev=False, help="generate from a run or from published weights")
    sample.add_argument("model", metavar="RUN|NAME", help="a run folder, or published weights: zoo list --pretrained")
    sample.add_argument("--prompt", action="append", default=[], help="text to continue; given more than once: a batch")
    sample.add_argument("--class", dest="label", help="of what to draw, by name or number")
    sample.add_argument("--count", type=int, help="how many samples (default: the domain's)")
    sample.add_argument(
        "--given", type=Path, metavar="FILE", help="what to complete: an image whose upper half is kept, a sound"
    )
    sample.add_argument("--out", type=Path, metavar="FILE", help="where to write, such as grid.png, forecast.csv")
    sample.add_argument(
        "--guidance", type=float, default=1.0, help="towards the class, classifier-free (default 1: none)"
    )
    sample.add_argument("--max-new", type=int, help="elements to add (default: 256 of text, the rest of an image)")
    sample.add_argument("--seconds", type=float, help="of sound or music, in place of --max-new")
    sample.add_argument("--temperature", type=float, help="default 0.8 for text, 1 else")
    sample.add_argument("--top-k", type=int, default=0)
    sample.add_argument("--top-p", type=float, default=1.0)
    sample.add_argument("--min-p", type=float, default=0.0)
    sample.add_argument("--repetition-penalty", type=float, default=1.0)
    sample.add_argument("--seed", type=int)
    sample.add_argument(
        "--stop", action="append", default=[], help="end before this string; may be given more than once"
    )
    sample.add_argument("--device", help="cpu, cuda; default: cuda where there is one")
    table = sample.add_argument_group("forecasts of a table")
    table.add_argument("--csv", type=Path, metavar="FILE", help="a .csv or .parquet table of series to forecast")
    table.add_argument("--horizon", type=int, help="steps to forecast")
    table.add_argument("--target", action="append", default=[], help="a column to forecast (default: all others)")
    table.add_argument("--known", action="append", default=[], help="a covariate known ahead, with its rows to come")
    table.add_argument("--time", default="", help="the column of time stamps (default: found)")
    table.add_argument("--id", default="", help="the column that names the series of a long table")
    table.add_argument("--frequency", default="", help="of the steps: h, 15min, D, MS (default: inferred)")
    table.add_argument("--plot", type=Path, metavar="FILE", help="a picture of history, median and bands")
    sample.set_defaults(run=run_sample)

    listing = commands.add_parser("list", allow_abbrev=False, help="names that zoo knows")
    listing.add_argument("pattern", nargs="?", default="*", help='shell pattern, such as "text_*"')
    listing.add_argument(
        "--kind", choices=["models", "recipes", "suites", "mixers", "tasks", "datasets"], default="models"
    )
    listing.add_argument(
        "--pretrained", action="store_true", help="published weights, where they are and what made them"
    )
    listing.set_defaults(run=run_list)

    publish = commands.add_parser("publish", allow_abbrev=False, help="make weights with a model card out of a run")
    publish.add_argument("model", metavar="RUN", type=Path, help="a run folder")
    publish.add_argument("--tag", required=True, help="the weights' name becomes <model>.<tag>")
    publish.add_argument(
        "--about", required=True, type=Path, metavar="FILE", help="licences, data, limits, peers (YAML)"
    )
    publish.add_argument("--out", type=Path, help="folder for the weights (default: weights/)")
    publish.add_argument("--table", type=Path, help="where their row goes (default: the domain's weights.yaml)")
    publish.add_argument("--split", default="test", choices=["test", "valid"], help="that is evaluated")
    publish.add_argument("--batch-size", type=int, default=16)
    publish.add_argument("--device", help="cpu, cuda; default: cuda where there is one")
    publish.set_defaults(run=run_publish)

    push = commands.add_parser(
        "push", allow_abbrev=False, help="upload published weights to the hub, and pin them there"
    )
    push.add_argument("name", metavar="NAME", help="published weights: zoo list --pretrained")
    push.add_argument("repository", metavar="OWNER/REPOSITORY")
    push.set_defaults(run=run_push)

    pull = commands.add_parser("pull", allow_abbrev=False, help="fetch published weights from the hub into the cache")
    pull.add_argument("name", metavar="NAME", nargs="+", help="published weights, or patterns of their names")
    pull.set_defaults(run=run_pull)

    bench = commands.add_parser("bench", allow_abbrev=False, help="measure the kernels beside their peers, on a GPU")
    bench.add_argument("what", choices=["kernels"])
    bench.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder for bench.csv, bench.json and bench.png"
    )
    bench.add_argument("--rounds", type=int, default=3, help="processes to measure in (default 3)")
    bench.add_argument("--peers", nargs="+", metavar="NAME", help="some of the peers; all by default")
    bench.add_argument(
        "--shapes",
        nargs="+",
        metavar="B,H,T,D,W[,G[,DOC]]",
        help="such as 4,16,16384,64,512; G key/value heads, documents of DOC tokens",
    )
    bench.add_argument(
        "--tune",
        nargs="?",
        choices=["all", "window", "ring"],
        const="all",
        help="time candidate tiles instead (all, or those of one kernel), and print rows for the tables",
    )
    bench.set_defaults(run=run_bench)

    doctor = commands.add_parser(
        "doctor", allow_abbrev=False, help="device, versions, and which back end each op takes"
    )
    doctor.add_argument("--verbose", action="store_true", help="each operator, also where all take the same")
    doctor.set_defaults(run=run_doctor)
    return parser, commands.choices


# ---------------------------------------------------------------------------------------------------------------------


def run_train(args: argparse.Namespace) -> int:
    from zoo.config import build, recipe_layers

    layers = recipe_layers(args.recipe, args.override)  # a mistyped recipe is told before torch is imported
    from zoo.train import Recipe, train

    recipe = build(Recipe, *layers)
    is_file = args.recipe.endswith((".yaml", ".yml"))
    folder = args.folder or Path("runs") / (Path(args.recipe).stem if is_file else args.recipe.replace("/", "-"))
    train(recipe, folder, resume=args.resume, allow_changes=args.allow_changes, profile=args.profile)
    return 0


def run_on_ranks(count: int, words: Sequence[str]) -> int:
    """This very command in `count` processes, as torchrun would start it."""
    from zoo.train.launch import launch

    return launch(count, [sys.executable, "-P", "-m", "zoo.cli", *words])


def run_evaluate(args: argparse.Namespace) -> int:
    from zoo.config import list_suites

    if args.pretrained:
        return run_repeat(args)
    if not Path(args.what).is_dir() and (args.what in list_suites() or args.what.endswith((".yaml", ".yml"))):
        return run_suite(args)
    if not Path(args.what).exists() and "/" not in args.what:
        if is_model(args.what):
            raise ValueError(f"{args.what} is a model: for its published weights add --pretrained")
        raise FileNotFoundError(f"{args.what} is no run folder and no suite{nearest(args.what, list_suites())}")
    expect_run(args.what)
    from zoo.evaluate import evaluate_run

    if args.harness:
        from zoo.evaluate.harness import run_harness

        print(run_harness(Path(args.what), args.harness.split(","), device=args.device, ema=not args.no_ema).table())
        return 0
    scores = evaluate_run(
        Path(args.what),
        split=args.split or "test",
        batch_size=args.batch_size,
        device=args.device,
        ema=not args.no_ema,
        overrides=args.override,
    )
    if scores is not None:  # with several ranks, it is the first that speaks
        print(scores.table())
    return 0


def is_model(name: str) -> bool:
    """Whether a name is that of a model, or of published weights of one, <model>.<tag>."""
    from zoo import registry

    return name.partition(".")[0] in registry.models


def expect_run(name: str) -> None:
    """Raises FileNotFoundError where no folder is called so, before torch is imported."""
    from zoo.config import list_recipes

    if Path(name).exists():
        return
    if name in list_recipes():
        run = name.replace("/", "-")
        raise FileNotFoundError(f"{name} is a recipe: train it first (zoo train {name}); then runs/{run} is its run")
    raise FileNotFoundError(f"{name} is no run: there is no such folder")


def run_repeat(args: argparse.Namespace) -> int:
    from zoo.evaluate import repeat

    if args.split or args.override or args.no_ema or args.harness or args.nproc > 1:
        raise ValueError(
            "published numbers are measured as their card says; beside --pretrained go --device, --batch-size"
        )
    missed = []
    for name in names_of_weights([args.what]):
        print(name)
        for number in repeat(name, device=args.device, batch_size=args.batch_size):
            print(number.line())
            missed += [] if number.holds else [f"{name}: {number.name}"]
    if missed:
        print(f"{len(missed)} numbers do not hold: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


def names_of_weights(patterns: Sequence[str]) -> list[str]:
    """Raises FileNotFoundError for a pattern that no published weights fit."""
    from zoo.weights import find, weights

    return [name for pattern in patterns for name in (weights.names(pattern) or [find(pattern).name])]


def run_suite(args: argparse.Namespace) -> int:
    import logging

    from zoo.evaluate import run_suite

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    done = run_suite(
        args.what, out=args.out, jobs=args.jobs, only=args.only, overrides=args.override, dry_run=args.dry_run
    )
    print(done.table or "nothing is missing")
    if args.dry_run:
        print(f"{len(done.ran)} of {done.cells} cells lack something")
        return 0
    print(f"{len(done.ran)} of {done.cells} cells lacked something; rows: {done.rows}; page: {done.page}")
    for name, why in done.failed.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    return 1 if done.failed else 0


def run_sample(args: argparse.Namespace) -> int:
    if not is_model(args.model):
        expect_run(args.model)
    from tqdm import tqdm

    from zoo.generation import Sampling
    from zoo.pipelines import pipeline
    from zoo.task import Request

    pipe = pipeline(args.model, device=args.device)
    if args.csv is not None:
        return run_forecast(pipe, args)
    asked = pipe.task.ask(Request(args.prompt, args.label, args.count, args.given))
    if args.out is not None and args.out.suffix.lower() not in pipe.task.endings:
        raise ValueError(f"--out {args.out} does not end in {' or '.join(pipe.task.endings)}")
    if args.seconds is not None and args.max_new is not None:
        raise ValueError("--seconds and --max-new both say how much; give one of them")
    max_new = args.max_new if args.seconds is None else pipe.task.elements(args.seconds)
    temperature = args.temperature if args.temperature is not None else 0.8 if args.prompt else 1.0
    knobs = (args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.guidance)
    sampling = Sampling(temperature, *knobs)
    if len(args.prompt) == 1 and args.out is None:
        pieces = pipe.stream(args.prompt[0], max_new=max_new, sampling=sampling, seed=args.seed, stop=args.stop)
        for number, piece in enumerate(pieces):
            print(piece if number else args.prompt[0] + piece, end="", flush=True)
        print()
        return 0
    if not args.prompt and args.out is None:
        raise ValueError(f"where to? {pipe.task.domain} is written to a file: --out FILE")

    def bar(steps: Iterator[Any], total: int) -> Iterable[Any]:
        return tqdm(steps, total=total, desc="sampling", leave=False, disable=not sys.stderr.isatty())

    drawn = pipe.sample(asked, max_new=max_new, sampling=sampling, seed=args.seed, stop=args.stop, progress=bar)
    if args.out is not None:
        pipe.task.write(drawn, args.out)
        print(args.out)
        return 0
    for number, (prompt, text) in enumerate(zip(args.prompt, drawn, strict=True), 1):
        print(f"--- {number}\n{prompt}{text}")
    return 0


def run_forecast(pipe: Any, args: argparse.Namespace) -> int:
    if args.horizon is None:
        raise ValueError("a forecast needs --horizon, its number of steps")
    columns = {
        "time": args.time,
        "id": args.id,
        "targets": args.target,
        "known": args.known,
        "frequency": args.frequency,
    }
    forecast = pipe.task.forecast_file(args.csv, args.horizon, columns=columns, out=args.out, plot=args.plot)
    written = [str(path) for path in (args.out, args.plot) if path is not None]
    print("\n".join(written) if written else forecast.to_string(index=False))
    return 0


def run_list(args: argparse.Namespace) -> int:
    from zoo import registry
    from zoo.config import list_recipes, list_suites

    if args.pretrained:
        if args.kind != "models":
            raise ValueError(f"--pretrained lists models with weights; it does not go with --kind {args.kind}")
        return list_weights(args.pattern)
    if args.kind in ("recipes", "suites"):
        listed = list_recipes() if args.kind == "recipes" else list_suites()
        names = [name for name in listed if fnmatch.fnmatch(name, args.pattern)]
    else:
        names = getattr(registry, args.kind).names(args.pattern)
    if not names:
        print(f"no {args.kind} match {args.pattern!r}", file=sys.stderr)
        return 1
    for name in names:
        print(name)
    return 0


def list_weights(pattern: str) -> int:
    from zoo.weights import weights

    if not weights.names() and pattern == "*":
        print("none published here yet; zoo publish makes one: docs/weights.md", file=sys.stderr)
        return 0
    if not (names := weights.names(pattern)):
        print(f"no published weights match {pattern!r}", file=sys.stderr)
        return 1
    width = max(map(len, names))
    for name in names:
        published = weights.get(name)
        folder = published.here()
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder else 0
        place = f"{size / 2**20:.1f} MiB here" if folder else "on the hub" if published.row.hub else "nowhere"
        print(f"{name:<{width}}  {place:<14}  {published.row.data}")
    return 0


def run_publish(args: argparse.Namespace) -> int:
    expect_run(str(args.model))
    from zoo.publish import publish, read_about

    folder = publish(
        args.model,
        args.tag,
        read_about(args.about),
        out=args.out,
        table=args.table,
        split_name=args.split,
        batch_size=args.batch_size,
        device=args.device,
    )
    print(folder)
    return 0


def run_push(args: argparse.Namespace) -> int:
    from zoo.weights import find, hub

    print(hub.push(find(args.name), args.repository))
    return 0


def run_pull(args: argparse.Namespace) -> int:
    from zoo.weights import find, hub

    for name in names_of_weights(args.name):
        print(hub.pull(find(name)))
    return 0


def run_bench(args: argparse.Namespace) -> int:
    from zoo import bench, tuning

    if args.tune:
        for row in tuning.tune(args.tune):
            print(row, flush=True)
    else:
        print(bench.run(args.out, args.rounds, args.peers, args.shapes))
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    from zoo.doctor import report

    print(report(verbose=args.verbose))
    return 0


if __name__ == "__main__":
    sys.exit(main())
