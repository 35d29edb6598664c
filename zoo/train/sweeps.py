"""One recipe at several learning rates and seeds, all replicas as one batched model.

Small models leave a GPU idle: a step of one costs what a step of sixteen does. The replicas share the batches, those of
train.seed, and the dropout noise; each has its own initial weights (those that `zoo train` begins with under that
seed), learning rate, clipping, guard and early end (train.stop_when). Without dropout, and where the order of batches
does not depend on the seed, each gets the result that `zoo train` would give it alone. Else it gets the one of a stack
of its own: a run alone draws noise and order from its own seed, all replicas from the recipe's, so that between seeds
of a stack the initial weights alone differ.

    folder/lr0.001-seed0/       a run like any other: zoo evaluate, zoo sample and load_run take it
    folder/checkpoints/         of the whole stack, while there are replicas to train
"""

import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo import config as configs
from zoo import recording
from zoo.config import ConfigError
from zoo.data import Prefetch
from zoo.model import Batch, Model
from zoo.task import Task
from zoo.train import checkpoint, graph, optim
from zoo.train.log import RunLog, drop_rows_after, number
from zoo.train.recipe import (
    Recipe,
    ResumeError,
    make_model,
    make_task,
    pick_device,
    reached,
    what_a_number_carries,
    write_run_files,
)
from zoo.train.run import autocast, batches_of
from zoo.train.signals import Signals
from zoo.train.stack import Reading, Stack

COMPILING = 20_000  # steps of a small model that take about as long as compiling it for another size of the stack


@dataclass(frozen=True)
class Replica:
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"lr{self.lr:g}-seed{self.seed}"

    def recipe(self, recipe: Recipe) -> Recipe:
        """What `zoo train` would be given for this one alone."""
        train = replace(recipe.train, seed=self.seed, optimizer=replace(recipe.train.optimizer, lr=self.lr))
        return replace(recipe, train=train)


class Interrupted(SystemExit):
    """Ctrl-C (code 130) or SIGTERM (143): the stack was saved first."""


def sweep(recipe: Recipe, folder: Path, replicas: Sequence[Replica]) -> list[Path]:
    """Train all replicas; returns their runs. Called again it goes on where it was, and does nothing when all is done.

    A replica that stays without a finite step for more than train.max_skipped steps is left as it is: its run is that
    of its last good weights. Raises ConfigError for what a stack cannot do, ResumeError when the folder holds another
    sweep, and Interrupted after Ctrl-C or SIGTERM.
    """
    runs = [folder / replica.name for replica in replicas]
    check(recipe, replicas)
    if all(checkpoint.steps_in(run / "checkpoints") for run in runs):
        return runs
    device = pick_device(recipe.train.device)
    task = make_task(recipe)
    models = [first_weights(replica.recipe(recipe), task) for replica in replicas]
    state = Sweep(recipe, folder, task, list(replicas), models, device)
    with Signals() as signals, RunLog(folder, step=state.step, steps=recipe.train.steps) as log, state.stream:
        log.say(f"{len(replicas)} replicas of {configs.fingerprint(recipe)} on {device}, in {folder}")
        state.train(log, signals)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # every replica is a run of its own now
    return runs


def check(recipe: Recipe, replicas: Sequence[Replica]) -> None:
    train = recipe.train
    refused = {
        "train.ema": (train.ema != 0, "0"),
        "train.precision": (train.precision == "fp16", "fp32 or bf16"),
        "train.micro_batch_size": (train.micro_batch_size not in (None, train.batch_size), "null"),
        "train.sample_every": (train.sample_every != 0, "0"),
        "train.best": (train.best != "", "''"),
        "backbone_from": (recipe.backbone_from != "", "''"),
    }
    for name, (wrong, takes) in refused.items():
        if wrong:
            raise ConfigError(f"{name} is not for stacked replicas; it takes {takes} there")
    if not replicas or len({replica.name for replica in replicas}) < len(replicas):
        raise ConfigError(f"replicas {[replica.name for replica in replicas]}; they take different rates or seeds")


def first_weights(recipe: Recipe, task: Task) -> Model:
    """As `train` makes them."""
    checkpoint.seed_everything(recipe.train.seed)
    model = make_model(recipe, task)
    if not isinstance(model, Model):
        raise ConfigError(f"a {type(model).__name__} has no backbone and head; only zoo's Model can be stacked")
    return model


