"""Images as a source of training and evaluation examples, with augmentation drawn from the position alone."""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from zoo.data import Recent, epoch_rng
from zoo.model import Batch


@dataclass
class Augment:
    """Of training images. Both keep pixel values on their 8-bit lattice, and whatever a model is trained on, its
    likelihood of untouched test images stays exact; but a model also spends probability on what it was shown.

    flip   mirror half of the images: right where left and right are alike (not for digits)
    shift  move by up to so many pixels each way, black coming in: for classifiers and tokenizers, whose answer should
           not depend on it; a likelihood gets worse by it
    """

    flip: bool = False
    shift: int = 0

    def __post_init__(self):
        if self.shift < 0:
            raise ValueError(f"augment.shift = {self.shift}; it takes 0 or more pixels")


class ImageSource:
    """Items (array, label) out of `views`, arrays (N, …) of the same images, one as it is and others augmented.

    seed None: one pass over the first view, in order. Else shuffled each epoch, each image in a view and at a shift
    that the epoch draws.
    """

    def __init__(
        self,
        views: Sequence[np.ndarray],
        labels: np.ndarray,
        collate: Callable[[list[tuple[np.ndarray, int]]], Batch],
        *,
        seed: int | None,
        shift: int = 0,
    ):
        self.views, self.labels, self.collate = list(views), labels, collate
        self.seed, self.shift = seed, shift
        self._orders = Recent()

    def __len__(self) -> int:
        return len(self.labels)

    def item(self, position: int) -> tuple[np.ndarray, int]:
        epoch, place = divmod(position, len(self.labels))
        if self.seed is None:
            return self.views[0][place], int(self.labels[place])
        index, view, shifts = (table[place] for table in self._orders.get(epoch, self._draw))
        return shifted(self.views[view][index], *shifts), int(self.labels[index])

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each place of an epoch: the image, its view, and how far it moves."""
        assert self.seed is not None
        rng, count = epoch_rng(self.seed, epoch), len(self.labels)
        order = rng.permutation(count)
        return order, rng.integers(len(self.views), size=count), rng.integers(-self.shift, self.shift + 1, (count, 2))


def shifted(pixels: np.ndarray, down: int, right: int) -> np.ndarray:
    """(H, W, C) moved, with zeros coming in."""
    if not (down or right):
        return pixels
    height, width = pixels.shape[:2]
    moved = np.zeros_like(pixels)
    moved[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = pixels[
        max(0, -down) : height + min(0, -down), max(0, -right) : width + min(0, -right)
    ]
    return moved


def image_source(
    split: str, views: Sequence[np.ndarray], labels: np.ndarray, collate: Any, *, seed: int, shift: int
) -> ImageSource:
    """Shuffled and moved for training, as they are for evaluation."""
    training = split == "train"
    return ImageSource(views, labels, collate, seed=seed if training else None, shift=shift if training else 0)


def shown(work: Iterable[Any], what: str) -> Iterable[Any]:
    """A bar on a terminal, silence elsewhere."""
    return tqdm(work, desc=what, leave=False, disable=not sys.stderr.isatty())


def pixel_views(pixels: np.ndarray, augment: Augment) -> list[np.ndarray]:
    """The images and, for flips, their mirror images, without a copy."""
    return [pixels, pixels[:, :, ::-1]] if augment.flip else [pixels]
