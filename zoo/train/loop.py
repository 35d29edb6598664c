"""One readable training loop, for any module with `forward(batch) -> Output` and any task.

    for each step:  micro-batches -> sums of gradients and counts, over micro-batches and ranks
                    -> divide, clip, guarded step -> moving average
                    then, when due: a row of metrics, a checkpoint, an evaluation, samples

A loss is a sum and a count, so how a batch is split into micro-batches and between ranks changes nothing but rounding.
Numbers are read one step after the device was asked for them. Everything that decides a step's result is in the
checkpoint. All ranks run this loop and take every turn in it together; the first one writes (zoo/train/parallel.py).
"""

import contextlib
import itertools
import json
import shlex
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo import config as configs
from zoo import weights
from zoo.config import ConfigError
from zoo.data import Prefetch
from zoo.task import Task, run_metrics
from zoo.train import checkpoint, optim, parallel
from zoo.train.log import Meters, RunLog, Silence
from zoo.train.optim import Ema, Guard
from zoo.train.parallel import Ranks
from zoo.train.profile import Profile, peak_flops, training_flops
from zoo.train.recipe import (
    Recipe,
    TrainConfig,
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
    profile: bool = False,
) -> Result:
    """Train `recipe` in the folder `run`; with `resume`, go on from its newest whole checkpoint (or begin).

    allow_changes  resume although the recipe or the data differ in more than cadences
    command        what a person types to go on, for the message after an interruption
    profile        write a trace of a few steps, and a table of where their time went, into run/profile
    Raises ResumeError, Diverged, checkpoint.NonFinite, checkpoint.DiskFull, and Interrupted after Ctrl-C or SIGTERM.
    """
    device = pick_device(recipe.train.device)
    ranks = parallel.start(recipe.train.parallel, device)
    try:
        result = _train(recipe, Path(run), ranks, device, resume, allow_changes, command, profile)
    except Interrupted:
        ranks.close()
        raise
    except BaseException as error:
        ranks.close(error)
        raise
    ranks.close()
    return result


def _train(
    recipe: Recipe,
    run: Path,
    ranks: Ranks,
    device: torch.device,
    resume: bool,
    allow_changes: bool,
    command: str,
    profile: bool,
) -> Result:
    config = recipe.train
    found, notes = ranks.first(lambda: find_start(recipe, run, resume))
    checkpoint.seed_everything(config.seed)
    task = ranks.in_turn(lambda: make_task(recipe))
    model = make_model(recipe, task)
    facts = what_a_number_carries(recipe, task)
    notes += check_same(found, recipe, facts, allow_changes)
    state = Run(recipe, run, task, model, device, ranks, facts, found)
    if found is not None:
        notes.append(f"resuming {run} from {found.name}")
    ranks.first(lambda: write_run_files(recipe, task, run, device, facts))
    go_on = command or f"zoo train {shlex.quote(str(run / 'recipe.yaml'))} --run {shlex.quote(str(run))} --resume"
    peak = peak_flops(device, config.precision)
    writer = RunLog if ranks.rank == 0 else Silence
    log = writer(run, step=state.step, steps=config.steps, peak=peak * ranks.world if peak else None)
    with Signals() as signals, log, state.stream:
        for note in notes:
            log.say(note)
        for orphan in ranks.first(lambda: checkpoint.sweep(run / "checkpoints")):
            log.say(f"removed {orphan.name}, left half-written by a process that was stopped")
        log.say(describe(state))
        result = _loop(state, log, signals, go_on, Profile(run / "profile", ranks.rank, device) if profile else None)
        log.say(f"done: {result.step} steps, {result.checkpoint}")
    return result


