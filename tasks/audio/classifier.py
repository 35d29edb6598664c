"""The judge of generated speech: a classifier of log-mel spectrograms, trained here; which word, and whose voice.

Loudness is taken out first, so that it is no sign of the speaker. In training sounds are disturbed, for a judge that
has heard clean recordings alone takes a codec's faint noise for another word.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.audio.data import Recordings
from tasks.audio.spectra import log_mel
from tasks.audio.waves import fit, to_float
from zoo import config as configs
from zoo import frozen
from zoo.config import Choice
from zoo.data import Shuffled, SourceStream, epoch_rng
from zoo.frozen import Frozen
from zoo.model import Batch, Output
from zoo.registry import datasets
from zoo.resnet import check_stages, small_resnet
from zoo.task import Metric, Task


@dataclass
class ClassifierConfig:
    """rate       Hz of the sounds
    seconds    that it listens to; what is longer is cut off
    classes    values of each attribute: digits, speakers
    layers, widths  of the residual network's four stages; the last width is that of the features
    smoothing  of labels (arXiv 1512.00567)

    Each of these befalls half of the training sounds, as much of it as is drawn evenly:
    noise      white, up to this part of a sound's root mean square
    grain      noise in proportion to each sample, up to this part of it (modulated noise, ITU-T P.810: 0.7 is 3 dB)
    dull       fading of the highest tones: of up to this part of what the rate holds
    """

    rate: int = 8000
    seconds: float = 1.024
    classes: tuple[int, ...] = (10, 6)
    bands: int = 40
    layers: tuple[int, ...] = (1, 1, 1, 1)
    widths: tuple[int, ...] = (16, 32, 64, 128)
    dropout: float = 0.1
    smoothing: float = 0.1
    noise: float = 0.5
    grain: float = 0.7
    dull: float = 0.6

    def __post_init__(self):
        check_stages(self.layers, self.widths)
        if min(self.noise, self.grain) < 0 or not 0 <= self.dull < 1:
            raise ValueError(
                f"noise = {self.noise}, grain = {self.grain}, dull = {self.dull}; the first two take 0 or more, dull "
                "0 to below 1"
            )
        if not self.classes or min(self.classes) < 2:
            raise ValueError(f"classes = {self.classes}; each attribute takes 2 or more values")
        if self.seconds <= 0 or self.rate < 1 or self.bands < 8:
            raise ValueError("seconds takes above 0, rate 1 or more, bands 8 or more")

    @property
    def length(self) -> int:
        """Samples."""
        return round(self.seconds * self.rate)

    def build(self) -> "Classifier":
        return Classifier(self)


class Classifier(nn.Module):
    """Sounds (B, length) float32 amplitudes in Batch.inputs, labels (B, A) int64 in Batch.targets."""

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        self.net = small_resnet(1, 0, config.layers, config.widths)
        self.drop = nn.Dropout(config.dropout)
        self.out = nn.ModuleList(nn.Linear(config.widths[-1], count) for count in config.classes)

    def forward(self, batch: Batch) -> Output:
        """Cross-entropies in nats a sound, and the share of right answers for each attribute."""
        sound = disturbed(batch.inputs, self.config) if self.training else batch.inputs
        features = self.drop(self._features(sound))
        count = torch.full((), len(features), device=features.device)
        total, metrics = features.new_zeros((), dtype=torch.float32), {}
        for number, layer in enumerate(self.out):
            logits, wanted = layer(features).float(), batch.targets[:, number]
            total = total + F.cross_entropy(logits, wanted, label_smoothing=self.config.smoothing, reduction="sum")
            metrics[f"accuracy_{number}"] = ((logits.argmax(dim=1) == wanted).sum(), count)
        return Output(total, count, metrics)

    def features(self, sound: Tensor) -> Tensor:
        """(B, length) -> (B, F) float32, whatever the precision around it: what the last layers decide by."""
        with torch.autocast(sound.device.type, enabled=False):
            return self._features(sound)

    def answers(self, features: Tensor) -> Tensor:
        """(B, F) -> the value of each attribute (B, A)."""
        with torch.autocast(features.device.type, enabled=False):
            return torch.stack([layer(features).argmax(dim=1) for layer in self.out], dim=1)

    def _features(self, sound: Tensor) -> Tensor:
        size = sound.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-4)
        mel = log_mel(0.1 * sound / size, self.config.rate, window=256, bands=self.config.bands, hop=80)
        return self.net((mel.unsqueeze(1) + 5) / 3)


def disturbed(sound: Tensor, config: ClassifierConfig) -> Tensor:
    """(B, T) float32 amplitudes, some of them with noise, grain, or without their highest tones."""

    def drawn(most: float) -> Tensor:
        """(B, 1): up to `most` for half of the sounds, 0 for the others."""
        share, hit = torch.rand(2, len(sound), 1, device=sound.device)
        return most * share * (hit < 0.5)

    with torch.autocast(sound.device.type, enabled=False):
        size = sound.square().mean(dim=1, keepdim=True).sqrt()
        sound = sound + drawn(config.noise) * size * torch.randn_like(sound)
        sound = sound * (1 + drawn(config.grain) * torch.randn_like(sound))
        tones = torch.linspace(0, 1, sound.shape[1] // 2 + 1, device=sound.device)
        cut = 1 - drawn(config.dull)
        fading = torch.where(cut < 1, (1 + (tones / cut) ** 12).rsqrt(), 1.0)  # Butterworth, 36 dB an octave
        return torch.fft.irfft(torch.fft.rfft(sound) * fading, n=sound.shape[1])


def load_classifier(reference: str) -> Frozen | None:
    """The trained classifier behind a run folder or a name of weights; None for ""."""
    return frozen.load(reference, kind=ClassifierConfig, what="classifier") if reference else None


@torch.no_grad()
def all_features(model: Classifier, sounds: list[np.ndarray], batch: int = 250) -> Tensor:
    """Sounds, each (T,) int16 -> (N, F) float32 on the model's device."""
    device, length = next(model.parameters()).device, model.config.length
    parts = []
    for at in range(0, len(sounds), batch):
        rows = np.stack([fit(to_float(sound), length) for sound in sounds[at : at + batch]])
        parts.append(model.features(torch.from_numpy(rows).to(device)))
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------------------------------


