"""What the audio task measures: bits a sample or a code, and, on speech that it makes, what a classifier hears in it.

The classifier is trained here, on this data set: the names of distances say `own_features`, for such a value stands
beside others of this project with the same classifier, and no others.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.audio.classifier import Classifier, all_features
from tasks.audio.data import Recordings
from tasks.audio.spectra import below_each_other, picture
from tasks.audio.waves import LEVELS, fit, to_levels
from zoo.distances import FeatureStats, frechet
from zoo.generation import Sampling
from zoo.model import Batch
from zoo.task import Media


class Likelihood:
    """loss in nats an element. Of samples bits_per_sample, exactly normalised: the mean of -log2 p over every sample of
    every recording. Of codes bits_per_code and bits_per_second of sound, which are no likelihood of the waveform."""

    def __init__(self, codes_per_second: float = 0.0):
        """0: of samples."""
        self.codes_per_second = codes_per_second
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, model: Any, batch: Batch) -> None:
        output = model(batch)
        for name, pair in {"": (output.loss_sum, output.count), **output.metrics}.items():
            old = self.sums.get(name, torch.zeros(2, dtype=torch.float64))
            self.sums[name] = old + torch.stack([x.double() for x in pair]).cpu()

    def reduce(self, ranks: Any) -> None:
        if not self.sums:  # a rank without a batch; where metrics are several, it knows none of their names
            self.sums = {"": torch.zeros(2, dtype=torch.float64)}
        self.sums[""] = ranks.sum(self.sums[""])

    def compute(self) -> dict[str, float]:
        nats, count = self.sums[""].tolist()
        loss = nats / max(1, count)
        bits = loss / math.log(2)
        if not self.codes_per_second:
            return {"loss": loss, "bits_per_sample": bits, "samples": count}
        return {
            "loss": loss,
            "bits_per_code": bits,
            "code_bits_per_second": bits * self.codes_per_second,
            "codes": count,
        }


@dataclass
class SpeechConfig:
    """count       sounds made for an evaluation of the test split, labels in turn; 0: none
    batch       made at once
    classifier  run folder or weights of an audio_classifier
    shown       of these, written as wav files with spectrograms
    seed        of what is drawn: settings that were chosen on one are told on another
    temperature, top_k, top_p, guidance: as in sampling
    """

    count: int = 0
    batch: int = 100
    classifier: str = ""
    shown: int = 10
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0

    def __post_init__(self):
        if min(self.count, self.shown, self.seed) < 0 or self.batch < 1:
            raise ValueError("samples.count, samples.shown and samples.seed take 0 or more, samples.batch 1 or more")
        self.sampling()

    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, guidance=self.guidance)


class Speech:
    """Makes `config.count` sounds once the pass is over, each rank its share, and asks the classifier.

    digit_accuracy, …     for each attribute that sounds are conditioned on: how often the classifier hears what was
                          asked for; `_real` on the test recordings, `_rebuilt` on what their codes are decoded to
    frechet_own_features  distance to the test recordings; `_train` and `_rebuilt` of those, as floors
    """

    def __init__(
        self,
        config: SpeechConfig,
        make: Callable[[Any, Tensor, int], list[np.ndarray]],
        rebuild: Callable[[list[np.ndarray]], list[np.ndarray]] | None,
        classifier: Classifier,
        attributes: dict[str, tuple[str, ...]],
        asked: list[str],
        parts: tuple[Recordings, Recordings],
        rate: int,
    ):
        """make(model, labels (n, A) of the attributes `asked` for, seed) -> sounds, all of one length; parts: the
        training and the test recordings."""
        self.config, self.make, self.rebuild, self.classifier = config, make, rebuild, classifier
        self.attributes, self.asked, self.rate = attributes, asked, rate
        self.train, self.test = parts
        self.labels = in_turn([len(attributes[name]) for name in asked], config.count)
        self.model: Any = None
        self.made: list[np.ndarray] = []

    def update(self, model: Any, batch: Batch) -> None:
        self.model = model

    def reduce(self, ranks: Any) -> None:
        config, length = self.config, self.classifier.config.length
        batch = config.batch
        made = torch.zeros(self.config.count, length, dtype=torch.int32)
        for at in range(ranks.rank * batch, self.config.count, ranks.world * batch):
            sounds = self.make(self.model, self.labels[at : at + batch], (config.seed << 32) + at)
            rows = np.stack([fit(sound, length) for sound in sounds]).astype(np.int32)
            made[at : at + len(rows)] = torch.from_numpy(rows)
        self.made = list(ranks.sum(made).to(torch.int16).numpy())

    @torch.no_grad()
    def compute(self) -> dict[str, float]:
        self.classifier.to(next(self.model.parameters()).device)
        sets = {"": self.made, "_real": self.test.sounds, "_train": self.train.sounds}
        if self.rebuild is not None:
            sets["_rebuilt"] = self.rebuild(self.test.sounds)
        features = {name: all_features(self.classifier, sounds) for name, sounds in sets.items()}
        answers = {name: self.classifier.answers(x).cpu() for name, x in features.items()}
        scores = {"sounds": float(len(self.made))}
        names = list(self.attributes)
        for place, name in enumerate(self.asked):
            scores[f"{name}_accuracy"] = share(answers[""][:, names.index(name)], self.labels[:, place])
        for kind in ("_real", "_rebuilt"):
            if kind in answers:
                for place, name in enumerate(names):
                    right = torch.from_numpy(self.test.labels[:, place])
                    scores[f"{name}_accuracy{kind}"] = share(answers[kind][:, place], right)
        stats = {name: FeatureStats(x.shape[1]).add(x) for name, x in features.items()}
        for kind in [name for name in stats if name != "_real"]:
            scores[f"frechet_own_features{kind}"] = frechet(stats[kind], stats["_real"])
        return scores

    def media(self) -> Media:
        media, shown = Media(), self.made[: self.config.shown]
        for number, (sound, labels) in enumerate(zip(shown, self.labels, strict=False)):
            values = [self.attributes[name][int(label)] for name, label in zip(self.asked, labels, strict=True)]
            name = "_".join([f"{number:02d}", *values])
            media.audio[name] = (torch.from_numpy(sound.astype(np.float32) / 32768), self.rate)
        if shown:
            media.images["spectrograms"] = below_each_other([picture(sound, self.rate) for sound in shown])
        return media


def in_turn(sizes: list[int], count: int) -> Tensor:
    """(count, A): every combination of values equally often, the first attribute's changing fastest."""
    left, columns = torch.arange(count), []
    for size in sizes:
        columns.append(left % size)
        left = left // size
    return torch.stack(columns, dim=1) if columns else torch.zeros(count, 0, dtype=torch.int64)


