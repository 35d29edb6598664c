"""One readable training loop, for any module with `forward(batch) -> Output` and any task.

    for each step:  micro-batches -> sums of gradients and counts -> divide, clip, guarded step -> moving average
                    then, when due: a row of metrics, a checkpoint, an evaluation, samples

A loss is a sum and a count, so how a batch is split into micro-batches changes nothing but rounding. Numbers are read
one step after the device was asked for them. Everything that decides a step's result is in the checkpoint.
"""

import contextlib
import itertools
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo import config as configs
from zoo import weights
from zoo.data import Prefetch
from zoo.task import OneRank, Task, run_metrics
from zoo.train import checkpoint, optim
from zoo.train.log import Meters, RunLog
from zoo.train.optim import Ema, Guard
from zoo.train.recipe import (
    Recipe,
    check_same,
    find_start,
    make_model,
    make_task,
    pick_device,
    what_a_number_carries,
    write_run_files,
)
from zoo.train.signals import Signals


@dataclass
class Result:
    """What a finished run leaves: its folder, newest checkpoint, last numbers, and steps left out as non-finite."""

    run: Path
    step: int
    checkpoint: Path
    metrics: dict[str, float]
    skipped: int


class Diverged(RuntimeError):
    """Too many non-finite steps in a row."""


class Interrupted(SystemExit):
    """Ctrl-C (code 130) or SIGTERM (143): the run was saved first."""


def train(
    recipe: Recipe,
    run: Path,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    command: str = "",
) -> Result:
    """Train `recipe` in the folder `run`; with `resume`, go on from its newest whole checkpoint (or begin).

    allow_changes  resume although the recipe or the data differ in more than cadences
    command        what a person types to go on, for the message after an interruption
    Raises ResumeError, Diverged, checkpoint.NonFinite, checkpoint.DiskFull, and Interrupted after Ctrl-C or SIGTERM.
    """
    run = Path(run)
    config, ranks = recipe.train, OneRank()
    device = pick_device(config.device)
    found, notes = find_start(recipe, run, resume)
    checkpoint.seed_everything(config.seed)
    kept = run / "assets" if found is not None else None  # a tokenizer that was fitted is read back, not fitted again
    task = make_task(recipe, kept)
    model = make_model(recipe, task).to(device)
    facts = what_a_number_carries(recipe, task)
    notes += check_same(found, recipe, facts, allow_changes)
    state = Run(recipe, run, task, model, device, ranks, facts)
    if found is not None:
        state.restore(found)
        notes.append(f"resuming {run} from {found.name}")
    write_run_files(recipe, task, run, device, facts)
    go_on = command or f"zoo train {shlex.quote(str(run / 'recipe.yaml'))} --run {shlex.quote(str(run))} --resume"
    with Signals() as signals, RunLog(run, step=state.step, steps=config.steps) as log, state.stream:
        for note in notes:
            log.say(note)
        for orphan in checkpoint.sweep(run / "checkpoints"):
            log.say(f"removed {orphan.name}, left half-written by a process that was stopped")
        log.say(describe(state))
        result = _loop(state, log, signals, go_on)
        log.say(f"done: {result.step} steps, {result.checkpoint}")
    return result


def _loop(state: "Run", log: RunLog, signals: Signals, go_on: str) -> Result:
    config = state.recipe.train
    forward = torch.compile(state.model) if config.compile else state.model
    batches = iter(state.stream)
    pending: Reading | None = None

    if state.due(config.eval_every) and state.evaluated < state.step:  # interrupted between a step and its evaluation
        state.evaluate(log, signals)
    while state.step < config.steps:
        reading = _step(state, forward, batches)
        state.step += 1
        reading.seconds = log.advance(state.step)
        if pending is not None:
            state.read(pending, log)
        pending = reading

        evaluating, sampling = state.due(config.eval_every), state.due(config.sample_every)
        saving = state.due(config.save_every) or state.step == config.steps
        if not (evaluating or sampling or saving or signals.received):
            continue
        state.read(pending, log)
        pending = None
        log.pause()
        if evaluating:
            state.evaluate(log, signals)
        if sampling and not signals.received:
            state.sample(log)
        if saving or signals.received:
            state.save()
            log.flush()
        if signals.received:
            name = signals.received.name
            log.say(f"stopped by {name} after step {state.step}; saved {state.saved}. To go on:\n  {go_on}")
            raise Interrupted(128 + signals.received)
        log.go_on()
    return Result(state.run, state.step, state.saved or state.save(), state.last, int(state.guard.skipped.item()))


@dataclass
class Reading:
    """Numbers of a step, on their way from the device; `after` tells when they have arrived."""

    step: int
    data: dict[str, Any]  # the data position before the step, which names its batch
    lr: float
    names: list[str]
    values: Tensor
    after: Any = None
    seconds: float = 0.0

    def rows(self) -> dict[str, float]:
        if self.after is not None:
            self.after.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))