class Varied:
    """Training items: each epoch in an order of its own, each sound moved within its window."""

    def __init__(self, recordings: Recordings, length: int, *, seed: int):
        self.recordings, self.length, self.seed = recordings, length, seed
        self.order = Shuffled(range(len(recordings)), None, seed=seed)

    def __len__(self) -> int:
        return len(self.recordings)

    def item(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        place = self.order.item(position)
        rng = epoch_rng(self.seed, position)
        sound = to_float(self.recordings.sounds[place])
        spare = max(0, self.length - len(sound))
        moved = fit(sound, self.length, int(rng.integers(min(spare, self.length // 4) + 1)))
        return moved, self.recordings.labels[place]

    def collate(self, items: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
        return collate_labelled(items)


def collate_labelled(items: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
    sounds, labels = zip(*items, strict=True)
    return Batch(torch.from_numpy(np.stack(sounds)), torch.from_numpy(np.stack(labels)))


class Accuracy:
    """The share of sounds whose attributes are found, and the cross-entropy that training minimises."""

    def __init__(self, attributes: tuple[str, ...]):
        self.attributes = attributes
        self.sums = torch.zeros(2 + len(attributes), dtype=torch.float64)

    @torch.no_grad()
    def update(self, model: Any, batch: Batch) -> None:
        output = model(batch)
        right = [output.metrics[f"accuracy_{number}"][0] for number in range(len(self.attributes))]
        self.sums += torch.stack([x.double() for x in (output.loss_sum, output.count, *right)]).cpu()

    def reduce(self, ranks: Any) -> None:
        self.sums = ranks.sum(self.sums)

    def compute(self) -> dict[str, float]:
        loss, count, *right = self.sums.tolist()
        shares = {f"{name}_accuracy": got / max(1, count) for name, got in zip(self.attributes, right, strict=True)}
        return {"loss": loss / max(1, count), **shares, "sounds": count}


class ClassifierTask(Task):
    domain = "audio_classifier"

    @dataclass
    class Config:
        """seconds  that a sound is cut or filled up to: the model's"""

        dataset: Choice | None = configs.choice(datasets, "audio/spoken_digits")
        seconds: float = 1.024

    def __init__(self, config: Config, assets: Path | None = None):
        self.config = config = configs.build(self.Config, config)
        assert config.dataset is not None
        self.data = datasets.get(config.dataset.name)(config.dataset.config)

    def provenance(self) -> dict[str, Any]:
        return self.data.provenance()

    def stream(self, split: str, *, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0) -> SourceStream:
        recordings = self.data.load(split)
        place: dict[str, Any] = {"batch_size": batch_size, "rank": rank, "world": world}
        length = round(self.config.seconds * self.data.rate)
        if split == "train":
            return SourceStream(Varied(recordings, length, seed=seed), **place)
        sounds = [fit(to_float(sound), length) for sound in recordings.sounds]
        items = list(zip(sounds, recordings.labels, strict=True))
        return SourceStream(Shuffled(items, collate_labelled, seed=None), endless=False, **place)

    def metrics(self, split: str) -> dict[str, Metric]:
        return {"accuracy": Accuracy(tuple(self.data.attributes))}

    def describe(self, split: str) -> str:
        return f"every recording once, cut or filled up to {self.config.seconds:g} s"
