"""What a run is made from: the recipe, the task and model that it names, and the folder where it lies.

run/recipe.yaml  assets/  provenance.json        written at the start
    checkpoints/  log.txt  metrics.jsonl  tensorboard/  samples/
    fitted/                                      what tasks fitted to finished weights (Task.attach)
"""

import json
import logging
import math
import os
import platform
import re
import shlex
import shutil
import sys
import time
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from zoo import config as configs
from zoo import frozen, registry, weights
from zoo.config import Choice, ConfigError
from zoo.model import ModelConfig
from zoo.task import Task
from zoo.train import checkpoint
from zoo.train.optim import FUSED, OptimizerConfig, ScheduleConfig
from zoo.train.parallel import ParallelConfig

log = logging.getLogger(__name__)


@dataclass
class TrainConfig:
    """batch_size        examples a step, over all ranks and micro-batches
    micro_batch_size  examples at once on a rank; None: all that a step gives it
    precision         of the forward pass (autocast), evaluation's too; weights and their updates are float32 always
    ema               decay of the moving average of the weights that is evaluated and sampled; 0: none
    eval_every        steps; 0 never (so for save_every and sample_every). A run always saves at its end
    eval_batches      of the validation split; 0: all of it
    eval_batch_size   examples of a validation batch; None: as many as a micro-batch of training has
    stop_when         the run ends early once an evaluation says so: "accuracy > 0.99", "loss < 1.5"; "": it does not
    best              a metric of the evaluations and its better side, "loss <" or "accuracy >": the run's weights are
                      those of its best evaluation, whose checkpoint is written then and stays; "": the newest
    patience          evaluations in a row without a better one that end the run; 0: none do
    keep              newest checkpoints that stay; 0: all
    max_skipped       non-finite steps in a row that are left out; one more ends the run
    prefetch          batches read ahead by a thread, 1 or more
    graph             on a GPU the whole step is recorded as a CUDA graph and replayed (graph.py): it pays most where
                      small models wait for Python. With adam or adamw, in one process; with and without compile
    device            auto: the GPU where there is one
    """

    steps: int = 1000
    batch_size: int = 32
    micro_batch_size: int | None = None
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: float = 0.0
    eval_every: int = 0
    eval_batches: int = 0
    eval_batch_size: int | None = None
    stop_when: str = ""
    best: str = ""
    patience: int = 0
    save_every: int = 500
    sample_every: int = 0
    log_every: int = 10
    keep: int = 2
    max_skipped: int = 3
    prefetch: int = 2
    compile: bool = False
    graph: bool = False
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    device: str = "auto"

    def __post_init__(self) -> None:
        micro = self.micro_batch_size
        if self.steps < 1 or self.batch_size < 1 or self.log_every < 1 or self.prefetch < 1:
            raise ValueError("steps, batch_size, log_every and prefetch take 1 or more")
        if micro is not None and (micro < 1 or self.batch_size % micro):
            raise ValueError(f"micro_batch_size = {micro} does not divide batch_size = {self.batch_size}")
        if self.eval_batch_size is not None and self.eval_batch_size < 1:
            raise ValueError(f"eval_batch_size = {self.eval_batch_size}; it takes 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed}; it takes 0 or more")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema = {self.ema} is not a decay: it takes 0 (none) or a number below 1")
        if self.graph and self.optimizer.name.lower() not in FUSED:
            raise ValueError(
                f"graph = true records the steps of {' and '.join(FUSED)} alone, and optimizer.name = "
                f"{self.optimizer.name!r}; it takes false there"
            )
        parse_stop(self.stop_when)
        if self.stop_when and not self.eval_every:
            raise ValueError(f"stop_when = {self.stop_when!r} needs evaluations, and eval_every is 0")
        parse_best(self.best)
        if self.best and not self.eval_every:
            raise ValueError(f"best = {self.best!r} needs evaluations, and eval_every is 0")
        if self.patience and not self.best:
            raise ValueError(
                f"patience = {self.patience} waits for a better evaluation: best has to say which is better"
            )
        cadences = ("eval_every", "eval_batches", "save_every", "sample_every", "keep", "max_skipped", "patience")
        for name in cadences:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} takes 0 or more")


