"""A tiny model and task for the trainer's tests: no backbone, no text. Importable by the processes that tests start."""

import contextlib
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from zoo import registry
from zoo.config import Choice
from zoo.data import SourceStream, StridedWindows, Windows
from zoo.model import Output
from zoo.task import Media, Task
from zoo.train import Recipe, TrainConfig

VOCABULARY = 11


@dataclass
class ToyModelConfig:
    width: int = 8
    dropout: float = 0.2

    def build(self):
        return ToyModel(self)


class ToyModel(nn.Module):
    """Next token from this one: embedding, dropout (so that the RNG matters), norm, a tied output."""

    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, config.width)
        self.mix = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.drop = nn.Dropout(config.dropout)
        self.out = nn.Linear(config.width, VOCABULARY, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, batch):
        if self.training:
            self.seen += batch.targets.shape[0]
        logits = self.out(self.norm(self.drop(torch.tanh(self.mix(self.embed(batch.inputs))))))
        flat, targets = logits.flatten(0, 1).float(), batch.targets.flatten()
        loss = nn.functional.cross_entropy(flat, targets, ignore_index=-100, reduction="sum")
        scored = targets != -100
        hits = ((flat.argmax(-1) == targets) & scored).sum()
        return Output(loss, scored.sum(), {"accuracy": (hits, scored.sum())})


@dataclass
class ToyConfig:
    tokens: int = 700
    length: int = 6


@dataclass
class Faults:
    """What happens when the training example at a position reaches the model."""

    nan_at: list[int] = field(default_factory=list)
    raise_at: int = -1
    sigterm_at: int = -1
    sigint_at: int = -1
    delay: float = 0.0


class UnevenWindows(Windows):
    def __init__(self, tokens, config, seed):
        super().__init__(tokens, config.length, seed=seed)
        self.config = config

    def item(self, position):
        return (position, *super().item(position))

    def collate(self, items):
        batch = super().collate([pair for _, *pair in items])
        # Uneven counts between micro-batches: every third example scores half of its targets
        for row, (position, *_) in enumerate(items):
            if position % 3 == 0:
                batch.targets[row, : self.config.length // 2] = -100
        batch.condition = [position for position, *_ in items]
        return batch


class Loss:
    def __init__(self):
        self.total = torch.zeros(2, dtype=torch.float64)

    def update(self, model, batch):
        output = model(batch)
        self.total += torch.stack([output.loss_sum.double(), output.count.double()]).cpu()

    def reduce(self, ranks):
        self.total = ranks.sum(self.total)

    def compute(self):
        return {"loss": (self.total[0] / self.total[1]).item()}


class ToyTask(Task):
    Config = ToyConfig
    domain = "toy"

    def __init__(self, config, assets=None):
        self.config = config
        self.assets = assets

    def tokens(self):
        return np.random.default_rng(7).integers(0, VOCABULARY, self.config.tokens).astype(np.uint8)

    def save_assets(self, folder):
        (folder / "toy.txt").write_text("toy")

    def provenance(self):
        return {"tokens": self.config.tokens, "shape": (1, 2)}

    def stream(self, split, *, batch_size, rank=0, world=1, seed=0):
        if split == "train":
            source = UnevenWindows(self.tokens(), self.config, seed)
            return SourceStream(source, batch_size=batch_size, rank=rank, world=world)
        source = StridedWindows(self.tokens()[:100], self.config.length, stride=3)
        return SourceStream(source, batch_size=batch_size, rank=rank, world=world, endless=False)

    def metrics(self, split):
        return {"loss": Loss()}

    def media(self, model, batch):
        assert not model.training
        torch.rand(3)  # samples draw random numbers; training must not notice
        return Media(
            text={"sample": "tokens: " + " ".join(map(str, batch.inputs[0].tolist()))},
            images={"picture": torch.rand(3, 4, 5)},
            audio={"sound": (torch.rand(80) * 2 - 1, 8000)},
        )


class FaultyModel(ToyModel):
    """Faults strike when a batch reaches the model (a thread reads batches ahead of that)."""

    faults: Faults | None = None
    fired: set = set()  # all but nan strike once: a resumed run gets past them

    def forward(self, batch):
        output = super().forward(batch)
        faults = FaultyModel.faults
        if not (self.training and faults and batch.condition):
            return output
        if faults.delay:
            time.sleep(faults.delay)
        if any(place in faults.nan_at for place in batch.condition):
            output.loss_sum = output.loss_sum * float("nan")
        if strikes(faults.raise_at, batch, "raise"):
            raise RuntimeError("injected")
        if strikes(faults.sigterm_at, batch, "sigterm"):
            os.kill(os.getpid(), signal.SIGTERM)
        if strikes(faults.sigint_at, batch, "sigint"):
            os.kill(os.getpid(), signal.SIGINT)
        return output


def strikes(place, batch, kind):
    if place not in batch.condition or (kind, place) in FaultyModel.fired:
        return False
    FaultyModel.fired.add((kind, place))
    return True


@dataclass
class FaultyModelConfig(ToyModelConfig):
    def build(self):
        return FaultyModel(self)


def install():
    """Registries that hold the toys alone."""
    registry.tasks._load = registry.models._load = None
    registry.tasks._entries = {"toy": ToyTask}
    registry.models._entries = {"toy_mlp": lambda: FaultyModelConfig()}


@contextlib.contextmanager
def installed():
    """`install`, and afterwards what was there before."""
    tables = (registry.tasks, registry.models)
    kept = [(table.names(), table._entries, table._load) for table in tables]  # names: the domains are in by now
    install()
    try:
        yield
    finally:
        for table, (_, entries, load) in zip(tables, kept, strict=True):
            table._entries, table._load = entries, load


def recipe(task=None, model=None, **train):
    defaults = {"steps": 12, "batch_size": 8, "micro_batch_size": 4, "log_every": 3, "save_every": 4, "keep": 2}
    config = TrainConfig(**{**defaults, "ema": 0.9, "device": "cpu", **train})
    config.schedule.warmup = 2
    return Recipe(Choice("toy", task or ToyConfig()), Choice("toy_mlp", model or FaultyModelConfig()), config)


def train_until_it_writes(run: Path, name: str):
    """For a process of its own, which kills itself when it has just opened, emptied or is about to rename or make a
    path below `run` with `name` in it: the worst moment of any write."""
    from zoo.train import train

    striking: list[bool] = []

    def hook(event: str, arguments: tuple) -> None:
        if striking or event not in ("open", "os.rename", "os.mkdir") or not str(arguments[0]).startswith(str(run)):
            return
        writing = event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        below = [str(path).removeprefix(str(run)) for path in arguments[:2] if isinstance(path, (str, Path))]
        if writing and any(name in path for path in below):
            if event == "open":
                striking.append(True)  # this open comes by here, too
                os.open(arguments[0], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    install()
    sys.addaudithook(hook)
    train(recipe(steps=8), run, resume=True)


def train_until_killed(run: Path, resume: bool, delay: float):
    """For a process of its own that the test kills. delay: seconds a micro-batch."""
    from zoo.train import train

    torch.set_num_threads(1)
    install()
    FaultyModel.faults = Faults(delay=delay)
    train(recipe(steps=100_000, save_every=1, ema=0.9, eval_every=5), run, resume=resume)
