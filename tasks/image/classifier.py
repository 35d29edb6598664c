"""A classifier trained on the data set itself: its features measure samples, its answers their class."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.image.stream import Augment, image_source, pixel_views, shown
from zoo import config as configs
from zoo import frozen
from zoo.config import Choice
from zoo.data import SourceStream
from zoo.frozen import Frozen
from zoo.model import Batch, Output
from zoo.registry import datasets
from zoo.resnet import check_stages, small_resnet
from zoo.task import Metric, Task


@dataclass
class ClassifierConfig:
    """layers     residual blocks of each of four stages; the first keeps the image's size, each further one halves it
    widths     channels of each stage; the last are the features
    smoothing  of labels (arXiv 1512.00567)
    """

    channels: int = 3
    classes: int = 10
    layers: tuple[int, ...] = (2, 2, 2, 2)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    dropout: float = 0.0
    smoothing: float = 0.1

    def __post_init__(self):
        check_stages(self.layers, self.widths)

    def build(self) -> "Classifier":
        return Classifier(self)


class Classifier(nn.Module):
    """Images (B, C, H, W) uint8 in Batch.inputs, labels (B,) int64 in Batch.targets."""

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        net = small_resnet(config.channels, config.classes, config.layers, config.widths, config.dropout)
        self.net = net.to(memory_format=torch.channels_last)  # what a GPU's bfloat16 convolutions take

    def forward(self, batch: Batch) -> Output:
        """Cross-entropy in nats an image, and the accuracy."""
        logits = self.logits(batch.inputs)
        loss = F.cross_entropy(logits.float(), batch.targets, label_smoothing=self.config.smoothing, reduction="sum")
        count = torch.full((), len(logits), device=logits.device)
        right = (logits.argmax(dim=1) == batch.targets).sum()
        return Output(loss, count, {"accuracy": (right, count)})

    def logits(self, images: Tensor) -> Tensor:
        return self.net(scaled(images))

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> (B, F) float32, whatever the precision around it: what the last layer decides by."""
        with torch.autocast(images.device.type, enabled=False):
            return self.net.forward_head(self.net.forward_features(scaled(images)), pre_logits=True)

    def answers(self, features: Tensor) -> Tensor:
        """(B, F) -> the class of each (B,)."""
        with torch.autocast(features.device.type, enabled=False):
            return self.net.fc(features).argmax(dim=1)


def scaled(images: Tensor) -> Tensor:
    """uint8 -> [-1, 1] float32."""
    return images.float() / 127.5 - 1


def load_classifier(reference: str) -> Frozen | None:
    """The trained classifier behind a run folder or a name of weights; None for ""."""
    return frozen.load(reference, kind=ClassifierConfig, what="classifier") if reference else None


@torch.no_grad()
def all_features(model: Classifier, pixels: np.ndarray, batch: int = 500) -> Tensor:
    """(N, H, W, C) uint8 -> (N, F) float32 on the model's device."""
    device = next(model.parameters()).device
    starts = shown(range(0, len(pixels), batch), "features")
    return torch.cat([model.features(to_images(pixels[at : at + batch]).to(device)) for at in starts])


def to_images(pixels: np.ndarray) -> Tensor:
    """(B, H, W, C) uint8 -> (B, C, H, W)."""
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def collate_images(items: list[tuple[np.ndarray, int]]) -> Batch:
    pixels, labels = zip(*items, strict=True)
    return Batch(to_images(np.stack(pixels)), torch.tensor(labels))


class Accuracy:
    """The share of images whose class is found, and the cross-entropy that training minimises."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)

    @torch.no_grad()
    def update(self, model: Any, batch: Batch) -> None:
        output = model(batch)
        right, _ = output.metrics["accuracy"]
        self.sums += torch.stack((output.loss_sum, right, output.count)).double().cpu()

    def reduce(self, ranks: Any) -> None:
        self.sums = ranks.sum(self.sums)

    def compute(self) -> dict[str, float]:
        loss, right, count = self.sums.tolist()
        return {"loss": loss / max(1, count), "accuracy": right / max(1, count), "images": count}


class ClassifierTask(Task):
    domain = "image_classifier"

    @dataclass
    class Config:
        dataset: Choice | None = configs.choice(datasets, "image/mnist")
        augment: Augment = field(default_factory=Augment)

    def __init__(self, config: Config, assets: Path | None = None):
        self.config = config = configs.build(self.Config, config)
        assert config.dataset is not None
        self.data = datasets.get(config.dataset.name)(config.dataset.config)

    def provenance(self) -> dict[str, Any]:
        return self.data.provenance()

    def stream(self, split: str, *, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0) -> SourceStream:
        images, augment = self.data.load(split), self.config.augment
        views = pixel_views(images.pixels, augment)
        source = image_source(split, views, images.labels, collate_images, seed=seed, shift=augment.shift)
        return SourceStream(source, batch_size=batch_size, rank=rank, world=world, endless=split == "train")

    def metrics(self, split: str) -> dict[str, Metric]:
        return {"accuracy": Accuracy()}

    def describe(self, split: str) -> str:
        return "every image once, as it is"