STOP = re.compile(r"(\w+) *([<>]) *([-+.\w]+)")


def parse_stop(rule: str) -> tuple[str, str, float] | None:
    """'accuracy > 0.99' -> ('accuracy', '>', 0.99). Raises ValueError."""
    if not rule.strip():
        return None
    try:
        name, sign, bound = typing.cast("re.Match[str]", STOP.fullmatch(rule.strip())).groups()
        return name, sign, float(bound)
    except (AttributeError, ValueError):
        raise ValueError(f"stop_when = {rule!r}; it takes a metric, < or >, and a number: accuracy > 0.99") from None


def reached(rule: str, values: Mapping[str, float]) -> bool:
    """Whether a metric of an evaluation fulfils the rule. Raises ValueError where there is no such metric."""
    if (parsed := parse_stop(rule)) is None:
        return False
    name, sign, bound = parsed
    if name not in values:
        raise ValueError(f"stop_when = {rule!r} names no metric of this evaluation{registry.nearest(name, values)}")
    return values[name] > bound if sign == ">" else values[name] < bound


def parse_best(rule: str) -> tuple[str, str] | None:
    """'loss <' -> ('loss', '<'). Raises ValueError."""
    if not rule.strip():
        return None
    if not (found := re.fullmatch(r"(\w+) *([<>])", rule.strip())):
        raise ValueError(f"best = {rule!r}; it takes a metric and < (less is better) or >: loss <")
    return found[1], found[2]


def better(rule: str, values: Mapping[str, float], than: float | None) -> float | None:
    """The metric of the rule where it is better than `than` (None: where it is a number), else None. Raises ValueError
    where there is no such metric."""
    if (parsed := parse_best(rule)) is None:
        return None
    name, sign = parsed
    if name not in values:
        raise ValueError(f"best = {rule!r} names no metric of this evaluation{registry.nearest(name, values)}")
    value = values[name]
    if math.isnan(value):
        return None
    return value if than is None or (value < than if sign == "<" else value > than) else None


@dataclass
class Recipe:
    """A training run, but for where it lies: what `configs/<domain>/<recipe>.yaml` holds.

    backbone_from  a run folder or published weights, of any domain, whose backbone this run begins with
    """

    task: Choice | None = configs.choice(registry.tasks)
    model: Choice | None = configs.choice(registry.models)
    train: TrainConfig = field(default_factory=TrainConfig)
    backbone_from: str = configs.later("")


# ---------------------------------------------------------------------------------------------------------------------
# Starting a run, or going on with one


class ResumeError(ConfigError):
    """The run in the folder is not the one that was asked for."""


# What may differ on resuming without being asked: it does not touch the steps already made. A changed `steps` bends
# the rest of the schedule, which is why people resume.
HARMLESS = frozenset(
    f"train.{name}"
    for name in (
        *("steps", "micro_batch_size", "log_every", "eval_every", "eval_batches", "sample_every", "save_every", "keep"),
        *("eval_batch_size", "max_skipped", "prefetch", "device", "parallel"),
        *(f"parallel.{f.name}" for f in fields(ParallelConfig)),
    )
)


def make_task(recipe: Recipe, assets: Path | None = None) -> Task:
    if recipe.task is None:
        raise ConfigError(f"the recipe names no task; accepted: {', '.join(registry.tasks.names())}")
    return registry.tasks.get(recipe.task.name)(recipe.task.config, assets)


def make_model(recipe: Recipe, task: Task) -> nn.Module:
    if recipe.model is None:
        raise ConfigError(f"the recipe names no model; accepted: {', '.join(registry.models.names())}")
    config = recipe.model.config
    return (task.model_config(config) if isinstance(config, ModelConfig) else config).build()


