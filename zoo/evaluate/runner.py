"""Running a suite: what is there is left alone, what is missing is trained or measured, each number becomes a row.

    <out>/<suite>.jsonl         the rows              <out>.md   the page, from the rows of all suites in <out>
    <out>/<suite>-*.png         the plots
    <work>/<suite>/<cell>/…     the runs: they make going on after a crash cheap, and are not needed for the page

Cells run one after another, or several at once in processes of their own; this process alone writes. What is measured
of a replica is written when it is measured, before the cell's next one: what is cut short leaves that much.
"""

import concurrent.futures
import contextlib
import logging
import math
import multiprocessing
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from zoo import config as configs
from zoo.evaluate import report
from zoo.evaluate.measure import MEASURE, Number
from zoo.evaluate.rows import Row, is_complete, merge, read_rows, write_rows
from zoo.evaluate.score import circumstances, origin, trained_on
from zoo.evaluate.speed import speed
from zoo.evaluate.suite import Cell, find_suite
from zoo.train import Replica, pick_device, sweep, train
from zoo.train.checkpoint import steps_in
from zoo.train.recipe import make_task, what_a_number_carries

log = logging.getLogger(__name__)

# Seconds between the starts of processes that share a GPU: each finds the kernels that those before it have compiled
START_APART = 4.0


@dataclass(frozen=True)
class Job:
    """A cell, and what of it is missing: the measurements of each replica."""

    cell: Cell
    missing: tuple[tuple[Replica, tuple[str, ...]], ...]
    work: Path

    @property
    def folder(self) -> Path:
        return self.work / self.cell.suite / self.cell.name


@dataclass
class Summary:
    """cells: of the suite; ran: those that something was missing of; failed: name -> why."""

    cells: int
    ran: list[str]
    failed: dict[str, str]
    rows: Path
    page: Path
    table: str


def run_suite(
    name: str,
    *,
    out: Path,
    work: Path = Path("runs/suites"),
    jobs: int = 1,
    only: Sequence[str] = (),
    overrides: Sequence[str] = (),
    dry_run: bool = False,
) -> Summary:
    """Bring a suite's rows up to date, and the page and plots with them.

    jobs       cells at once, each in a process of its own with its log beside its runs; timings (`speed`) want 1
    only       patterns of cell names: "wikitext2/*swa*"
    overrides  fields of every recipe to change
    dry_run    say what is missing and do nothing
    A cell that fails (its data may be missing) is told and the others go on; its name is in `failed`. Ctrl-C ends all,
    nothing is lost: the same call goes on. Raises ConfigError for a suite, a pattern or a recipe that does not fit.
    """
    suite = find_suite(name)
    cells = suite.cells(only, overrides)
    if jobs > 1 and any("speed" in cell.settings.measure for cell in cells):
        raise configs.ConfigError(f"suite {name!r} times its models, which wants the machine to itself: --jobs 1")
    path = out / f"{suite.name}.jsonl"
    todo, failed = lacking(cells, read_rows(path), work)
    if jobs > 1:
        todo = longest_first(todo)
    if dry_run:
        listed = [f"  {job.cell.name}: {describe(job)}" for job in todo]
        listed += [f"  {cell}: cannot be run, {why}" for cell, why in failed.items()]
        ran = [job.cell.name for job in todo]
        return Summary(len(cells), ran, failed, path, out.with_suffix(".md"), "\n".join(listed))

    ended, began = 0, time.monotonic()
    bar = tqdm(total=len(todo), desc=suite.name, unit="cell", disable=not sys.stderr.isatty() or jobs == 1)
    with contextlib.closing(bar):
        for job, news in reports(todo, jobs):
            if isinstance(news, list):
                write_rows(path, merge(read_rows(path), news))
                log.info("%s: %d numbers", job.cell.name, len(news))
                continue
            ended += 1
            bar.update()
            if isinstance(news, BaseException):
                failed[job.cell.name] = f"{type(news).__name__}: {news}"
                log.warning("%s failed: %s", job.cell.name, failed[job.cell.name])
            else:
                seconds = time.monotonic() - began
                log.info("%s ended, %d of %d, after %.0f s", job.cell.name, ended, len(todo), seconds)
    page = report.write_page(out)
    table = report.tables(read_rows(path))
    return Summary(len(cells), [job.cell.name for job in todo], failed, path, page, table)


