"""The music task: piano rolls as notes or as frames, and back; pictures, MIDI and sound of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tasks.audio.music_heads import END, GOES_ON, START
from tasks.audio.render import render, roll_picture, write_midi
from tasks.audio.scores import KEYS
from tasks.audio.waves import write_wav
from zoo import config as configs
from zoo.config import Choice
from zoo.data import IGNORED, Shuffled, SourceStream, epoch_rng
from zoo.generation import Sampling, generate
from zoo.model import Batch, Context, Model, ModelConfig
from zoo.registry import datasets
from zoo.task import Media, Metric, Request, Task

RATE = 16000  # of rendered sound
TOKENS_A_FRAME = 5  # four notes and the end: what a length is guessed by


def to_tokens(roll: np.ndarray, first: int = START) -> np.ndarray:
    """(T, 88) bool -> (N,) int64: `first`, then each frame's keys, lowest first, and END."""
    frames, keys = np.nonzero(np.pad(roll, ((0, 0), (0, 1)), constant_values=True))
    del frames
    return np.concatenate(([first], keys)).astype(np.int64)


def from_tokens(tokens: np.ndarray) -> np.ndarray:
    """The whole frames in (N,) tokens -> (T, 88) bool."""
    ended = np.cumsum(tokens == END)
    frame = ended - (tokens == END)
    roll = np.zeros((int(ended[-1]) if len(ended) else 0, KEYS), dtype=bool)
    sounding = (tokens < KEYS) & (frame < len(roll))
    roll[frame[sounding], tokens[sounding]] = True
    return roll


def to_frames(roll: np.ndarray, first: int = START) -> np.ndarray:
    """(T, 88) bool -> (T + 1, 90) uint8: a frame that marks the start, then the frames."""
    made = np.zeros((len(roll) + 1, KEYS + 2), dtype=np.uint8)
    made[0, KEYS + (first == GOES_ON)] = 1
    made[1:, :KEYS] = roll
    return made


class Pieces:
    """Training items: each epoch in an order of its own; moved by up to `transpose` semitones, as far as the keyboard
    goes; of a piece longer than `frames` a part."""

    def __init__(self, rolls: list[np.ndarray], layout: Any, collate: Any, *, seed: int, transpose: int, frames: int):
        self.rolls, self.layout, self.collate = rolls, layout, collate
        self.seed, self.transpose, self.frames = seed, transpose, frames
        self.order = Shuffled(range(len(rolls)), None, seed=seed)

    def __len__(self) -> int:
        return len(self.rolls)

    def item(self, position: int) -> np.ndarray:
        roll = self.rolls[self.order.item(position)]
        rng = epoch_rng(self.seed, position)
        keys = np.flatnonzero(roll.any(axis=0))
        if len(keys):
            lowest, highest = max(-self.transpose, -int(keys[0])), min(self.transpose, KEYS - 1 - int(keys[-1]))
            roll = np.roll(roll, int(rng.integers(lowest, highest + 1)), axis=1)
        start = int(rng.integers(len(roll) - self.frames + 1)) if len(roll) > self.frames else 0
        return self.layout(roll[start : start + self.frames], GOES_ON if start else START)