def start_backbone(recipe: Recipe, model: nn.Module, found: Path | None) -> dict[str, Any]:
    """Give the model the backbone that the recipe names, unless it goes on from a checkpoint; returns what a number
    carries of it, or nothing."""
    if not recipe.backbone_from:
        return {}
    if found is not None:
        return {"backbone_from": checkpoint.read_manifest(found).get("backbone_from")}
    return {"backbone_from": frozen.start_backbone(model, recipe.backbone_from)}


def find_start(recipe: Recipe, run: Path, resume: bool) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and lines to tell. Raises ResumeError for a folder that is in use."""
    if not resume:
        if checkpoint.steps_in(run / "checkpoints"):
            raise ResumeError(f"{run} holds a run already; pass --resume to go on with it, or choose another folder")
        return None, []
    found, notes = checkpoint.latest(run / "checkpoints")
    if found is None and notes:
        raise ResumeError(f"no checkpoint in {run} can be used:\n" + "\n".join(notes))
    return found, notes if found else [f"nothing to resume in {run}: beginning"]


def what_a_number_carries(recipe: Recipe, task: Task) -> dict[str, Any]:
    """For manifests and provenance.json, as plain JSON values."""
    facts = {
        "fingerprint": configs.fingerprint(recipe),
        "seed": recipe.train.seed,
        "data": task.provenance(),
        "frozen": task.frozen(),
        "commit": checkpoint.git_commit(),
        "versions": checkpoint.versions(),
    }
    return json.loads(json.dumps(facts))  # tuples have become lists, as when read back


def check_same(found: Path | None, recipe: Recipe, facts: dict[str, Any], allow_changes: bool) -> list[str]:
    """Lines that say what changed since the checkpoint. Raises ResumeError for what would make it another run."""
    if found is None:
        return []
    manifest = checkpoint.read_manifest(found)
    if manifest["step"] > recipe.train.steps:
        raise ResumeError(f"{found} is at step {manifest['step']}, past train.steps = {recipe.train.steps}")
    check_frozen(manifest, task_parts=facts["frozen"], origin=str(found))
    changes = configs.difference(manifest["recipe"], recipe)
    data = configs.difference(manifest["data"], facts["data"], "data")
    harmful = [line for line in changes if line.split(":")[0] not in HARMLESS] + data
    if harmful and not allow_changes:
        run = found.parents[1]
        raise ResumeError(
            f"{found} was made with another recipe or other data:\n  " + "\n  ".join(harmful) + "\nResume it as it was "
            f"(zoo train {run / 'recipe.yaml'} --run {run} --resume), start in a new folder, or pass --allow-changes "
            "(allow_changes=True) if you mean it."
        )
    return [f"changed since {found.name}: {line}" for line in changes + data]


def check_frozen(manifest: dict[str, Any], task_parts: dict[str, str], origin: str) -> None:
    """Raises WeightsError where a tokenizer or codec is not the one that the weights were trained on."""
    for name, sha256 in manifest.get("frozen", {}).items():
        if task_parts.get(name) != sha256:
            raise weights.WeightsError(
                f"{origin} was trained on a {name} with sha256 {sha256}; this one has {task_parts.get(name, 'none')}: "
                f"the weights mean nothing with another {name}"
            )


def write_run_files(recipe: Recipe, task: Task, run: Path, device: torch.device, facts: dict[str, Any]) -> None:
    """recipe.yaml, assets/ and provenance.json: what evaluating, sampling and citing the run need."""
    run.mkdir(parents=True, exist_ok=True)
    for leftover in run.glob(".*.part"):  # of a process that was killed while it wrote
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    weights.replace_file(run / "recipe.yaml", configs.to_yaml(recipe).encode())
    if not checkpoint.steps_in(run / "checkpoints"):  # else weights were trained with the assets that are there
        beside = run / f".assets.{os.getpid()}.part"
        beside.mkdir()
        task.save_assets(beside)
        shutil.rmtree(run / "assets", ignore_errors=True)
        os.rename(beside, run / "assets")
    path = run / "provenance.json"
    try:
        sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"]
    except (OSError, ValueError, KeyError):
        sessions = []
    session = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.argv),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        "threads": torch.get_num_threads(),
        "commit": facts["commit"],
        "versions": facts["versions"],
    }
    weights.replace_file(path, json.dumps({**facts, "sessions": [*sessions, session]}, indent=1).encode())


def pick_device(name: str | None = "auto") -> torch.device:
    """auto or None: the GPU where there is one; cuda: of several processes on a machine each its own. Raises
    ConfigError for a device that is not here."""
    if name in ("auto", None):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(str(name))
    except RuntimeError as error:
        raise ConfigError(f"device = {name!r} is none; accepted: auto, cpu, cuda, cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        have = torch.cuda.device_count()
        raise ConfigError(f"device = {name!r}, but this machine has {have} CUDA devices that torch can use")
    return device


# ---------------------------------------------------------------------------------------------------------------------
# Using a run


def chosen_checkpoint(run: Path) -> Path:
    """The checkpoint whose weights count: of the best evaluation where the run kept it (train.best), else the newest
    whole one. Raises FileNotFoundError where the folder holds no run, or none with a whole checkpoint."""
    path, notes = checkpoint.latest(run / "checkpoints")
    if path is None:
        raise FileNotFoundError(f"{run} is no run with a usable checkpoint" + "".join(f"\n{note}" for note in notes))
    for note in notes:
        log.warning("%s: %s; taking %s", run, note, path.name)
    best = checkpoint.read_best(run / "checkpoints")
    if best is None:
        return path
    try:
        checkpoint.verify(best.path)
    except checkpoint.CheckpointError as error:
        log.warning("%s: its best checkpoint is damaged: %s; taking %s", run, error, path.name)
        return path
    return best.path


def load_run(
    run: Path, *, ema: bool = True, device: str | torch.device | None = "cpu", overrides: dict[str, Any] | None = None
) -> tuple[Recipe, Task, nn.Module]:
    """The recipe, task and model (eval mode) of a run's best checkpoint (train.best), or its newest: for evaluation
    and sampling.

    ema        the moving average of the weights, where the run kept one
    device     None or auto: the GPU where there is one
    overrides  a layer over the recipe, such as {"task": {"stride": 64}}
    Raises FileNotFoundError where there is no run.
    """
    run = Path(run)
    path = chosen_checkpoint(run)
    manifest = checkpoint.read_manifest(path)
    average = checkpoint.read_tensors(path, "ema") if ema else None
    tensors = average or checkpoint.read_tensors(path, "model") or {}
    recipe, task, model = _build_trained(manifest, run / "assets", tensors, str(path), device, overrides)
    digest = checkpoint.weights_digest(manifest, "ema" if average else "model")
    task.attach(model, run / "fitted" / digest[:12])
    return recipe, task, model


def load_published(
    name: str, *, device: str | torch.device | None = "cpu", overrides: dict[str, Any] | None = None
) -> tuple[Recipe, Task, nn.Module]:
    """The same of published weights, <model>.<tag>. Raises FileNotFoundError, WeightsError."""
    card = weights.open_card(name)
    recipe, task, model = _build_trained(
        card.facts, card.assets(), card.read_model(), str(card.folder), device, overrides
    )
    task.attach(model, card.fitted(), sealed=True)
    return recipe, task, model


def _build_trained(
    facts: dict[str, Any],
    assets: Path,
    tensors: dict[str, torch.Tensor],
    origin: str,
    device: str | torch.device | None,
    overrides: dict[str, Any] | None,
) -> tuple[Recipe, Task, nn.Module]:
    recipe = configs.build(Recipe, facts["recipe"], overrides or {})
    task = make_task(recipe, assets)
    check_frozen(facts, task.frozen(), origin)
    model = make_model(recipe, task)
    weights.load_into(model, tensors, origin=origin)
    return recipe, task, model.to(device if isinstance(device, torch.device) else pick_device(device)).eval()