def lacking(cells: Sequence[Cell], rows: Sequence[Row], work: Path) -> tuple[list[Job], dict[str, str]]:
    """The jobs to do, and name -> why of cells whose recipe cannot be resolved here. Raises ConfigError: what the suite
    says is wrong on every machine."""
    todo, failed = [], {}
    for cell in cells:
        try:
            job = missing(cell, rows, work)
        except configs.ConfigError:
            raise
        except Exception as error:
            if os.environ.get("ZOO_DEBUG") == "1":
                raise
            failed[cell.name] = f"{type(error).__name__}: {error}"
            log.warning("%s failed: %s", cell.name, failed[cell.name])
            continue
        if job.missing:
            todo.append(job)
    return todo, failed


def longest_first(todo: Sequence[Job]) -> list[Job]:
    """Side by side the longest begin, and none is left over to run alone at the end. By steps, since a small model's
    step takes about as long whatever its batch is; then by batch. A stack's replicas are trained together."""

    def length(job: Job) -> tuple[int, int]:
        train, settings = job.cell.recipe.train, job.cell.settings
        return train.steps * (1 if settings.stacked else len(job.missing)), train.batch_size

    return sorted(todo, key=length, reverse=True)


def missing(cell: Cell, rows: Sequence[Row], work: Path) -> Job:
    """What the rows lack of a cell."""
    parts = []
    recipe = cell.recipe
    for replica in cell.replicas():
        settings = settings_of(cell, configs.to_dict(replica.recipe(recipe)))
        names = tuple(
            name
            for name in cell.settings.measure
            if not is_complete(rows, group_for(cell, replica, name), settings[name])
        )
        if names:
            parts.append((replica, names))
    return Job(cell, tuple(parts), work)


def group_for(cell: Cell, replica: Replica, measurement: str) -> tuple[Any, ...]:
    return (cell.experiment, cell.model, cell.arm, replica.lr, replica.seed, measurement)


def settings_of(cell: Cell, recipe: dict[str, Any]) -> dict[str, str]:
    """measurement -> a digest of all that decides its numbers: the recipe, and how it is measured."""
    options = asdict(cell.settings)
    uses = {
        "scores": ("split", "batches"),
        "positions": ("split", "batches"),
        "curve": (),
        "lengths": ("split", "batches", "lengths", "length_field"),
        "speed": ("lengths", "length_field", "step_tokens", "decode_rows"),
    }
    shared = {"recipe": recipe, "stacked": cell.settings.stacked}
    return {
        name: configs.fingerprint({**shared, "measurement": name, **{key: options[key] for key in uses[name]}})
        for name in cell.settings.measure
    }


def describe(job: Job) -> str:
    parts = [f"{replica.name} ({', '.join(names)})" for replica, names in job.missing]
    return ", ".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Running jobs


Rows = list[Row]


def reports(todo: Sequence[Job], jobs: int) -> Iterator[tuple[Job, Rows | BaseException | None]]:
    """Of each job its rows as they are measured, then None, or what it failed with."""
    if jobs <= 1:
        for job in todo:
            try:
                for rows in run_job(job):
                    yield job, rows
            except Exception as error:
                if os.environ.get("ZOO_DEBUG") == "1":
                    raise
                yield job, error
            else:
                yield job, None
        return
    # A fresh process for each: the memory of a GPU goes back, and one that dies takes no other along
    news: queue.SimpleQueue[tuple[Job, Rows | BaseException | None]] = queue.SimpleQueue()
    pool, gate, stopped = concurrent.futures.ThreadPoolExecutor(jobs), threading.Lock(), threading.Event()

    def follow(job: Job) -> None:
        ending = None
        try:
            in_process(job, lambda rows: news.put((job, rows)), gate, stopped)
        except BaseException as error:  # whatever it is: each job's one ending is waited for
            ending = error
        news.put((job, ending))

    try:
        for job in todo:
            pool.submit(follow, job)
        ended = 0
        while ended < len(todo):
            job, what = news.get()
            ended += not isinstance(what, list)
            yield job, what
    except BaseException:
        stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)  # those that run got the Ctrl-C, too, and save
        raise
    pool.shutdown()