def few_lengths(count: int) -> int:
    """The next of eight lengths between a power of two and its double: what has one of few shapes can be recorded."""
    step = max(1, (1 << count.bit_length()) >> 4)
    return -(-count // step) * step


def packed(rows: list[np.ndarray], targets: Any, filling: int) -> Batch:
    """Pieces one after another in one row, then a document of `filling` that is not scored, perhaps an empty one;
    `targets` makes a row's targets of what follows each input."""
    inputs = np.concatenate([row[:-1] for row in rows])
    wanted = np.concatenate([targets(row[1:]) for row in rows])
    ends = np.cumsum([0, *(len(row) - 1 for row in rows)])
    spare = few_lengths(len(inputs)) - len(inputs)

    def filled(part: np.ndarray, value: int) -> torch.Tensor:
        return torch.from_numpy(np.concatenate((part, np.full((spare, *part.shape[1:]), value, part.dtype))))[None]

    bounds = torch.from_numpy(np.append(ends, len(inputs) + spare).astype(np.int32))
    return Batch(filled(inputs, filling), filled(wanted, IGNORED), ctx=Context(cu_seqlens=bounds))


def collate_notes(rows: list[np.ndarray]) -> Batch:
    return packed(rows, lambda following: following, END)


def collate_keys(rows: list[np.ndarray]) -> Batch:
    return packed(rows, lambda following: following[:, :KEYS].astype(np.int8), 0)


# ---------------------------------------------------------------------------------------------------------------------


class NatsPerFrame:
    """nats_per_frame      the mean over frames 2 to T of all pieces: the protocol of arXiv 1803.01271's code
    nats_per_frame_all  over all frames, the first of each piece included, which is predicted from nothing
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64)  # nats, frames, nats of first frames, pieces

    @torch.no_grad()
    def update(self, model: Any, batch: Batch) -> None:
        output = model(batch)
        self.sums += torch.stack([x.double() for x in (output.loss_sum, output.count, *output.metrics["first"])]).cpu()

    def reduce(self, ranks: Any) -> None:
        self.sums = ranks.sum(self.sums)

    def compute(self) -> dict[str, float]:
        nats, frames, first, pieces = self.sums.tolist()
        return {
            "loss": nats / max(1, frames),
            "nats_per_frame": (nats - first) / max(1, frames - pieces),
            "nats_per_frame_all": nats / max(1, frames),
            "frames": frames,
            "pieces": pieces,
        }


def key_baselines(train: list[np.ndarray], test: list[np.ndarray]) -> dict[str, float]:
    """Nats a frame, 2 to T, with independent keys: by how often each sounds, and by whether it sounded just before."""
    on = np.concatenate(train).sum(axis=0) + 1.0
    share = on / (sum(map(len, train)) + 2)
    follows = np.ones((2, 2, KEYS))  # before, now
    for roll in train:
        for sounded in (0, 1):
            was = roll[:-1] == sounded
            follows[sounded, 1] += (was & roll[1:]).sum(axis=0)
            follows[sounded, 0] += (was & ~roll[1:]).sum(axis=0)
    chance = follows[:, 1] / follows.sum(axis=1)
    order0 = order1 = frames = 0.0
    for roll in test:
        now, before = roll[1:], roll[:-1]
        order0 -= np.where(now, np.log(share), np.log1p(-share)).sum()
        given = np.where(before, chance[1], chance[0])
        order1 -= np.where(now, np.log(given), np.log1p(-given)).sum()
        frames += len(now)
    return {"order0_nats_per_frame": float(order0 / frames), "order1_nats_per_frame": float(order1 / frames)}


class MusicTask(Task):
    domain = "music"
    endings = (".mid", ".wav", ".png")

    @dataclass
    class Config:
        """protocol       joint over a frame's notes (head music_notes), or keys independent (head music_keys)
        transpose      training pieces by up to so many semitones each way
        frames         of a training piece at most; a longer one gives a part
        frame_seconds  of a rendered frame
        shown          pieces in TensorBoard, and frames of each
        """

        dataset: Choice | None = configs.choice(datasets, "music/jsb")
        protocol: Literal["joint", "keys"] = "joint"
        transpose: int = 0
        frames: int = 256
        frame_seconds: float = 0.4
        shown: int = 2
        shown_frames: int = 64

        def __post_init__(self):
            for name, least in (("transpose", 0), ("frames", 2), ("shown", 1), ("shown_frames", 1)):
                if getattr(self, name) < least:
                    raise ValueError(f"{name} = {getattr(self, name)}; it takes {least} or more")
            if self.frame_seconds <= 0:
                raise ValueError(f"frame_seconds = {self.frame_seconds}; it takes a number above 0")

    def __init__(self, config: Config, assets: Path | None = None):
        self.config = config = configs.build(self.Config, config)
        assert config.dataset is not None
        self.data = datasets.get(config.dataset.name)(config.dataset.config)
        self.joint = config.protocol == "joint"
        self._layout, self._collate = (to_tokens, collate_notes) if self.joint else (to_frames, collate_keys)

    def model_config(self, config: ModelConfig) -> ModelConfig:
        wanted = "music_notes" if self.joint else "music_keys"
        if config.head is None or config.head.name != wanted:
            raise ValueError(f"task.protocol = {self.config.protocol!r} needs model.head.name = {wanted}")
        return config

    def provenance(self) -> dict[str, Any]:
        return self.data.provenance()

    def stream(self, split: str, *, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0) -> SourceStream:
        rolls = self.data.load(split)
        place: dict[str, Any] = {"batch_size": batch_size, "rank": rank, "world": world}
        if split == "train":
            change = {"transpose": self.config.transpose, "frames": self.config.frames}
            return SourceStream(Pieces(rolls, self._layout, self._collate, seed=seed, **change), **place)
        rows = [self._layout(roll) for roll in rolls]
        return SourceStream(Shuffled(rows, self._collate, seed=None), endless=False, **place)

    # -- prompts and pieces --------------------------------------------------------------------------------------------

    def prompt(self, obj: Any) -> Batch:
        """A roll (T, 88) bool to go on from, None to begin, or a list of these; rows may differ in length."""
        several = list(obj) if isinstance(obj, list) else [obj]
        if not several:
            raise ValueError("a prompt is a piano roll or None, or a list of these; the list is empty")
        rows = []
        for roll in several:
            roll = np.zeros((0, KEYS), bool) if roll is None else np.asarray(roll, dtype=bool)
            if roll.ndim != 2 or roll.shape[1] != KEYS:
                raise ValueError(f"a piano roll of shape {roll.shape}; it takes (T, {KEYS})")
            rows.append(torch.from_numpy(self._layout(roll)))
        lengths = torch.tensor([len(row) for row in rows])
        inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        ragged = bool((lengths != lengths[0]).any())
        return Batch(inputs, ctx=Context(lengths=lengths if ragged else None))

    def length(self, prompt: Batch) -> int:
        return 64 * (TOKENS_A_FRAME if self.joint else 1)

    def elements(self, seconds: float) -> int:
        """Of notes about as many: frames differ."""
        if seconds <= 0:
            raise ValueError(f"seconds = {seconds}; it takes a number above 0")
        frames = max(1, round(seconds / self.config.frame_seconds))
        return frames * (TOKENS_A_FRAME if self.joint else 1)

    def artefacts(self, prompt: Batch, drawn: Tensor) -> list[np.ndarray]:
        """Whole pieces (T, 88) bool, what was given included."""
        whole = prompt.ctx.lengths
        lengths = [prompt.inputs.shape[1]] * len(drawn) if whole is None else whole.tolist()
        rows = zip(prompt.inputs.cpu().numpy(), lengths, drawn.cpu().numpy(), strict=True)
        return [self._roll(np.concatenate((given[1:length], new))) for given, length, new in rows]

    def artefact(self, inputs: Tensor) -> np.ndarray:
        return self._roll(inputs.cpu().numpy())

    def _roll(self, row: np.ndarray) -> np.ndarray:
        return from_tokens(row) if self.joint else row[:, :KEYS].astype(bool)

    def ask(self, request: Request) -> list[None]:
        request.only(self.domain, "count")
        count = 1 if request.count is None else request.count
        if count < 1:
            raise ValueError(f"--count {count}; it takes 1 or more")
        return [None] * count

    def write(self, artefacts: list[np.ndarray], path: Path) -> None:
        """MIDI, sound, or a picture of the roll; several with numbers in their names."""
        path.parent.mkdir(parents=True, exist_ok=True)
        for number, roll in enumerate(artefacts, 1):
            name = path if len(artefacts) == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
            if path.suffix.lower() == ".mid":
                write_midi(name, roll, self.config.frame_seconds)
            elif path.suffix.lower() == ".wav":
                write_wav(name, render(roll, self.config.frame_seconds, RATE), RATE)
            else:
                from PIL import Image

                pixels = (roll_picture(roll) * 255).to(torch.uint8).permute(1, 2, 0).contiguous()
                Image.fromarray(pixels.numpy()).save(name)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def metrics(self, split: str) -> dict[str, Metric]:
        return {"likelihood": NatsPerFrame()}

    def describe(self, split: str) -> str:
        how = "joint over a frame's notes" if self.joint else "keys independent given the past"
        return f"every piece whole, {how}; nats_per_frame over frames 2 to T"

    def baselines(self, split: str) -> dict[str, float]:
        return key_baselines(self.data.load("train"), self.data.load(split))

    def show(self, model: nn.Module) -> Media:
        """Pieces as rolls and as sound."""
        assert isinstance(model, Model)
        given = self.prompt([None] * self.config.shown)
        count = self.config.shown_frames * (TOKENS_A_FRAME if self.joint else 1)
        drawn = generate(model, given, max_new=count, sampling=Sampling(), seed=0)
        media = Media()
        for number, roll in enumerate(self.artefacts(given, drawn)):
            media.images[f"roll_{number}"] = roll_picture(roll)
            sound = render(roll, self.config.frame_seconds, RATE)
            media.audio[f"piece_{number}"] = (torch.from_numpy(sound.astype(np.float32) / 32768), RATE)
        return media
