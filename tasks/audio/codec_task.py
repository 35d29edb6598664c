"""Training and measuring a codec: crops of recordings in, recordings through their codes and back out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tasks.audio.codec import Codec, CodecConfig
from tasks.audio.data import Recordings
from tasks.audio.spectra import below_each_other, mel_distance, picture
from tasks.audio.waves import fit, to_float, to_pcm
from zoo import config as configs
from zoo import frozen
from zoo.config import Choice
from zoo.data import Shuffled, SourceStream, epoch_rng
from zoo.frozen import Frozen
from zoo.model import Batch, Context
from zoo.quantize import code_use
from zoo.registry import datasets
from zoo.task import Media, Metric, Task


def load_codec(reference: str, sha256: str = "") -> Frozen:
    return frozen.load(reference, kind=CodecConfig, what="codec", sha256=sha256)


@torch.no_grad()
def encode_all(codec: Codec, sounds: np.ndarray, batch: int = 64) -> np.ndarray:
    """(N, T) int16, T a multiple of the hop -> codes (N, F, K) int64."""
    device = next(codec.parameters()).device
    parts = (torch.from_numpy(to_float(sounds[at : at + batch])).to(device) for at in range(0, len(sounds), batch))
    return np.concatenate([codec.encode(part).cpu().numpy() for part in parts])


@torch.no_grad()
def decode_all(codec: Codec, codes: np.ndarray, batch: int = 64) -> np.ndarray:
    """Codes (N, F, K) -> (N, F * hop) int16."""
    device = next(codec.parameters()).device
    parts = (torch.from_numpy(codes[at : at + batch]).long().to(device) for at in range(0, len(codes), batch))
    return np.concatenate([to_pcm(codec.decode(part).cpu().numpy()) for part in parts])


class Crops:
    """Item n is a recording drawn from (seed, n), cropped or filled up with silence to `length`, at a loudness drawn
    within `gain` decibels each way."""

    def __init__(self, recordings: Recordings, length: int, *, gain: float, seed: int):
        self.recordings, self.length, self.gain, self.seed = recordings, length, gain, seed
        sizes = np.array([len(sound) for sound in recordings.sounds], dtype=np.float64)
        self.share = np.cumsum(sizes / sizes.sum())  # as often as they are long

    def __len__(self) -> int:
        return len(self.recordings)

    def item(self, position: int) -> np.ndarray:
        rng = epoch_rng(self.seed, position)
        place = min(int(np.searchsorted(self.share, rng.random())), len(self.recordings) - 1)
        sound = self.recordings.sounds[place]
        spare = len(sound) - self.length
        start = int(rng.integers(spare + 1)) if spare > 0 else 0
        before = int(rng.integers(-spare + 1)) if spare < 0 else 0
        scale = 10 ** (rng.uniform(-self.gain, self.gain) / 20)
        return fit(to_float(sound[start:]), self.length, before) * np.float32(scale)

    def collate(self, items: list[np.ndarray]) -> Batch:
        return Batch(torch.from_numpy(np.stack(items)).clamp(-1, 1))


def collate_whole(hop: int) -> Any:
    """Sounds (T,) int16 -> a batch filled up with silence to a multiple of `hop`, and ctx.lengths."""

    def collate(items: list[np.ndarray]) -> Batch:
        length = -(-max(map(len, items)) // hop) * hop
        lengths = torch.tensor([len(item) for item in items])
        sounds = np.stack([fit(to_float(item), length) for item in items])
        return Batch(torch.from_numpy(sounds), ctx=Context(lengths=lengths))

    return collate


# ---------------------------------------------------------------------------------------------------------------------


class Fidelity:
    """How well recordings come back from their codes, each over its own length, then the mean over recordings.

    si_sdr        decibels (scale-invariant signal-to-distortion ratio, arXiv 1811.02508)
    mel_distance  mean absolute difference of natural-log mels, four scales
    codebook_usage, codebook_perplexity   of each stage, averaged; `_first` and `_last` of these two
    bits_per_second  the codec's, whatever it is used for
    """

    def __init__(self, config: CodecConfig | None = None):
        self.sums = torch.zeros(3, dtype=torch.float64)  # si_sdr, mel distance, recordings
        self.counts = torch.zeros(0, 0, dtype=torch.int64)
        self.config = config

    @torch.no_grad()
    def update(self, model: Any, batch: Batch) -> None:
        self.config, hop = model.config, model.config.hop
        codes = model.encode(batch.inputs)
        made = model.decode(codes)
        lengths = batch.ctx.lengths
        assert lengths is not None
        for row, length in enumerate(lengths.tolist()):
            one, other = made[row : row + 1, :length], batch.inputs[row : row + 1, :length]
            mel = float(mel_distance(one, other, model.config.rate))
            self.sums += torch.tensor([float(si_sdr(one[0], other[0])), mel, 1], dtype=torch.float64)
        self._count(codes, -(-lengths // hop), model.levels)

    def _count(self, codes: Tensor, frames: Tensor, levels: int) -> None:
        real = torch.arange(codes.shape[1], device=codes.device) < frames.unsqueeze(1)
        counts = torch.stack([torch.bincount(stage[real], minlength=levels) for stage in codes.unbind(-1)]).cpu()
        self.counts = counts if not self.counts.numel() else self.counts + counts

    def reduce(self, ranks: Any) -> None:
        assert self.counts.numel() or ranks.world == 1
        self.sums, self.counts = ranks.sum(self.sums), ranks.sum(self.counts)

    def compute(self) -> dict[str, float]:
        sdr, mel, count = (self.sums / self.sums[2].clamp(min=1)).tolist()[:2] + [float(self.sums[2])]
        use = [code_use(stage) for stage in self.counts]
        scores = {"si_sdr": sdr, "mel_distance": mel, "recordings": count}
        for name in ("usage", "perplexity"):
            values = [stage[name] for stage in use] or [0.0]
            scores[f"codebook_{name}"] = sum(values) / len(values)
            scores[f"codebook_{name}_first"], scores[f"codebook_{name}_last"] = values[0], values[-1]
        if self.config is not None:
            scores["bits_per_second"] = self.config.bits_per_second
        return scores


def si_sdr(made: Tensor, wanted: Tensor) -> Tensor:
    """(T,) and (T,) -> () decibels."""
    made, wanted = made.double() - made.double().mean(), wanted.double() - wanted.double().mean()
    target = (made @ wanted) / (wanted @ wanted).clamp(min=1e-12) * wanted
    return 10 * (target.square().sum().clamp(min=1e-12) / (made - target).square().sum().clamp(min=1e-12)).log10()


class CodecTask(Task):
    domain = "audio_codec"

    @dataclass
    class Config:
        """seconds  of a training crop
        gain     of training crops, drawn within so many decibels each way
        """

        dataset: Choice | None = configs.choice(datasets, "audio/spoken_digits")
        seconds: float = 1.024
        gain: float = 6.0

        def __post_init__(self):
            if self.seconds <= 0 or self.gain < 0:
                raise ValueError(f"seconds = {self.seconds}, gain = {self.gain}; they take above 0, and 0 or more")

    def __init__(self, config: Config, assets: Path | None = None):
        self.config = config = configs.build(self.Config, config)
        assert config.dataset is not None
        self.data = datasets.get(config.dataset.name)(config.dataset.config)

    def provenance(self) -> dict[str, Any]:
        return self.data.provenance()

    def stream(self, split: str, *, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0) -> SourceStream:
        recordings = self.data.load(split)
        place: dict[str, Any] = {"batch_size": batch_size, "rank": rank, "world": world}
        if split == "train":
            length = round(self.config.seconds * self.data.rate)
            return SourceStream(Crops(recordings, length, gain=self.config.gain, seed=seed), **place)
        whole = Shuffled(recordings.sounds, collate_whole(FRAMES_WITHIN), seed=None)
        return SourceStream(whole, endless=False, **place)

    def metrics(self, split: str) -> dict[str, Metric]:
        return {"fidelity": Fidelity()}

    def describe(self, split: str) -> str:
        return "every recording once, whole, through all its codes and back"

    @torch.no_grad()
    def media(self, model: nn.Module, batch: Batch) -> Media:
        """Recordings, and what comes back of them."""
        assert isinstance(model, Codec)
        assert batch.ctx.lengths is not None
        made = model.decode(model.encode(batch.inputs))
        media, pictures = Media(), []
        for row, length in enumerate(batch.ctx.lengths.tolist()[:4]):
            for name, sounds in (("recording", batch.inputs), ("reconstruction", made)):
                sound = sounds[row, :length].float().cpu()
                media.audio[f"{name}_{row}"] = (sound, self.data.rate)
                pictures.append(picture(to_pcm(sound.numpy()), self.data.rate))
        media.images["reconstruction"] = below_each_other(pictures)
        return media


FRAMES_WITHIN = 1 << 11  # whole recordings are filled up to a multiple of it, which any usual hop divides
