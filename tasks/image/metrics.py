"""What the image task measures: bits a dimension, and, on images that it draws, how like real ones they are.

Distances between sets of images are taken on the features of a classifier trained here, on this data set: the names say
`own_features`, for such a value stands beside others of this project with the same classifier, and no others.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.image.classifier import Classifier, all_features, to_images
from tasks.image.data import Images
from tasks.image.grid import as_media, make_grid
from tasks.image.stream import shown
from zoo.distances import FeatureStats, frechet, nearest, precision_recall
from zoo.generation import Sampling
from zoo.model import Batch
from zoo.task import Media

MOST_NEIGHBOURS = 1000  # images whose nearest training image is looked for


class Likelihood:
    """loss in nats an element. Of pixels bits_per_dim: the mean over every sub-pixel of -log2 p, exactly normalised. Of
    codes bits_per_code and their perplexity, which are no likelihood of the image."""

    def __init__(self, pixels: bool):
        self.pixels = pixels
        self.sums = torch.zeros(2, dtype=torch.float64)

    @torch.no_grad()
    def update(self, model: Any, batch: Batch) -> None:
        output = model(batch)
        self.sums += torch.stack((output.loss_sum.double(), output.count.double())).cpu()

    def reduce(self, ranks: Any) -> None:
        self.sums = ranks.sum(self.sums)

    def compute(self) -> dict[str, float]:
        nats, count = self.sums.tolist()
        loss = nats / max(1, count)
        if self.pixels:
            return {"loss": loss, "bits_per_dim": loss / math.log(2), "elements": count}
        return {"loss": loss, "bits_per_code": loss / math.log(2), "code_perplexity": math.exp(loss), "elements": count}


@dataclass
class SampleConfig:
    """count       images drawn for an evaluation of the test split, classes in turn; 0: none
    batch       drawn at once
    classifier  run folder or weights of an image_classifier, whose features and answers judge them
    inception   file of torch-fidelity's Inception weights: adds the FID of the literature, by torchmetrics
    nearest     of these, shown beside the nearest training images
    temperature, top_k, top_p, guidance: as in sampling
    """

    count: int = 0
    batch: int = 250
    classifier: str = ""
    inception: str = ""
    nearest: int = 10
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0

    def __post_init__(self):
        if self.count < 0 or self.batch < 1 or self.nearest < 0:
            raise ValueError("samples.count and samples.nearest take 0 or more, samples.batch 1 or more")
        if self.inception and not Path(self.inception).is_file():
            raise ValueError(f"samples.inception = {self.inception!r} is no file; leave it out for own features alone")
        self.sampling()

    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, guidance=self.guidance)


class Samples:
    """Draws `config.count` images once the pass is over, each rank its share, and compares them with real ones.

    class_accuracy           the classifier's answers against the classes that were asked for; `_real` on test images
    fid_own_features         against the test split; `_train` the training images' own, the floor that data set has
    precision, recall        (of as many test images as were drawn)
    nearest_train_features   the median distance to the nearest training image, over that of real test images: far below
                             1 where training images are copied; and the same by pixels
    """

    def __init__(
        self,
        config: SampleConfig,
        draw: Callable[[Any, Tensor | None, int, int], np.ndarray],
        classes: int,
        classifier: Classifier | None,
        train: Images,
        test: Images,
    ):
        """draw(model, labels or None, count, seed) -> (count, H, W, C) uint8."""
        self.config, self.draw, self.classes = config, draw, classes
        self.classifier, self.train, self.test = classifier, train, test
        self.model: Any = None
        self.made = np.zeros((0,))
        self.labels = torch.arange(config.count) % max(1, classes)

    def update(self, model: Any, batch: Batch) -> None:
        self.model = model

    def reduce(self, ranks: Any) -> None:
        height, width, channels = self.test.pixels.shape[1:]
        made = torch.zeros(self.config.count, height, width, channels, dtype=torch.int32)
        starts = range(ranks.rank * self.config.batch, self.config.count, ranks.world * self.config.batch)
        for at in shown(starts, "drawing samples"):
            labels = self.labels[at : at + self.config.batch]
            asked = labels if self.classes else None
            made[at : at + len(labels)] = torch.from_numpy(self.draw(self.model, asked, len(labels), at))
        self.made = ranks.sum(made).to(torch.uint8).numpy()

    @torch.no_grad()
    def compute(self) -> dict[str, float]:
        scores = {"samples": float(len(self.made))}
        device = next(self.model.parameters()).device
        if self.config.inception:
            scores["fid_inception"] = inception_fid(self.test.pixels, self.made, self.config.inception, device)
        if self.classifier is None:
            return scores | self._copying(by="pixels")
        self.classifier.to(device)
        made, test, train = (self._features(x) for x in (self.made, self.test.pixels, self.train.pixels))
        stats = [FeatureStats(x.shape[1]).add(x) for x in (made, test, train)]
        scores["fid_own_features"] = frechet(stats[0], stats[1])
        scores["fid_own_features_train"] = frechet(stats[2], stats[1])
        count = min(len(made), len(test))
        scores["precision_own_features"], scores["recall_own_features"] = precision_recall(test[:count], made[:count])
        real = self.classifier.answers(test).cpu().numpy() == self.test.labels
        scores["class_accuracy_real"] = float(real.mean())
        if self.classes:
            scores["class_accuracy"] = float((self.classifier.answers(made).cpu() == self.labels).float().mean())
        return scores | self._copying(by="pixels") | self._copying(by="features")

    def media(self) -> Media:
        """Rows: what was drawn, its nearest training image by pixels, and by features."""
        count = min(self.config.nearest, len(self.made))
        if not count:
            return Media()
        rows = [self.made[:count]]
        for by in ("pixels", "features") if self.classifier is not None else ("pixels",):
            _, which = nearest(self._vectors(self.made[:count], by), self._vectors(self.train.pixels, by))
            rows.append(self.train.pixels[which.cpu().numpy()])
        grids = {"samples": make_grid(self.made[:100], columns=10 if len(self.made) >= 10 else 0)}
        grids["nearest"] = make_grid(np.concatenate(rows), columns=count)
        return Media(images={name: as_media(grid) for name, grid in grids.items()})

    def _features(self, pixels: np.ndarray) -> Tensor:
        assert self.classifier is not None
        return all_features(self.classifier, pixels)

    def _vectors(self, pixels: np.ndarray, by: str) -> Tensor:
        if by == "features":
            return self._features(pixels)
        device = next(self.model.parameters()).device
        return torch.from_numpy(pixels.copy()).to(device).flatten(1).float() / 127.5 - 1

    def _copying(self, by: str) -> dict[str, float]:
        train = self._vectors(self.train.pixels, by)
        medians = [
            nearest(self._vectors(pixels[:MOST_NEIGHBOURS], by), train)[0].median()
            for pixels in (self.made, self.test.pixels)
        ]
        return {f"nearest_train_{by}": float(medians[0] / medians[1].clamp(min=1e-12))}


def inception_fid(real: np.ndarray, made: np.ndarray, weights: str, device: Any, batch: int = 100) -> float:
    """Images (N, H, W, C) uint8 by torchmetrics; grey ones as three equal channels. Raises ValueError without it."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ValueError(f"samples.inception needs the extra gatedfwa-zoo[eval]: {error}") from error
    metric = FrechetInceptionDistance(feature_extractor_weights_path=weights).to(device)
    for pixels, is_real in ((real, True), (made, False)):
        for at in shown(range(0, len(pixels), batch), "Inception features"):
            images = to_images(pixels[at : at + batch]).to(device)
            metric.update(images.expand(-1, 3, -1, -1), real=is_real)
    return float(metric.compute())


def order0_bits(train: Images, test: Images) -> float:
    """Bits a sub-pixel of coding each by its channel's histogram over the training images, one count added to each."""
    bits = 0.0
    for channel in range(test.pixels.shape[-1]):
        counts = np.bincount(train.pixels[..., channel].ravel(), minlength=256) + 1
        met = np.bincount(test.pixels[..., channel].ravel(), minlength=256)
        bits -= float((met * np.log2(counts / counts.sum())).sum())
    return bits / test.pixels.size