def share(answers: Tensor, right: Tensor) -> float:
    return float((answers == right).double().mean())


# ---------------------------------------------------------------------------------------------------------------------


def order0_bits(train: Recordings, test: Recordings) -> float:
    """Bits a sample of coding each by the histogram of training levels, one count added to each."""
    counts = np.bincount(np.concatenate([to_levels(x) for x in train.sounds]), minlength=LEVELS) + 1
    met = np.bincount(np.concatenate([to_levels(x) for x in test.sounds]), minlength=LEVELS)
    return float(-(met * np.log2(counts / counts.sum())).sum() / met.sum())


def order1_bits(train: Recordings, test: Recordings) -> float:
    """The same, by what followed each level in training; a recording's first sample by how recordings begin."""
    counts, met = transitions(train) + 1, transitions(test)
    return float(-(met * np.log2(counts / counts.sum(axis=1, keepdims=True))).sum() / met.sum())


def transitions(recordings: Recordings) -> np.ndarray:
    """(257, 256): how often each level follows each, and in the last row the start."""
    counts = np.zeros((LEVELS + 1) * LEVELS, dtype=np.int64)
    for sound in recordings.sounds:
        levels = to_levels(sound).astype(np.int64)
        before = np.concatenate(([LEVELS], levels[:-1]))
        counts += np.bincount(before * LEVELS + levels, minlength=len(counts))
    return counts.reshape(LEVELS + 1, LEVELS)
