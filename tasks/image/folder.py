"""The data set `image/folder`: a user's own pictures, any size and format that Pillow reads."""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms import InterpolationMode, v2

from tasks.image.data import SPLITS, Images, check_split, pixel_digest
from tasks.image.stream import shown
from zoo.files import ClassFolder

log = logging.getLogger(__name__)
ENDINGS = frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN)
GREY = ("1", "L", "LA", "La")  # Pillow's modes without colour
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # and those of more than 8 bits


class Folder:
    """A user's own pictures, in sub-folders by class: `cats/1.png`, or `train/cats/1.png` where splits have folders.

    Pictures right in the folder (or in a split's) are one class, `all`. Each is resized so that its shorter side is
    `size` and cropped to the middle square (torchvision's transforms). Without split folders, pictures go to splits by
    a hash of their path. Files that cannot be read or do not fit are skipped, counted and listed in `bad`; more than
    `max_bad` are refused, as are an empty class folder and a folder without pictures. All are held in memory.
    """

    @dataclass
    class Config:
        """path      the folder
        size      of the square images, in pixels
        channels  3 for colour, 1 for grey
        convert   turn grey pictures in a colour folder, and coloured ones in a grey folder, into what is asked for
        enlarge   take pictures smaller than `size`, too
        share     of the pictures for valid and for test, each, where no folder says so
        max_bad   files that may be skipped
        """

        path: str = ""
        size: int = 32
        channels: int = 3
        convert: bool = False
        enlarge: bool = False
        share: float = 0.05
        max_bad: int = 10

        def __post_init__(self):
            if self.size < 1:
                raise ValueError(f"dataset.size = {self.size}; it takes 1 or more pixels")
            if self.channels not in (1, 3):
                raise ValueError(f"dataset.channels = {self.channels}; it takes 3 (colour) or 1 (grey)")
            if not 0 < self.share < 0.5:
                raise ValueError(f"dataset.share = {self.share}; it takes a number between 0 and 0.5")
            if self.max_bad < 0:
                raise ValueError(f"dataset.max_bad = {self.max_bad}; it takes 0 or more files")

    def __init__(self, config: Config):
        if not config.path:
            raise ValueError("image/folder needs task.dataset.path, a folder with pictures in sub-folders by class")
        self.config = config
        self.root = Path(config.path).expanduser()
        self.shape = (config.size, config.size, config.channels)

    @cached_property
    def _files(self) -> "ClassFolder":
        return ClassFolder(self.root, self.config.share, ENDINGS, "picture")

    @property
    def classes(self) -> tuple[str, ...]:
        return self._files.classes

    @cached_property
    def _read(self) -> tuple[dict[str, Images], list[str]]:
        return read_pictures(self._files, self.config)

    @property
    def bad(self) -> list[str]:
        """path: why it was skipped."""
        return self._read[1]

    def load(self, split: str) -> Images:
        check_split(split, "image/folder")
        images = self._read[0][split]
        if not len(images):
            raise ValueError(
                f"{self.root} has no picture for split {split!r}: make a folder {split!r} in it"
                + ("" if self._files.named else f", or raise task.dataset.share = {self.config.share}")
            )
        return images

    def provenance(self) -> dict[str, Any]:
        parts = self._read[0]
        return {
            "data": "image/folder",
            "sha256": {split: pixel_digest(images) for split, images in parts.items()},
            "images": {split: len(images) for split, images in parts.items()},
            "classes": list(self.classes),
            "skipped": len(self.bad),
        }


class BadPicture(ValueError):
    """A picture that cannot be read, or is not what its folder is meant to hold."""


def read_pictures(folder: ClassFolder, config: Any) -> tuple[dict[str, Images], list[str]]:
    """Images by split, and `path: why` for each file that was skipped. Raises ValueError for more than max_bad."""
    pixels: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    labels: dict[str, list[int]] = {split: [] for split in SPLITS}
    bad: list[str] = []
    for path, split, label in shown(folder.files, f"reading {folder.root}"):
        try:
            pixels[split].append(read_picture(path, config))
            labels[split].append(folder.classes.index(label))
        except BadPicture as error:
            bad.append(f"{path}: {error}")
            if len(bad) > config.max_bad:
                listed = "\n  ".join(bad)
                raise ValueError(
                    f"more than max_bad = {config.max_bad} pictures of task.dataset cannot be used:\n  {listed}"
                ) from error
    if bad:
        listed = "\n  ".join(bad)
        log.warning("%s: %d of %d pictures were skipped:\n  %s", folder.root, len(bad), len(folder.files), listed)
    empty = np.zeros((0, config.size, config.size, config.channels), dtype=np.uint8)
    images = {
        split: Images(np.stack(pixels[split]) if pixels[split] else empty, np.array(labels[split], dtype=np.int64))
        for split in SPLITS
    }
    if not any(len(part) for part in images.values()):
        raise ValueError(f"{folder.root} has no picture that can be used:\n  " + "\n  ".join(bad))
    return images, bad


def read_picture(path: Path, config: Any) -> np.ndarray:
    """(size, size, channels) uint8. Raises BadPicture."""
    return fit_picture(open_picture(path), config.size, config.channels, convert=config.convert, enlarge=config.enlarge)


def open_picture(path: Path) -> Image.Image:
    """Raises BadPicture."""
    try:
        with Image.open(path) as file:
            file.load()
            return file.copy()
    except UnidentifiedImageError as error:
        raise BadPicture("is no picture of a known format") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadPicture(f"cannot be read: {error}") from error


def fit_picture(picture: Image.Image, size: int, channels: int, *, convert: bool, enlarge: bool) -> np.ndarray:
    """(size, size, channels) uint8: shorter side to `size`, then the middle. Raises BadPicture."""
    if picture.mode in DEEP:
        raise BadPicture(f"has more than 8 bits a channel (mode {picture.mode})")
    grey = picture.mode in GREY
    if grey != (channels == 1) and not convert:
        kinds = "grey in a colour folder" if grey else "coloured in a grey folder"
        raise BadPicture(f"is {kinds} (mode {picture.mode}); task.dataset.convert=true converts it")
    if min(picture.size) < size and not enlarge:
        raise BadPicture(f"is {picture.width} x {picture.height}, smaller than size = {size}; see task.dataset.enlarge")
    plain = picture.convert("L" if channels == 1 else "RGB")
    tensor = v2.functional.pil_to_tensor(plain)
    resized = v2.functional.resize(tensor, [size], interpolation=InterpolationMode.BICUBIC, antialias=True)
    fitted: torch.Tensor = v2.functional.center_crop(resized, [size, size])
    return fitted.permute(1, 2, 0).contiguous().numpy()