def _step(state: "Run", forward: Any, batches: Iterator[Any]) -> Reading:
    """One update: sums of losses, gradients and counts over micro-batches (and ranks), then one guarded step."""
    config, device, ranks, guard = state.recipe.train, state.device, state.ranks, state.guard
    lr = config.optimizer.lr * optim.lr_share(config.schedule, state.step, config.steps)
    optim.set_lr(state.optimizer, lr)
    position = state.stream.state_dict()
    micro = config.micro_batch_size or config.batch_size
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    state.model.train()
    for part in range(config.batch_size // (micro * ranks.world)):
        if (batch := next(batches, None)) is None:
            raise ValueError(f"the training stream of {type(state.task).__name__} ended; it has to be endless")
        batch = batch.to(device)
        with autocast(config.precision, device):
            output = forward(batch)
        if config.precision == "fp16" and state.step == 0 and part == 0:
            guard.scale.copy_(optim.FIRST_SCALE / output.count.clamp(min=1))
        (output.loss_sum * guard.scale if config.precision == "fp16" else output.loss_sum).backward()
        for name, (total, count) in {"loss": (output.loss_sum, output.count), **output.metrics}.items():
            old = sums.get(name, (0.0, 0.0))
            sums[name] = (old[0] + total.detach().float(), old[1] + count.detach().float())

    totals = {name: (ranks.sum(total), ranks.sum(count)) for name, (total, count) in sums.items()}
    for parameter in state.parameters:
        if parameter.grad is not None:
            parameter.grad = ranks.sum(parameter.grad)
    norm, taken = optim.guarded_step(
        state.optimizer, guard, *totals["loss"], clip=config.optimizer.clip, fp16=config.precision == "fp16"
    )
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.update(state.model, state.step, taken)

    names = ["taken", "in_a_row", "norm"] + [f"{part}/{name}" for name in totals for part in ("sum", "count")]
    values = torch.stack([taken.float(), guard.in_a_row, norm, *(t for pair in totals.values() for t in pair)])
    after = None
    if device.type == "cuda":
        values = values.to("cpu", non_blocking=True)
        after = torch.cuda.Event()
        after.record()
    return Reading(state.step + 1, position, lr, names, values, after)


class Run:
    """Everything that training changes, so that it can be saved and put back as one."""

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        task: Task,
        model: nn.Module,
        device: torch.device,
        ranks: Any,
        facts: dict[str, Any],
    ):
        config = recipe.train
        self.recipe, self.run, self.task, self.model = recipe, run, task, model
        self.device, self.ranks, self.facts = device, ranks, facts
        self.parameters = list(model.parameters())
        self.optimizer = optim.make_optimizer(model, config.optimizer)
        self.guard = Guard.new(device)
        self.ema = Ema(model, config.ema) if config.ema else None
        self.stream = self._stream("train", config.prefetch)
        self.meters = Meters()
        self.step = self.evaluated = 0
        self.last: dict[str, float] = {}  # the newest value of each number
        self.saved: Path | None = None
        self.skipped: list[tuple[int, Any]] = []  # the last few steps left out, and their data positions
        self.bad = 0  # samples that could not be read, as far as told

    def _stream(self, split: str, prefetch: int) -> Prefetch:
        config = self.recipe.train
        micro = config.micro_batch_size or config.batch_size
        ranks = self.ranks
        stream = self.task.stream(split, batch_size=micro, rank=ranks.rank, world=ranks.world, seed=config.seed)
        return Prefetch(stream, depth=prefetch, pin=self.device.type == "cuda")

    def due(self, every: int) -> bool:
        """Whether what is done every so many steps is due now; always at the end of a run."""
        return every > 0 and self.step > 0 and (self.step % every == 0 or self.step == self.recipe.train.steps)

    @property
    def averaged(self) -> nn.Module:
        """The weights to evaluate and sample: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.model

    def read(self, reading: Reading, log: RunLog) -> None:
        """Take in the numbers of an earlier step. Raises Diverged."""
        row = reading.rows()
        log.count(row["count/loss"], reading.seconds)
        self.meters.add("train/lr", reading.lr, 1.0)
        self.meters.add("train/skipped", 1.0 - row["taken"], 1.0)
        if row["taken"]:
            for name in reading.names:
                if name.startswith("sum/"):
                    name = name.removeprefix("sum/")
                    self.meters.add(f"train/{name}", row[f"sum/{name}"], row[f"count/{name}"])
            self.meters.add("train/gradient_norm", row["norm"], 1.0)
        else:
            self._tell_skipped(reading, row, log)
        if reading.step % self.recipe.train.log_every == 0 or reading.step == self.recipe.train.steps:
            self.last |= (means := self.meters.take())
            log.train_row(reading.step, means)
            self._tell_bad_samples(log)

    def _tell_skipped(self, reading: Reading, row: dict[str, float], log: RunLog) -> None:
        batch = f"the batch at data {json.dumps(reading.data)}"
        log.say(f"step {reading.step} was skipped: loss {row['sum/loss']}, gradient norm {row['norm']}; {batch}")
        self.skipped = [*self.skipped, (reading.step, reading.data)][-8:]
        if row["in_a_row"] > self.recipe.train.max_skipped:
            listed = "; ".join(f"step {step}: data {json.dumps(data)}" for step, data in self.skipped)
            newest = checkpoint.newest_name(self.run / "checkpoints")
            raise Diverged(
                f"{row['in_a_row']:.0f} steps in a row were not finite, more than train.max_skipped = "
                f"{self.recipe.train.max_skipped}; the last is step {reading.step}. Their batches: {listed}. "
                f"The weights are as before them; the newest checkpoint is {newest}"
            )

    def _tell_bad_samples(self, log: RunLog) -> None:
        bad: dict[int, str] = getattr(self.stream.stream, "bad", {})
        for place, why in list(bad.items())[self.bad :]:
            log.say(f"sample {place} cannot be read and was left out: {why}")
        self.bad = len(bad)

    @torch.no_grad()
    def evaluate(self, log: RunLog, signals: Signals) -> None:
        """The task's metrics on the validation split. If a signal comes in between, it is done on resuming."""
        batches = self.recipe.train.eval_batches or None

        def until_signal(stream: Any) -> Iterator[Any]:
            return itertools.takewhile(lambda _: not signals.received, itertools.islice(stream, batches))

        with (
            checkpoint.undisturbed_rng(self.recipe.train.seed),
            autocast(self.recipe.train.precision, self.device),
            self._stream("valid", 2) as stream,
        ):
            values = run_metrics(
                self.averaged,
                self.task.metrics("valid"),
                stream,
                device=self.device,
                ranks=self.ranks,
                progress=until_signal,
            )
        if signals.received:
            return
        self.evaluated = self.step
        values = {f"valid/{name}": value for name, value in values.items()}
        self.last |= values
        log.evaluation_row(self.step, values)

    @torch.no_grad()
    def sample(self, log: RunLog) -> None:
        with checkpoint.undisturbed_rng(self.recipe.train.seed), self._stream("valid", 1) as stream:
            batch = next(iter(stream)).to(self.device)
            model, mode = self.averaged, self.averaged.training
            model.eval()
            log.media(self.step, self.task.media(model, batch))
            model.train(mode)

    def save(self) -> Path:
        """A checkpoint of the state between two steps."""
        optimizer, numbers = optim.optimizer_state(self.model, self.optimizer)
        guard = {f"guard/{name}": tensor for name, tensor in vars(self.guard).items()}
        rng, rng_plain = checkpoint.rng_state()
        tensors = {"model": weights.named_tensors(self.model), "optimizer": optimizer | guard, "rng": rng}
        if self.ema is not None:
            tensors["ema"] = weights.named_tensors(self.ema.model)
        state = {
            "optimizer": numbers,
            "rng": rng_plain,
            "data": self.stream.state_dict(),
            "meters": self.meters.sums,
            "evaluated": self.evaluated,
            "rates": {"lr": [group["lr"] for group in self.optimizer.param_groups]},
        }
        facts = {"recipe": configs.to_dict(self.recipe), "world": self.ranks.world, **self.facts}
        content = checkpoint.Content(tensors, state, facts)
        self.saved = checkpoint.save(self.run / "checkpoints", self.step, content, keep=self.recipe.train.keep)
        return self.saved

    def restore(self, path: Path) -> None:
        """Take up a checkpoint that `checkpoint.latest` has verified."""
        optimizer = checkpoint.read_tensors(path, "optimizer") or {}
        weights.load_into(self.model, checkpoint.read_tensors(path, "model") or {}, origin=str(path))
        for name, tensor in vars(self.guard).items():
            tensor.copy_(optimizer.pop(f"guard/{name}"))
        state = checkpoint.read_state(path)
        optim.load_optimizer_state(self.model, self.optimizer, optimizer, state["optimizer"])
        if self.ema is not None:
            average = checkpoint.read_tensors(path, "ema")  # none if the run had no average until now: begin with it
            weights.load_into(self.ema.model, average or weights.named_tensors(self.model), origin=str(path))
        self.stream.load_state_dict(state["data"])
        self.meters.sums = state["meters"]
        self.evaluated = state["evaluated"]
        self.step = checkpoint.read_manifest(path)["step"]
        self.saved = path
        checkpoint.set_rng_state(checkpoint.read_tensors(path, "rng") or {}, state["rng"])


# ---------------------------------------------------------------------------------------------------------------------
# Starting


def autocast(precision: str, device: torch.device) -> Any:
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def describe(state: "Run") -> str:
    model, task = state.recipe.model, state.recipe.task
    size = sum(p.numel() for p in state.parameters)
    return (
        f"{model.name if model else '?'} ({size:,} parameters) on {task.name if task else '?'}, {state.device}, "
        f"{state.recipe.train.precision}, recipe {configs.fingerprint(state.recipe)}, in {state.run}"
    )