def _loop(state: "Run", log: RunLog, signals: Signals, go_on: str, profile: Profile | None) -> Result:
    config = state.recipe.train
    forward = state.ranks.trainer_of(state.model, config.compile)
    batches = iter(state.stream)
    pending: Reading | None = None

    if state.due(config.eval_every) and state.evaluated < state.step:  # interrupted between a step and its evaluation
        state.evaluate(log, signals)
    while state.step < config.steps:
        reading = _step(state, forward, batches, signals)
        state.step += 1
        if profile is not None and (table := profile.step()):
            log.say(f"profile, in {profile.folder}:\n{table}")
        reading.seconds = log.advance(state.step)
        if pending is not None:
            state.read(pending, log)
        pending = reading

        evaluating, sampling = state.due(config.eval_every), state.due(config.sample_every)
        saving = state.due(config.save_every) or state.step == config.steps
        if not (evaluating or sampling or saving or state.stop(signals)):
            continue
        state.read(pending, log)
        pending = None
        stop = state.stop(signals)
        log.pause()
        if evaluating:
            state.evaluate(log, signals)
            stop = state.stop(signals)
        if sampling and not stop:
            state.sample(log)
            stop = state.stop(signals)
        if saving or stop:
            state.save()
            log.flush()
            stop = state.stop(signals)
        if stop:
            log.say(f"stopped by {stop.name} after step {state.step}; saved {state.saved}. To go on:\n  {go_on}")
            raise Interrupted(128 + stop)
        log.go_on()
    if profile is not None:
        profile.close()
    return Result(state.run, state.step, state.saved or state.save(), state.last, int(state.guard.skipped.item()))


@dataclass
class Reading:
    """Numbers of a step, on their way from the device; `after` tells when they have arrived.

    reports  (ranks, 1 + micro-batches): the signal that each rank got, and 1 where its loss was not finite
    """

    step: int
    data: dict[str, Any]  # the data position before the step, which names its batch
    lr: float
    names: list[str]
    values: Tensor
    reports: Tensor
    after: Any = None
    seconds: float = 0.0

    def rows(self) -> dict[str, float]:
        if self.after is not None:
            self.after.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))


def _step(state: "Run", forward: Any, batches: Iterator[Any], signals: Signals) -> Reading:
    """One update: sums of losses, gradients and counts over micro-batches and ranks, then one guarded step."""
    config, device, ranks, guard = state.recipe.train, state.device, state.ranks, state.guard
    fp16 = config.precision == "fp16"
    lr = config.optimizer.lr * optim.lr_share(config.schedule, state.step, config.steps)
    optim.set_lr(state.optimizer, lr)
    position = state.stream.state_dict()
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    report = [torch.full((), float(signals.received or 0), dtype=torch.float64, device=device)]
    state.model.train()
    for part in range(state.parts):
        ranks.mark(f"step {state.step + 1}, data")
        if (batch := next(batches, None)) is None:
            raise ValueError(f"the training stream of {type(state.task).__name__} ended; it has to be endless")
        state.flops = state.flops or training_flops(state.model, batch) * state.parts * ranks.data_world
        batch = ranks.split(batch).to(device)
        ranks.mark(f"step {state.step + 1}, forward and backward")
        with ranks.micro_batch(forward, last=part == state.parts - 1):
            with autocast(config.precision, device):
                output = forward(batch)
            if fp16 and state.step == 0 and part == 0:
                guard.scale.copy_(ranks.min(optim.FIRST_SCALE / output.count.clamp(min=1)))
            (output.loss_sum * guard.scale if fp16 else output.loss_sum).backward()
        report.append((~torch.isfinite(output.loss_sum.detach())).double())
        for name, (total, count) in {"loss": (output.loss_sum, output.count), **output.metrics}.items():
            old = sums.get(name, (0.0, 0.0))
            sums[name] = (old[0] + total.detach().double(), old[1] + count.detach().double())

    ranks.mark(f"step {state.step + 1}, update")
    everyone = ranks.gather(torch.stack([t for pair in sums.values() for t in pair] + report))
    reports, flat = everyone[:, 2 * len(sums) :], everyone[:, : 2 * len(sums)].sum(dim=0)
    totals = {name: (flat[2 * i], flat[2 * i + 1]) for i, name in enumerate(sums)}
    state.take_gradients()
    norm, taken = optim.guarded_step(
        state.optimizer, guard, *totals["loss"], clip=config.optimizer.clip, fp16=fp16, ranks=ranks
    )
    state.drop_gradients()
    if state.ema is not None:
        state.ema.update(state.model, state.step, taken)

    names = ["taken", "in_a_row", "norm"] + [f"{part}/{name}" for name in totals for part in ("sum", "count")]
    values = torch.cat([torch.stack([taken.double(), guard.in_a_row.double(), norm.double()]), flat])
    after = None
    if device.type == "cuda":
        values, reports = values.to("cpu", non_blocking=True), reports.to("cpu", non_blocking=True)
        after = torch.cuda.Event()
        after.record()
    return Reading(state.step + 1, position, lr, names, values, reports, after)


