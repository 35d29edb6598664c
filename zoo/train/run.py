"""Everything that training changes, so that it can be saved, put back, read and evaluated as one."""

import contextlib
import itertools
import json
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
from zoo.train.log import Meters, RunLog
from zoo.train.optim import Ema, Guard
from zoo.train.parallel import Ranks
from zoo.train.recipe import Recipe, TrainConfig, better, parse_best, parse_stop, reached
from zoo.train.signals import Signals


class Diverged(RuntimeError):
    """Too many non-finite steps in a row."""


@dataclass
class Reading:
    """Numbers of a step, on their way from the device; `after` tells when they have arrived.

    reports  (ranks, micro-batches + 1): 1 where a rank's loss was not finite, and the signal that it got
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
        self.best: checkpoint.Best | None = None  # the best evaluation so far, where train.best asks for it
        self.improved: float | None = None  # its number, while its checkpoint is not yet written
        self.waited = 0  # evaluations since
        self.finished = ""  # why an evaluation ended the run: train.stop_when, or patience
        self.signal = 0  # that a rank got, as all of them know
        self.skipped: list[tuple[int, str]] = []  # the last few steps left out, and their batches
        self.bad = 0  # samples that could not be read, as far as told
        checkpoint.seed_python(config.seed + ranks.rank)  # again: what building imported may have drawn
        if ranks.rank > 0:
            torch.manual_seed(config.seed + ranks.rank)  # dropout of its own
        if found is not None:
            self._restore(found)

    def _stream(self, split: str, prefetch: int) -> Prefetch:
        """Training: a micro-batch for each rank that reads. Others: whole rows for every rank, in batches whose size
        does not depend on the number of ranks, so that evaluation adds up the same numbers on any number."""
        config, ranks = self.recipe.train, self.ranks
        if split == "train":
            size, rank, world = self.micro, ranks.data_rank, ranks.data_world
        else:
            size = config.eval_batch_size or config.micro_batch_size or config.batch_size
            rank, world = ranks.rank, ranks.world
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
        self.signal = self.signal or int(reading.reports[:, -1].max().item())
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
            f"step {reading.step} was skipped: loss {row['sum/loss']}, gradient norm {row['norm']}; "
            f"the batch at {batch}"
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
        for rank, part in reading.reports[:, :-1].nonzero().tolist() if ranks.world > 1 else []:
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
            for batch in itertools.islice(stream, mine):
                if one and signals.received:
                    return
                yield batch
                bar.update()

        last = "this batch of the validation, which resuming begins anew" if one else "the validation"
        ranks.mark(f"evaluation after step {self.step}")
        model = self.averaged
        with (
            ranks.uncompiled(),
            checkpoint.undisturbed_rng(self.recipe.train.seed),
            autocast(self.recipe.train.precision, self.device),
            self._stream("valid", 2) as stream,
            log.bar("validating", batches_of(stream.stream, mine)) as bar,
            signals.waiting_for(last),
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
        self.finished = self.recipe.train.stop_when if reached(self.recipe.train.stop_when, values) else ""
        self._rank(values)
        values = {f"valid/{name}": value for name, value in values.items()}
        self.last |= values
        rules = (parse_best(self.recipe.train.best), parse_stop(self.recipe.train.stop_when))
        log.evaluation_row(self.step, values, ["valid/loss", *(f"valid/{rule[0]}" for rule in rules if rule)])

    def _rank(self, values: dict[str, float]) -> None:
        """Whether this evaluation is the best so far, and whether the run has waited long enough for a better one."""
        config = self.recipe.train
        if not config.best:
            return
        self.improved = better(config.best, values, None if self.best is None else self.best.value)
        self.waited = 0 if self.improved is not None else self.waited + 1
        if config.patience and self.waited >= config.patience:
            self.finished = self.finished or self._out_of_patience

    @property
    def _out_of_patience(self) -> str:
        config = self.recipe.train
        return f"{config.patience} evaluations without a better one ({config.best})" if config.patience else ""

    @torch.no_grad()
    def sample(self, log: RunLog) -> None:
        model = self.averaged
        self.ranks.mark(f"samples after step {self.step}")
        if self.ranks.rank > 0:
            return
        seed = self.recipe.train.seed
        with self.ranks.uncompiled(), checkpoint.undisturbed_rng(seed), self._stream("valid", 1) as stream:
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
            "waited": self.waited,
            "finished": self.finished,
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
        config, root = self.recipe.train, self.run / "checkpoints"
        self.saved = checkpoint.save(root, self.step, content, keep=config.keep, ranks=ranks)
        if self.improved is not None:
            step, value = self.evaluated, self.improved
            self.best = ranks.first(lambda: checkpoint.write_best(root, config.best, step, value))
            self.improved = None
        return self.saved

    def _restore_weights(self, model: nn.Module, path: Path) -> None:
        """Of a checkpoint that `checkpoint.latest` has verified, into modules that are whole."""
        weights.load_into(model, checkpoint.read_tensors(path, "model") or {}, origin=str(path))
        if self.ema is not None:
            average = checkpoint.read_tensors(path, "ema")  # none if the run had no average until now: begin with it
            weights.load_into(self.ema.model, average or weights.named_tensors(model), origin=str(path))

    def _restore(self, path: Path) -> None:
        """All the rest. Ranks that were not there when it was saved keep the random numbers that they began with."""
        optimizer = checkpoint.read_tensors(path, "optimizer") or {}
        for name, tensor in vars(self.guard).items():
            tensor.copy_(optimizer.pop(f"guard/{name}"))
        state = checkpoint.read_state(path)
        optimizer = parallel.slices_of(self.ranks, self.parameters, optimizer)
        optim.load_optimizer_state(self.held, self.optimizer, optimizer, state["optimizer"])
        self.stream.load_state_dict(state["data"])
        self.meters.sums = state["meters"]
        self.evaluated = state["evaluated"]
        reasons = (self.recipe.train.stop_when, self._out_of_patience)
        self.finished = state["finished"] if state.get("finished") in reasons else ""
        self.step = checkpoint.read_manifest(path)["step"]
        self.saved = path
        best = checkpoint.read_best(path.parent)
        if best is not None and best.rule == self.recipe.train.best and best.step <= self.step:
            self.best, self.waited = best, state.get("waited", 0)
        rank = self.ranks.rank
        rng = checkpoint.read_tensors(path, f"rng.rank{rank}" if rank else "rng")
        if rng is not None:
            checkpoint.set_rng_state(rng, state["rng_ranks"][rank] if rank else state["rng"])


def autocast(precision: str, device: torch.device) -> Any:
    """The context that a forward pass of this `train.precision` runs in, for training and evaluation alike."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def batches_of(stream: Any, most: int | None) -> int | None:
    """In one pass, where that is known: what a progress bar counts up to."""
    known = [count for count in (getattr(stream, "batches", None), most) if count is not None]
    return min(known, default=None)


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