def in_process(job: Job, take: Callable[[Rows], None], gate: threading.Lock, stopped: threading.Event) -> None:
    """gate: one starts at a time. Once `stopped` is set none does, and nobody waits any longer."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=work_and_send, args=(job, send, sys.argv[1:]))
    with gate:
        if stopped.is_set():
            raise RuntimeError("ended before it began")
        process.start()
        stopped.wait(START_APART if torch.cuda.is_available() else 0)
    send.close()
    result: Rows | Exception | None
    try:
        while isinstance(result := receive.recv(), list):
            take(result)
    except EOFError:
        result = RuntimeError("its process ended without a word")
    process.join()
    if isinstance(result, Exception):
        if process.exitcode:
            result.add_note(f"exit code {process.exitcode}")
        raise RuntimeError(f"{result}; its log is {job.folder / 'log.txt'}") from result


def work_and_send(job: Job, send: Any, words: list[str]) -> None:
    """The body of a worker process: its output goes into the cell's log."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / "log.txt").open("a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        sys.argv[1:] = words  # the command that its rows name
        try:
            for rows in run_job(job):
                send.send(rows)
            send.send(None)
        except Exception as error:
            logging.exception("failed")
            send.send(RuntimeError(f"{type(error).__name__}: {error}"))


def run_job(job: Job) -> Iterator[Rows]:
    """Train what has to be trained, measure what is missing; the rows of each replica."""
    cell = job.cell
    if not cell.settings.trains:
        ((replica, _),) = job.missing
        yield rows_of_speed(cell, replica)
        return
    device = pick_device(cell.recipe.train.device)
    names = dict(job.missing)
    for replica, run in trained(job):
        rows = []
        for name in names.get(replica, ()):
            if name == "speed":
                rows += rows_of_speed(cell, replica)
                continue
            numbers = MEASURE[name](run, cell.settings, device)
            rows += as_rows(cell, replica, name, numbers, {**origin(run), "trained_on": trained_on(run)}, device)
        if rows:
            yield rows


def trained(job: Job) -> Iterator[tuple[Replica, Path]]:
    """The replicas that something is missing of, each when its run is there (of a stack all of them); a run that was
    begun is gone on with."""
    cell, recipe = job.cell, job.cell.recipe
    if cell.settings.stacked:
        replicas = cell.replicas()
        yield from zip(replicas, sweep(recipe, job.folder, replicas), strict=True)
        return
    # Compiled code of former cells counts against the number that is kept; a cell's own serves all its replicas
    torch._dynamo.reset()
    for replica, _ in job.missing:
        run = job.folder / replica.name
        yield replica, train(replica.recipe(recipe), run, resume=bool(steps_in(run / "checkpoints"))).run


def rows_of_speed(cell: Cell, replica: Replica) -> list[Row]:
    recipe = cell.recipe
    device = pick_device(recipe.train.device)
    facts = what_a_number_carries(recipe, make_task(recipe))
    assert recipe.model is not None
    assert recipe.task is not None
    where = {"task": recipe.task.name, "precision": recipe.train.precision, "step": 0}
    where |= {name: facts[name] for name in ("fingerprint", "data", "commit")}
    return as_rows(cell, replica, "speed", speed(cell, device), where, device)


def as_rows(
    cell: Cell, replica: Replica, measurement: str, numbers: Sequence[Number], where: dict[str, Any], device: Any
) -> list[Row]:
    """One row a number, with everything beside it that says how it came about."""
    recipe = configs.to_dict(replica.recipe(cell.recipe))
    settings = settings_of(cell, recipe)[measurement]
    replicas = cell.replicas()
    planned = {
        "rates": sorted({replica.lr for replica in replicas}),
        "seeds": sorted({replica.seed for replica in replicas}),
        "measure": list(cell.settings.measure),
    }
    measured_here = circumstances(device)
    identity = dict(zip(("experiment", "model", "arm", "lr", "seed"), group_for(cell, replica, "")[:5], strict=True))
    how = {name: value for name, value in where.items() if name not in ("run", "model", "seed")}
    published = cell.settings.published.get("/".join(filter(None, (cell.model, cell.arm))))
    rows = []
    for place, number in enumerate(numbers):
        row = {"suite": cell.suite, **identity, "measurement": measurement, "name": number.name, "at": number.at}
        row |= {
            "value": number.value if math.isfinite(number.value) else None,
            "place": place,
            "of": len(numbers),
            "settings": settings,
            "stacked": cell.settings.stacked,
            "planned": planned,
        }
        if measurement == "scores" and place == 0 and published is not None:
            row["published"] = published
        row |= {
            "section": cell.settings.section or cell.experiment,
            "title": cell.settings.title,
            "recipe": cell.settings.recipe,
            "split": cell.settings.split,
        }
        row |= {"mixer": recipe["model"]["backbone"]["mixer"]["name"]} if "backbone" in recipe["model"] else {}
        rows.append({**row, **number.facts, **how, **measured_here})
    return rows
