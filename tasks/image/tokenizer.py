"""The image tokenizer: a vector-quantised autoencoder (van den Oord et al., arXiv 1711.00937) that makes an image a
small grid of codes. Its blocks are timm's ConvNeXt blocks (arXiv 2201.03545), its codebook that of zoo/quantize.py.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tasks.image.classifier import Classifier, collate_images, load_classifier, scaled, to_images
from tasks.image.grid import as_media, make_grid
from tasks.image.stream import Augment, image_source, pixel_views, shown
from zoo import config as configs
from zoo import frozen
from zoo.config import Choice
from zoo.data import SourceStream
from zoo.distances import FeatureStats, frechet
from zoo.frozen import Frozen
from zoo.model import Batch, Output
from zoo.quantize import QuantizerConfig, VectorQuantizer, code_use
from zoo.registry import datasets
from zoo.task import Media, Metric, Task

MOST_CODES = 1 << 16
SCALE = 4.0  # squared errors in [-1, 1] are counted in quarters, about the variance of natural images


@dataclass
class TokenizerConfig:
    """factor     how many pixels a code stands for each way: 1, 2, 4, 8, …
    width      channels inside
    depth      ConvNeXt blocks at each resolution, of encoder and decoder each
    quantizer  the codebook; its `dim` is usually much smaller than `width`
    absolute   weight of the absolute error beside the squared one: sharper edges
    """

    channels: int = 3
    factor: int = 4
    width: int = 128
    depth: int = 2
    absolute: float = 0.5
    quantizer: QuantizerConfig = field(default_factory=lambda: QuantizerConfig(codes=512, dim=32))

    def __post_init__(self):
        if self.factor < 1 or self.factor & (self.factor - 1):
            raise ValueError(f"factor = {self.factor}; it takes a power of two: 1, 2, 4, 8")
        if self.quantizer.codes > MOST_CODES:
            raise ValueError(f"quantizer.codes = {self.quantizer.codes}; it takes at most {MOST_CODES}")
        for name in ("channels", "width", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; it takes 1 or more")

    def build(self) -> "Tokenizer":
        return Tokenizer(self)


class Tokenizer(nn.Module):
    """Images (B, C, H, W) uint8 in Batch.inputs; H and W multiples of `factor`."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        width, halvings = config.width, int(math.log2(config.factor))
        encoder: list[nn.Module] = [nn.Conv2d(config.channels, width, 3, padding=1), *blocks(config)]
        decoder: list[nn.Module] = [nn.Conv2d(width, width, 3, padding=1), *blocks(config)]
        for _ in range(halvings):
            encoder += [nn.Conv2d(width, width, 2, stride=2), *blocks(config)]
            decoder += [nn.Conv2d(width, 4 * width, 1), nn.PixelShuffle(2), *blocks(config)]
        self.encoder = nn.Sequential(*encoder)
        self.quantizer = VectorQuantizer(config.quantizer, width)
        self.decoder = nn.Sequential(*decoder, nn.Conv2d(width, config.channels, 3, padding=1))
        # As a GPU's bfloat16 convolutions take it
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def codes(self) -> int:
        return self.config.quantizer.codes

    def forward(self, batch: Batch) -> Output:
        """The sum over images of the mean error of a pixel value and the mean commitment of a code."""
        images = scaled(self._checked(batch.inputs))
        quantised = self.quantizer(self._encoded(images))
        error = self.decoder(quantised.vectors.movedim(-1, 1)).float() - images
        squared = error.square().mean(dim=(1, 2, 3)).sum()
        absolute = error.abs().mean(dim=(1, 2, 3)).sum()
        count = torch.full((), len(images), device=images.device)
        loss = SCALE * squared + self.config.absolute * absolute + count * quantised.commitment_mean
        alive = self.quantizer.share > self.config.quantizer.restart / self.codes
        metrics = {
            "mse": (squared.detach(), count),
            "commitment": (quantised.commitment.detach(), quantised.count),
            "codes_in_use": (alive.sum(), torch.full((), self.codes, device=images.device)),
        }
        return Output(loss, count, metrics)

    def encode(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> codes (B, H / factor, W / factor) int64."""
        return self.quantizer.encode(self._encoded(scaled(self._checked(images))))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) -> (B, C, H, W) uint8."""
        vectors = self.quantizer.decode(codes).movedim(-1, 1)
        return ((self.decoder(vectors).float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def _encoded(self, images: Tensor) -> Tensor:
        return self.encoder(images).movedim(1, -1)

    def _checked(self, images: Tensor) -> Tensor:
        channels, factor = self.config.channels, self.config.factor
        if images.shape[1] != channels or images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"images of shape {tuple(images.shape[1:])}: this tokenizer takes {channels} channels (model.channels) "
                f"and sides that are multiples of {factor} (model.factor)"
            )
        return images


def blocks(config: TokenizerConfig) -> list[nn.Module]:
    from timm.layers import LayerNorm2d
    from timm.models.convnext import ConvNeXtBlock

    return [
        ConvNeXtBlock(config.width, kernel_size=5, conv_mlp=True, norm_layer=LayerNorm2d, ls_init_value=0.1)
        for _ in range(config.depth)
    ]


def load_tokenizer(reference: str, sha256: str = "") -> Frozen:
    return frozen.load(reference, kind=TokenizerConfig, what="tokenizer", sha256=sha256)


@torch.no_grad()
def encode_all(tokenizer: Tokenizer, pixels: np.ndarray, batch: int = 500) -> np.ndarray:
    """(N, H, W, C) uint8 -> codes (N, h, w) int32, the same whatever the precision around it."""
    device = next(tokenizer.parameters()).device
    starts = shown(range(0, len(pixels), batch), "codes")
    parts = (to_images(pixels[at : at + batch]).to(device) for at in starts)
    with torch.autocast(device.type, enabled=False):
        return np.concatenate([tokenizer.encode(part).int().cpu().numpy() for part in parts])


@torch.no_grad()
def decode_all(tokenizer: Tokenizer, codes: np.ndarray, batch: int = 500) -> np.ndarray:
    """Codes (N, h, w) -> (N, H, W, C) uint8, the same whatever the precision around it."""
    device = next(tokenizer.parameters()).device
    parts = (torch.from_numpy(codes[at : at + batch]).long().to(device) for at in range(0, len(codes), batch))
    with torch.autocast(device.type, enabled=False):
        return np.concatenate([tokenizer.decode(part).cpu().numpy().transpose(0, 2, 3, 1) for part in parts])


# ---------------------------------------------------------------------------------------------------------------------


class Reconstruction:
    """How well images come back from their codes: errors in [-1, 1], PSNR in dB of the mean squared error over all, how
    the codebook is used, and with a classifier the Fréchet distance between images and reconstructions and how often it
    names the classes of both right: what is lost in the codes, no generator of codes can draw."""

    def __init__(self, classifier: Classifier | None):
        self.codes = torch.zeros(2, dtype=torch.int64)  # size of the codebook and 1, from each rank that met a batch
        self.counts = torch.zeros(MOST_CODES, dtype=torch.int64)
        self.sums = torch.zeros(3, dtype=torch.float64)
        self.classifier = classifier
        width = classifier.config.widths[-1] if classifier is not None else 0
        self.real, self.rebuilt = FeatureStats(width), FeatureStats(width)
        self.right = torch.zeros(3, dtype=torch.int64)  # images, reconstructions, of so many

    @torch.no_grad()
    def update(self, model: Any, batch: Batch) -> None:
        codes = model.encode(batch.inputs)
        rebuilt = model.decode(codes)
        error = (rebuilt.double() - batch.inputs.double()) / 127.5
        numel = torch.tensor(error.numel(), device=error.device)
        self.sums += torch.stack((error.square().sum(), error.abs().sum(), numel)).cpu()
        self.codes = torch.tensor([model.codes, 1])
        self.counts += torch.bincount(codes.flatten(), minlength=MOST_CODES).cpu()
        if self.classifier is not None:
            self.classifier.to(batch.inputs.device)
            pairs = ((self.real, batch.inputs), (self.rebuilt, rebuilt))
            for place, (stats, images) in enumerate(pairs):
                features = self.classifier.features(images)
                stats.add(features)
                self.right[place] += int((self.classifier.answers(features) == batch.targets).sum())
            self.right[2] += len(rebuilt)

    def reduce(self, ranks: Any) -> None:
        mine = (self.sums, self.counts, self.codes, self.right)
        self.sums, self.counts, self.codes, self.right = (ranks.sum(x) for x in mine)
        self.real.reduce(ranks)
        self.rebuilt.reduce(ranks)

    def compute(self) -> dict[str, float]:
        squared, absolute, count = self.sums.tolist()
        mse, size = squared / max(1, count), int(self.codes[0] / self.codes[1].clamp(min=1))
        use = {f"codebook_{name}": value for name, value in code_use(self.counts[:size]).items()}
        scores = {"mse": mse, "mae": absolute / max(1, count), "psnr": 10 * math.log10(4 / max(mse, 1e-12)), **use}
        if self.classifier is not None:
            scores["reconstruction_fid_own_features"] = frechet(self.real, self.rebuilt)
            real, rebuilt, images = self.right.tolist()
            scores["class_accuracy_real"] = real / max(1, images)
            scores["reconstruction_class_accuracy"] = rebuilt / max(1, images)
        return scores


class TokenizerTask(Task):
    domain = "image_tokenizer"

    @dataclass
    class Config:
        """classifier  run folder or weights of an image_classifier, for the Fréchet distance of reconstructions"""

        dataset: Choice | None = configs.choice(datasets, "image/mnist")
        augment: Augment = field(default_factory=Augment)
        classifier: str = ""

    def __init__(self, config: Config, assets: Path | None = None):
        self.config = config = configs.build(self.Config, config)
        assert config.dataset is not None
        self.data = datasets.get(config.dataset.name)(config.dataset.config)
        self.classifier = load_classifier(config.classifier)

    def provenance(self) -> dict[str, Any]:
        judge = {"classifier": self.classifier.card()} if self.classifier else {}
        return {**self.data.provenance(), **judge}

    def stream(self, split: str, *, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0) -> SourceStream:
        images, augment = self.data.load(split), self.config.augment
        views = pixel_views(images.pixels, augment)
        source = image_source(split, views, images.labels, collate_images, seed=seed, shift=augment.shift)
        return SourceStream(source, batch_size=batch_size, rank=rank, world=world, endless=split == "train")

    def metrics(self, split: str) -> dict[str, Metric]:
        return {"reconstruction": Reconstruction(self.classifier.module if self.classifier else None)}  # type: ignore[arg-type]

    def describe(self, split: str) -> str:
        return "every image once, through its codes and back, rounded to 8 bits"

    @torch.no_grad()
    def media(self, model: nn.Module, batch: Batch) -> Media:
        """Images over their reconstructions."""
        assert isinstance(model, Tokenizer)
        images = batch.inputs[:16]
        both = torch.cat((images, model.decode(model.encode(images))))
        picture = make_grid(both.permute(0, 2, 3, 1).cpu().numpy(), columns=len(images))
        return Media(images={"reconstruction": as_media(picture)})