class Run:
    """Everything that training changes, so that it can be saved and put back as one."""

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        task: Task,
        model: nn.Module,
        device: torch.device,
        ranks: Ranks,
        facts: dict[str, Any],
        found: Path | None = None,
    ):
        config = recipe.train
        self.recipe, self.run, self.task = recipe, run, task
        self.device, self.ranks, self.facts = device, ranks, facts
        self.micro, self.parts = micro_batches(config, ranks)
        self.ema = Ema(model, config.ema) if config.ema else None
        if found is not None:  # before the ranks part it
            self._restore_weights(model, found)
        self.model = model if ranks.sharded else model.to(device)
        if self.ema is not None:
            self.ema.model = self.ema.model if ranks.sharded else self.ema.model.to(device)
            ranks.shard(self.ema.model)
        self.skeleton = ranks.shard(self.model)
        self.parameters = dict(self.model.named_parameters())
        self.held = parallel.held(self.model)
        self.optimizer = optim.make_optimizer(self.model, config.optimizer, self.held)
        self.guard = Guard.new(device)
        self.stream = self._stream("train", config.prefetch)
        self.meters = Meters()
        self.step = self.evaluated = 0
        self.flops = 0.0  # of a step, on all ranks
        self.last: dict[str, float] = {}  # the newest value of each number
        self.saved: Path | None = None
        self.signal = 0  # that a rank got, as all of them know
        self.skipped: list[tuple[int, str]] = []  # the last few steps left out, and their batches
        self.bad = 0  # samples that could not be read, as far as told
        if ranks.rank > 0:
            checkpoint.seed_everything(config.seed + ranks.rank)  # dropout of its own
        if found is not None:
            self._restore(found)

    def _stream(self, split: str, prefetch: int) -> Prefetch:
        """Training: a micro-batch for each rank that reads. Others: batches of a size that does not depend on the number
        of ranks, whole rows for each of them, so that evaluation adds up the same numbers on any number of ranks."""
        config, ranks = self.recipe.train, self.ranks
        if split == "train":
            size, rank, world = self.micro, ranks.data_rank, ranks.data_world
        else:
            size, rank, world = config.micro_batch_size or config.batch_size, ranks.rank, ranks.world
        stream = self.task.stream(split, batch_size=size, rank=rank, world=world, seed=config.seed)
        return Prefetch(stream, depth=prefetch, pin=self.device.type == "cuda")

    def take_gradients(self) -> None:
        """Hand the gradients of slices to what the optimizer holds of them."""
        if self.ranks.sharded:
            for name, parameter in self.parameters.items():
                self.held[name].grad = None if parameter.grad is None else parallel.local(parameter.grad)

    def drop_gradients(self) -> None:
        for parameter in (*self.parameters.values(), *self.held.values()):
            parameter.grad = None

    def stop(self, signals: Signals) -> signal.Signals | None:
        """The signal to stop for; several ranks agree on it one step later."""
        if self.ranks.world == 1:
            return signals.received
        return signal.Signals(self.signal) if self.signal else None

    def due(self, every: int) -> bool:
        """Whether what is done every so many steps is due now; always at the end of a run."""
        return every > 0 and self.step > 0 and (self.step % every == 0 or self.step == self.recipe.train.steps)

    @property
    def averaged(self) -> nn.Module:
        """The weights to evaluate and sample: the moving average where there is one. Whole on every rank."""
        model = self.model if self.ema is None else self.ema.model
        return model if self.skeleton is None else self.skeleton.whole(model)

    def read(self, reading: Reading, log: RunLog) -> None:
        """Take in the numbers of an earlier step. Raises Diverged."""
        row = reading.rows()
        self.signal = self.signal or int(reading.reports[:, 0].max().item())
        log.count(row["count/loss"], reading.seconds, self.flops)
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
        batch = f"data {json.dumps(reading.data)}{self._guilty(reading)}"
        log.say(
            f"step {reading.step} was skipped: loss {row['sum/loss']}, gradient norm {row['norm']}; the batch at {batch}"
        )
        self.skipped = [*self.skipped, (reading.step, batch)][-8:]
        if row["in_a_row"] > self.recipe.train.max_skipped:
            listed = "; ".join(f"step {step}: {batch}" for step, batch in self.skipped)
            newest = checkpoint.newest_name(self.run / "checkpoints")
            raise Diverged(
                f"{row['in_a_row']:.0f} steps in a row were not finite, more than train.max_skipped = "
                f"{self.recipe.train.max_skipped}; the last is step {reading.step}. Their batches: {listed}. "
                f"The weights are as before them; the newest checkpoint is {newest}"
            )

    def _guilty(self, reading: Reading) -> str:
        """Which ranks' losses were not finite, and on which examples, where there are several ranks."""
        ranks, told = self.ranks, []
        for rank, part in reading.reports[:, 1:].nonzero().tolist() if ranks.world > 1 else []:
            place = f"rank {rank}, micro-batch {part}"
            if isinstance(first := reading.data.get("position"), int):
                first += (part * ranks.data_world + rank // ranks.config.context) * self.micro
                place += f" (examples {first} to {first + self.micro - 1})"
            told.append(place)
        return ": " + ", ".join(told) if told else ""

    def _tell_bad_samples(self, log: RunLog) -> None:
        bad: dict[int, str] = getattr(self.stream.stream, "bad", {})
        for place, why in list(bad.items())[self.bad :]:
            log.say(f"sample {place} cannot be read and was left out: {why}")
        self.bad = len(bad)

    @torch.no_grad()
    def evaluate(self, log: RunLog, signals: Signals) -> None:
        """The task's metrics on the validation split. If a signal comes in between, it is done on resuming."""
        batches, ranks = self.recipe.train.eval_batches, self.ranks
        mine = max(0, -(-(batches - ranks.rank) // ranks.world)) if batches else None
        one = ranks.world == 1  # several finish what they began

        def until_signal(stream: Any) -> Iterator[Any]:
            return itertools.takewhile(lambda _: not (one and signals.received), itertools.islice(stream, mine))

        ranks.mark(f"evaluation after step {self.step}")
        model = self.averaged
        with (
            checkpoint.undisturbed_rng(self.recipe.train.seed),
            autocast(self.recipe.train.precision, self.device),
            self._stream("valid", 2) as stream,
        ):
            values = run_metrics(
                model,
                self.task.metrics("valid"),
                stream,
                device=self.device,
                ranks=ranks,
                progress=until_signal,
            )
        if one and signals.received:
            return
        self.evaluated = self.step
        values = {f"valid/{name}": value for name, value in values.items()}
        self.last |= values
        log.evaluation_row(self.step, values)

    @torch.no_grad()
    def sample(self, log: RunLog) -> None:
        model = self.averaged
        self.ranks.mark(f"samples after step {self.step}")
        if self.ranks.rank > 0:
            return
        with checkpoint.undisturbed_rng(self.recipe.train.seed), self._stream("valid", 1) as stream:
            batch = next(iter(stream)).to(self.device)
            mode = model.training
            model.eval()
            log.media(self.step, self.task.media(model, batch))
            model.train(mode)

    def save(self) -> Path:
        """A checkpoint of the state between two steps."""
        ranks = self.ranks
        ranks.mark(f"saving after step {self.step}")
        optimizer, numbers = optim.optimizer_state(self.held, self.optimizer)
        guard = {f"guard/{name}": tensor for name, tensor in vars(self.guard).items()}
        rng, rng_plain = checkpoint.rng_state()
        whole = {"model": self.model, **({"ema": self.ema.model} if self.ema else {})}
        state = {
            "optimizer": numbers,
            "rng": rng_plain,
            "data": self.stream.state_dict(),
            "meters": self.meters.sums,
            "evaluated": self.evaluated,
            "rates": {"lr": [group["lr"] for group in self.optimizer.param_groups]},
        }
        tensors = parallel.tensors_to_save(ranks, whole, optimizer) | {"rng": rng}
        if ranks.rank == 0:
            tensors["optimizer"] |= guard
        else:
            tensors[f"rng.rank{ranks.rank}"] = tensors.pop("rng")
        if ranks.world > 1:
            state["rng_ranks"] = ranks.each(lambda: rng_plain)
        facts = {"recipe": configs.to_dict(self.recipe), "world": ranks.world, **self.facts}
        content = checkpoint.Content(tensors, state, facts)
        keep = self.recipe.train.keep
        self.saved = checkpoint.save(self.run / "checkpoints", self.step, content, keep=keep, ranks=ranks)
        return self.saved

    def _restore_weights(self, model: nn.Module, path: Path) -> None:
        """Of a checkpoint that `checkpoint.latest` has verified, into modules that are whole."""
        weights.load_into(model, checkpoint.read_tensors(path, "model") or {}, origin=str(path))
        if self.ema is not None:
            average = checkpoint.read_tensors(path, "ema")  # none if the run had no average until now: begin with it
            weights.load_into(self.ema.model, average or weights.named_tensors(model), origin=str(path))

    def _restore(self, path: Path) -> None:
        """All the rest. Ranks that were not there when it was saved keep the random numbers that they were seeded with."""
        optimizer = checkpoint.read_tensors(path, "optimizer") or {}
        for name, tensor in vars(self.guard).items():
            tensor.copy_(optimizer.pop(f"guard/{name}"))
        state = checkpoint.read_state(path)
        optimizer = parallel.slices_of(self.ranks, self.parameters, optimizer)
        optim.load_optimizer_state(self.held, self.optimizer, optimizer, state["optimizer"])
        self.stream.load_state_dict(state["data"])
        self.meters.sums = state["meters"]
        self.evaluated = state["evaluated"]
        self.step = checkpoint.read_manifest(path)["step"]
        self.saved = path
        rank = self.ranks.rank
        rng = checkpoint.read_tensors(path, f"rng.rank{rank}" if rank else "rng")
        if rng is not None:
            checkpoint.set_rng_state(rng, state["rng_ranks"][rank] if rank else state["rng"])


# ---------------------------------------------------------------------------------------------------------------------
# Starting


def autocast(precision: str, device: torch.device) -> Any:
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def micro_batches(config: TrainConfig, ranks: Ranks) -> tuple[int, int]:
    """(examples of a micro-batch, micro-batches of a step) on each rank. Raises ValueError for what does not divide."""
    world = ranks.data_world
    micro = config.micro_batch_size or max(1, config.batch_size // world)
    if config.batch_size % (micro * world):
        raise ConfigError(
            f"train.batch_size = {config.batch_size} examples a step cannot be shared evenly by {world} ranks with "
            f"micro-batches of {micro}; choose a multiple of {micro * world}, or another train.micro_batch_size"
        )
    return micro, config.batch_size // (micro * world)


def describe(state: "Run") -> str:
    model, task, ranks = state.recipe.model, state.recipe.task, state.ranks
    size = sum(p.numel() for p in state.parameters.values())
    context = f", {ranks.config.context} to a row" if ranks.config.context > 1 else ""
    spread = f" x {ranks.world} ({ranks.config.name}{context})" if ranks.world > 1 else ""
    return (
        f"{model.name if model else '?'} ({size:,} parameters) on {task.name if task else '?'}, {state.device}{spread}, "
        f"{state.recipe.train.precision}, recipe {configs.fingerprint(state.recipe)}, in {state.run}"
    )
