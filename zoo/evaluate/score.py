"""Score one run on held-out data; every number becomes one JSON row that says how it came about."""

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from zoo import config as configs
from zoo.task import Media, Task, run_metrics
from zoo.train import (
    ParallelConfig,
    Recipe,
    autocast,
    chosen_checkpoint,
    git_commit,
    load_run,
    pick_device,
    read_manifest,
    start_ranks,
    versions,
    weights_digest,
)
from zoo.train.log import figure, write_media
from zoo.train.parallel import Ranks


@dataclass(frozen=True)
class Scores:
    """Metrics of a model and, beside them, the numbers that need none."""

    title: str
    values: dict[str, float]
    baselines: dict[str, float]

    def table(self) -> str:
        width = max(map(len, (*self.values, *self.baselines)), default=0)
        lines = [self.title, *(f"  {name:<{width}}  {figure(value)}" for name, value in self.values.items())]
        lines += [f"  {name:<{width}}  {figure(value)}  (baseline)" for name, value in self.baselines.items()]
        return "\n".join(lines)


def evaluate_run(
    folder: Path,
    *,
    split: str = "test",
    batch_size: int | None = None,
    device: str | None = None,
    ema: bool = True,
    overrides: Sequence[str] = (),
) -> Scores | None:
    """All metrics of a run's task over one split, in one pass; appends a row a number to <run>/results.jsonl, and
    writes what metrics show to <run>/evaluation/<split>.

    batch_size  of each process, None: the recipe's train.eval_batch_size, or 16. Under torchrun or `--nproc` they share
                the split, with the same numbers as one alone
    overrides   fields of the recipe to change for this evaluation ("task.stride=64", "train.precision=fp32")
    Returns None on all ranks but the first.
    Raises FileNotFoundError when the folder holds no run, ValueError for an unknown split.
    """
    if split == "train":
        raise ValueError("split 'train' is endless and shuffled; accepted: valid, test")
    place = pick_device(device)
    ranks = start_ranks(ParallelConfig(), place)
    recipe, task, model = ranks.in_turn(
        lambda: load_run(folder, ema=ema, device=place, overrides=configs.dotted(tuple(overrides)))
    )
    batch_size = batch_size or recipe.train.eval_batch_size or 16
    measured = measure_split(recipe, task, model, split, batch_size=batch_size, device=place, ranks=ranks)
    ranks.close()
    if ranks.rank > 0:
        return None
    write_media(measured.media, folder / "evaluation" / split)
    facts = {
        **measured.facts,
        "weights": "ema" if ema and recipe.train.ema else "raw",
        "overrides": list(overrides),
    }
    common = {**origin(folder), "trained_on": trained_on(folder), **facts, **circumstances(place)}
    values, baselines = measured.values, task.baselines(split)
    rows = [
        {"name": name, "value": value, "kind": kind, **common}
        for kind, numbers in (("metric", values), ("baseline", baselines))
        for name, value in numbers.items()
    ]
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    title = f"{folder} at step {common['step']}, {split} split, {recipe.train.precision}, {task.describe(split)}"
    return Scores(title, values, baselines)


@dataclass(frozen=True)
class Measured:
    """The values of one pass over a split, what metrics show beside them, and how they were measured."""

    values: dict[str, float]
    media: Media
    facts: dict[str, Any]


def measure_split(
    recipe: Recipe,
    task: Task,
    model: nn.Module,
    split: str,
    *,
    batch_size: int,
    device: torch.device,
    ranks: Ranks,
) -> Measured:
    """All metrics of the task over a split, in one pass, at the precision that the recipe trains in."""
    stream = task.stream(split, batch_size=batch_size, rank=ranks.rank, world=ranks.world)
    metrics = task.metrics(split)
    began = time.perf_counter()
    with autocast(recipe.train.precision, device):  # as the validation while training: the same numbers
        values = run_metrics(model, metrics, stream, device=device, ranks=ranks, progress=progress_bar(split))
    media = Media()
    for metric in metrics.values() if ranks.rank == 0 else ():
        if show := getattr(metric, "media", None):
            shown = show()
            media = Media(media.text | shown.text, media.images | shown.images, media.audio | shown.audio)
    facts = {
        "split": split,
        "protocol": task.describe(split),
        "batch_size": batch_size,
        "precision": recipe.train.precision,
        "evaluated_on": task.provenance(),
        "seconds": round(time.perf_counter() - began, 2),
    }
    return Measured(values, media, facts)


# DESIGN.md section 8: what stands beside every number.


def origin(run: Path) -> dict[str, Any]:
    """Of the model: recipe, seed, data, commit and checkpoint that it was trained with."""
    path = chosen_checkpoint(run)
    manifest = read_manifest(path)
    recipe = manifest["recipe"]
    return {
        "run": str(run),
        "model": recipe["model"]["name"],
        "task": recipe["task"]["name"],
        "step": manifest["step"],
        "sha256": weights_digest(manifest),
        **{name: manifest[name] for name in ("fingerprint", "seed", "data", "commit")},
        **{name: manifest[name] for name in ("backbone_from",) if name in manifest},
    }


def trained_on(run: Path) -> list[str]:
    """The devices of a run's sessions; none where nobody wrote them down."""
    path = run / "provenance.json"
    sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"] if path.is_file() else []
    return list(dict.fromkeys(session["device"] for session in sessions))


def circumstances(device: torch.device) -> dict[str, Any]:
    """Of the measurement: hardware, command, and the code and versions that measured."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"
    command = shlex.join(["zoo", *sys.argv[1:]])
    forced = {"backend": os.environ["ZOO_BACKEND"]} if os.environ.get("ZOO_BACKEND") else {}
    with_what = {"commit": git_commit(), "versions": versions(), **forced}
    return {"hardware": card, "command": command, "evaluated_with": with_what}


def progress_bar(split: str) -> Any:
    """A tqdm bar on a terminal, silence elsewhere; with the number of batches where the stream knows it."""
    return lambda stream: tqdm(
        stream,
        total=getattr(stream, "batches", None),
        desc=f"evaluating {split}",
        leave=False,
        disable=not sys.stderr.isatty(),
    )