class Sweep:
    """The stack and what goes with it. `places` are the replicas that are still in it, by their number; `active` says
    which of them go on."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        task: Task,
        replicas: list[Replica],
        models: list[Model],
        device: torch.device,
    ):
        self.recipe, self.folder, self.task, self.replicas, self.device = recipe, folder, task, replicas, device
        self.stack = Stack(models, recipe.train.optimizer, device)
        self.facts = [what_a_number_carries(replica.recipe(recipe), task) for replica in replicas]
        self.places = list(range(len(replicas)))
        self.active = torch.ones(len(replicas), dtype=torch.bool, device=device)
        self.stuck = torch.zeros(len(replicas), device=device)  # steps in a row that were not taken
        self.step = 0
        train = recipe.train
        stream = task.stream("train", batch_size=train.batch_size, seed=train.seed)
        self.stream = Prefetch(stream, depth=train.prefetch, pin=device.type == "cuda")
        checkpoint.seed_everything(train.seed)  # dropout's noise
        self.restore()
        self.rates = self.rates_now()
        recorded = train.graph and device.type in recording.DEVICES
        self.recorder = graph.Recorder(self.update, device) if recorded else None

    def rates_now(self) -> Tensor:
        lrs = [self.replicas[place].lr for place in self.places]
        return torch.tensor(lrs, dtype=torch.float32, device=self.device)

    # -- training ------------------------------------------------------------------------------------------------------

    def train(self, log: RunLog, signals: Signals) -> None:
        config, batches = self.recipe.train, iter(self.stream)
        self.stack.mode(training=True)
        while self.step < config.steps and self.places:
            batch = next(batches)
            share = optim.lr_share(config.schedule, self.step, config.steps)
            # The smaller batch at the end of a segment is not worth a graph of its own
            whole = config.compile and rows_of(batch) == config.batch_size
            reading = (self.recorder or self.update)(batch, self.rates * share, self.active, whole)
            self.stuck = torch.where(reading.taken | ~self.active, 0, self.stuck + 1)
            self.step += 1
            seconds = log.advance(self.step)
            log.count(0.0, seconds)
            last = self.step == config.steps
            if self.step % config.log_every == 0 or last:
                self.tell(reading, log)
            if not self.places:
                break
            if config.eval_every and (self.step % config.eval_every == 0 or last):
                log.pause()
                self.evaluate(log, signals)
                log.go_on()
            if signals.received or (config.save_every and self.step % config.save_every == 0 and not last):
                self.save()
            if signals.received:
                log.say(f"stopped by {signals.received.name} after step {self.step}; start it again to go on")
                raise Interrupted(128 + signals.received)
        self.finish(self.places, "")

    def update(self, batch: Batch, rates: Tensor, active: Tensor, compiled: bool) -> Reading:
        place = autocast(self.recipe.train.precision, self.device)
        return self.stack.train_step(batch.to(self.device), rates, active, place, compiled=compiled)

    def tell(self, reading: Reading, log: RunLog) -> None:
        """A row of numbers; and the replicas that have been stuck are given up."""
        total, count = (x.tolist() for x in reading.sums["loss"])
        loss = {self.replicas[place].name: total[i] / max(1, count[i]) for i, place in enumerate(self.places)}
        going = self.active.tolist()
        live = [loss[self.replicas[place].name] for i, place in enumerate(self.places) if going[i]]
        for place, on in zip(self.places, going, strict=True):
            if on:
                self.note(place, {"train/loss": loss[self.replicas[place].name]})
        log.train_row(self.step, {"train/loss": sum(live) / max(1, len(live))})
        lost = [
            place for i, place in enumerate(self.places) if going[i] and self.stuck[i] > self.recipe.train.max_skipped
        ]
        for place in lost:
            log.say(f"{self.replicas[place].name} has had no finite step for a while: it ends at step {self.step}")
        self.leave(lost, "")

    def evaluate(self, log: RunLog, signals: Signals) -> None:
        """All replicas on the validation split; those that fulfil train.stop_when end."""
        going = dict(zip(self.places, self.active.tolist(), strict=True))
        scores = {place: values for place, values in self.scores(log, signals).items() if going[place]}
        rule = self.recipe.train.stop_when
        done = [place for place, values in scores.items() if reached(rule, values)]
        for place, values in scores.items():
            self.note(place, {f"valid/{name}": value for name, value in values.items()})
        spread: dict[str, float] = {}
        for name in next(iter(scores.values())):
            held = [values[name] for values in scores.values()]
            spread |= {f"valid/{name}/least": min(held), f"valid/{name}/most": max(held)}
        log.evaluation_row(self.step, spread)
        for place in done:
            log.say(f"{self.replicas[place].name}: {rule} at step {self.step}")
        self.leave(done, rule)

    @torch.no_grad()
    def scores(self, log: RunLog, signals: Signals) -> dict[int, dict[str, float]]:
        train = self.recipe.train
        sums: dict[str, list[Tensor]] = {}
        self.stack.mode(training=False)
        stream = self.task.stream("valid", batch_size=train.eval_batch_size or train.batch_size)
        most = train.eval_batches or None
        with (
            checkpoint.undisturbed_rng(train.seed),
            log.bar("validating", batches_of(stream, most)) as bar,
            signals.waiting_for("the validation"),
        ):
            for batch in itertools.islice(stream, most):
                parts = self.stack.score(batch.to(self.device), autocast(train.precision, self.device))
                for name, (total, count) in parts.items():
                    old = sums.get(name, [torch.zeros((), device=self.device)] * 2)
                    sums[name] = [old[0] + total.double(), old[1] + count.double()]
                bar.update()
        self.stack.mode(training=True)
        means = {name: (total / count.clamp(min=1)).tolist() for name, (total, count) in sums.items()}
        return {place: {name: values[i] for name, values in means.items()} for i, place in enumerate(self.places)}

    def leave(self, ended: list[int], rule: str) -> None:
        """These replicas are done: their runs are written. They stay in the stack as they are until half of it is done;
        compiled code is for one size of the stack, and near the end no other is worth compiling."""
        if not ended:
            return
        self.finish(ended, rule)
        self.active &= torch.tensor([place not in ended for place in self.places], device=self.device)
        keep = self.active.nonzero().flatten().tolist()
        stays = self.recipe.train.compile and self.recipe.train.steps - self.step < COMPILING
        if not keep or (2 * len(keep) <= len(self.places) and not stays):
            if self.recorder is not None:
                self.recorder.clear()
            self.stack.keep(keep)
            self.places = [self.places[i] for i in keep]
            self.active, self.stuck, self.rates = self.active[keep], self.stuck[keep], self.rates_now()

    def note(self, place: int, values: dict[str, float]) -> None:
        """A row in the replica's own metrics.jsonl, as a run alone has it."""
        run = self.folder / self.replicas[place].name
        run.mkdir(parents=True, exist_ok=True)
        with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
            row = {name: number(value) for name, value in values.items()}
            file.write(json.dumps({"step": self.step, **row}) + "\n")

    # -- what it leaves ------------------------------------------------------------------------------------------------

    def finish(self, places: list[int], rule: str) -> None:
        """Each of them becomes a run of its own, unless it is one already."""
        for place in places:
            run = self.folder / self.replicas[place].name
            if checkpoint.steps_in(run / "checkpoints"):
                continue
            recipe, facts = self.replicas[place].recipe(self.recipe), self.facts[place]
            write_run_files(recipe, self.task, run, self.device, facts)
            content = checkpoint.Content(
                {"model": self.stack.replica(self.places.index(place))},
                {"finished": rule},
                {"recipe": configs.to_dict(recipe), "world": 1, "stacked": len(self.replicas), **facts},
            )
            checkpoint.save(run / "checkpoints", self.step, content)

    def save(self) -> None:
        rng, rng_plain = checkpoint.rng_state()
        tensors = {"model": dict(self.stack.parameters), "optimizer": self.stack.state(), "rng": rng}
        tensors["optimizer"] |= {"active": self.active, "stuck": self.stuck}
        state = {"rng": rng_plain, "data": self.stream.state_dict(), "places": self.places}
        checkpoint.save(
            self.folder / "checkpoints", self.step, checkpoint.Content(tensors, state, self.identity()), keep=1
        )

    def identity(self) -> dict[str, Any]:
        recipe = configs.to_dict(self.recipe)
        return {
            "recipe": recipe,
            "replicas": [replica.name for replica in self.replicas],
            "data": self.facts[0]["data"],
        }

    def restore(self) -> None:
        path, _ = checkpoint.latest(self.folder / "checkpoints")
        step = 0 if path is None else checkpoint.read_manifest(path)["step"]
        for replica in self.replicas:
            if not checkpoint.steps_in(self.folder / replica.name / "checkpoints"):
                drop_rows_after(self.folder / replica.name / "metrics.jsonl", step)
        if path is None:
            return
        manifest, state = checkpoint.read_manifest(path), checkpoint.read_state(path)
        mine = self.identity()
        if changed := configs.difference({name: manifest.get(name) for name in mine}, mine):
            raise ResumeError(
                f"{self.folder} holds another sweep; remove it, or take another folder:\n" + "\n".join(changed)
            )
        self.places = state["places"]
        self.stack.keep(self.places)
        tensors = checkpoint.read_tensors(path, "optimizer") or {}
        self.active, self.stuck = (tensors.pop(name).to(self.device) for name in ("active", "stuck"))
        self.stack.load(checkpoint.read_tensors(path, "model") or {}, tensors)
        self.stream.load_state_dict(state["data"])
        self.step = manifest["step"]
        rng = checkpoint.read_tensors(path, "rng")
        if rng is not None:
            checkpoint.set_rng_state(rng, state["rng"])


def rows_of(batch: Batch) -> int:
    return len(batch.inputs) if isinstance(batch.inputs, Tensor) else 0
