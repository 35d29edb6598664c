"""What series_grid.py and series_peers.py share: many small runs, each in silence and in a temporary folder, several at
once, and a file with a row for each that has ended."""

import contextlib
import io
import json
import multiprocessing
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: Path | None) -> list[Row]:
    if path is None or not path.exists():
        return []
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def rows_of(run: Callable[[Row], Row], jobs: Sequence[Row], processes: int, out: Path | None) -> Iterator[Row]:
    """The rows of all jobs as they end, added to `out`. A worker process takes one job after another, so it imports and
    warms up once."""
    if not jobs:
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and leaves no workers behind
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for row in pool.imap_unordered(run, jobs, chunksize=1):
            if out is not None:
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            yield row


def timed(job: Row, work: Callable[[], Row]) -> Row:
    """The job's row: with what `work` found, or with what it failed of, for one bad run ends no others; and seconds."""
    row, began = dict(job), time.perf_counter()
    try:
        row |= work()
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def trained(recipe: str, words: Sequence[str], place: Path) -> None:
    from zoo.config import build, recipe_layers  # here, so that a parent of workers needs no torch
    from zoo.train import Recipe, train

    train(build(Recipe, *recipe_layers(recipe, words)), place)


@contextlib.contextmanager
def quiet_place() -> Iterator[Path]:
    """A folder for one run, gone afterwards; what is printed meanwhile is not seen."""
    silence = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stderr(silence),
        contextlib.redirect_stdout(silence),
    ):
        yield Path(folder) / "run"
