"""Image data sets: arrays of 8-bit pixels with class labels, by split.

Each is a class with a Config, `shape` (H, W, C), `classes` (names), `load(split)` and `provenance()`. Splits are train,
valid and test. Where a data set has no validation split of its own, `held_out` training images are one; with 0, the
default, every training image trains, and `valid` reads the test split: then nothing may be chosen by it.
"""

import gzip
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image

from zoo.files import DataMissing, cache_folder, check_sha256

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Images:
    """pixels (N, H, W, C) uint8, labels (N,) int64."""

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def part(self, keep: Any) -> "Images":
        return Images(self.pixels[keep], self.labels[keep])


class ImageData(Protocol):
    Config: ClassVar[type]
    shape: tuple[int, int, int]
    classes: tuple[str, ...]

    def load(self, split: str) -> Images: ...

    def provenance(self) -> dict[str, Any]: ...


def check_split(split: str, data: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split {split!r} of {data} does not exist; accepted: {', '.join(SPLITS)}")


def roots(named: str = "") -> list[Path]:
    """Folders where data sets lie: the named one alone, or $ZOO_DATA and the cache."""
    if named:
        return [Path(named).expanduser()]
    shared = os.environ.get("ZOO_DATA")
    return [*([Path(shared)] if shared else []), cache_folder() / "torchvision"]


@dataclass
class StandardConfig:
    """root      the folder that holds the files, as torchvision lays them out; default: $ZOO_DATA, then the cache
    held_out  training images kept for validation; 0: none, and validation reads the test split
    limit     take only the first so many images of each split; 0: all
    """

    root: str = ""
    held_out: int = 0
    limit: int = 0

    def __post_init__(self):
        for name in ("held_out", "limit"):
            if getattr(self, name) < 0:
                raise ValueError(f"dataset.{name} = {getattr(self, name)}; it takes 0 or more images")


class Standard:
    """What the standard sets share: two parts, `train` and `test`, read by `_read(part)` and kept."""

    name: ClassVar[str]
    shape: ClassVar[tuple[int, int, int]]
    classes: ClassVar[tuple[str, ...]]

    def __init__(self, config: StandardConfig):
        self.config = config
        self._parts: dict[str, Images] = {}

    def load(self, split: str) -> Images:
        check_split(split, self.name)
        held_out, limit = self.config.held_out, self.config.limit
        if split == "test" or (split == "valid" and not held_out):
            images = self._part("test")
        else:
            whole = self._part("train")
            if held_out >= len(whole):
                raise ValueError(f"dataset.held_out = {held_out} leaves none of the {len(whole)} training images")
            # Files are sorted here and there: the last ones of one fixed shuffle, so that they are like the others
            shuffled = np.random.default_rng(0).permutation(len(whole)) if held_out else np.arange(len(whole))
            chosen = shuffled[len(whole) - held_out :] if split == "valid" else shuffled[: len(whole) - held_out]
            images = whole.part(np.sort(chosen)) if held_out else whole
        return images.part(slice(limit)) if limit else images

    def provenance(self) -> dict[str, Any]:
        """Digests of the pixels and labels themselves: the same from whatever files they came, in the same order."""
        digests = {part: pixel_digest(self._part(part)) for part in ("train", "test")}
        return {"data": self.name, "sha256": digests, "held_out": self.config.held_out, "limit": self.config.limit}

    def _part(self, part: str) -> Images:
        if part not in self._parts:
            self._parts[part] = self._read(part)
        return self._parts[part]

    def _read(self, part: str) -> Images:
        raise NotImplementedError


def pixel_digest(images: Images) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(images.pixels).data)
    digest.update(images.labels.astype(np.int64).tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------


class Cifar10(Standard):
    """CIFAR-10 (Krizhevsky, 2009): 50,000 + 10,000 images 32 x 32 of ten classes.

    Read as torchvision downloads it (`cifar-10-batches-py`), or as sheets: `cifar10/train_0.webp` and so on, lossless,
    10,000 images each in a grid of 100 x 100, with the labels in `cifar10/train_labels.npy`. Both hold the same images,
    in orders of their own.
    """

    Config = StandardConfig
    name = "image/cifar10"
    shape = (32, 32, 3)
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    SHEETS: ClassVar[dict[str, str]] = {
        "train_0.webp": "00a6e2b1686efc90c72119dd422a112488d465f63f0de4e96ca29eb5037390a1",
        "train_1.webp": "813aead31e715a283001134eb2aec1f139a7b133a6cddab59526e3082397ff99",
        "train_2.webp": "9248bcbd3ba787d81975dd963b4c942d7ca729e460a27a0dfe9ab8474345e584",
        "train_3.webp": "e01a16fcbb0e7f7239cce8e2d2af771c2341a49490ae38c386dbd9a401b44df6",
        "train_4.webp": "468e6c57c0326610580c4399783ee1b216cc4d1508a43189f7444ab64c8db054",
        "train_labels.npy": "07c493c78635c5ce7965610e7079fd95f58753143721e8035cd1352bb6036141",
        "test_0.webp": "2bea2892143589567de328699fe16792933b3307d51ecb7b231aee73bee1853a",
        "test_labels.npy": "30f2711ac2b2325c6e1a1da3606f5f76691289c030e602278b221b8c91daffe8",
    }

    def _read(self, part: str) -> Images:
        for root in roots(self.config.root):
            if (root / "cifar10" / f"{part}_labels.npy").is_file():
                return self._read_sheets(root / "cifar10", part)
            if (root / "cifar-10-batches-py").is_dir():
                return self._from_torchvision(root, part, download=False)
        looked = [str(root / form) for root in roots(self.config.root) for form in ("cifar10", "cifar-10-batches-py")]
        with telling_where(self.name, looked):
            return self._from_torchvision(roots(self.config.root)[-1], part, download=True)

    def _read_sheets(self, folder: Path, part: str) -> Images:
        labels_file = folder / f"{part}_labels.npy"
        check_sha256(labels_file, self.SHEETS[labels_file.name])
        labels = np.load(labels_file).astype(np.int64)
        wanted = min(self.config.limit or len(labels), len(labels))
        whole = not self.config.limit or (part == "train" and self.config.held_out)
        sheets = [name for name in self.SHEETS if name.startswith(part) and name.endswith(".webp")]
        pixels: list[np.ndarray] = []
        for name in sheets:
            if sum(map(len, pixels)) >= wanted and not whole:
                break
            if not (folder / name).is_file():
                raise DataMissing(f"{folder / name} is not there: {self.name} as sheets is {', '.join(self.SHEETS)}")
            check_sha256(folder / name, self.SHEETS[name])
            pixels.append(cut_sheet(np.asarray(Image.open(folder / name).convert("RGB")), 32))
        joined = np.concatenate(pixels)
        return Images(joined, labels[: len(joined)])

    def _from_torchvision(self, root: Path, part: str, *, download: bool) -> Images:
        from torchvision.datasets import CIFAR10  # slow to import, and sheets do without

        data = CIFAR10(str(root), train=part == "train", download=download)
        return Images(data.data, np.asarray(data.targets, dtype=np.int64))


def cut_sheet(sheet: np.ndarray, side: int) -> np.ndarray:
    """(R * side, K * side, C), a grid of images, row-major -> (R * K, side, side, C)."""
    rows, columns = sheet.shape[0] // side, sheet.shape[1] // side
    grid = sheet.reshape(rows, side, columns, side, -1).swapaxes(1, 2)
    return np.ascontiguousarray(grid.reshape(rows * columns, side, side, -1))


# ---------------------------------------------------------------------------------------------------------------------


class Mnist(Standard):
    """MNIST (LeCun et al., 1998): 60,000 + 10,000 grey images 28 x 28 of digits.

    Read from idx files, plain or gzipped, in `MNIST/raw` as torchvision leaves them, or in `mnist`.
    """

    Config = StandardConfig
    name = "image/mnist"
    shape = (28, 28, 1)
    classes = tuple("0123456789")

    def _read(self, part: str) -> Images:
        return read_mnist(self, part, ("MNIST/raw", "mnist"), "MNIST")


class FashionMnist(Standard):
    """Fashion-MNIST (Xiao et al., arXiv 1708.07747): the same format, with pieces of clothing."""

    Config = StandardConfig
    name = "image/fashion_mnist"
    shape = (28, 28, 1)
    classes = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")

    def _read(self, part: str) -> Images:
        return read_mnist(self, part, ("FashionMNIST/raw", "fashion-mnist"), "FashionMNIST")


def read_mnist(data: Standard, part: str, folders: tuple[str, ...], torchvision_name: str) -> Images:
    """From idx files in one of `folders`; where there are none, torchvision downloads them into the first."""
    stem, root = "train" if part == "train" else "t10k", data.config.root
    if (folder := _idx_folder(root, folders, f"{stem}-images-idx3-ubyte")) is None:
        looked = [str(root / folder) for root in roots(root) for folder in folders]
        with telling_where(data.name, looked):
            import torchvision.datasets

            getattr(torchvision.datasets, torchvision_name)(str(roots(root)[-1]), download=True)
        folder = roots(root)[-1] / folders[0]
    pixels = read_idx(idx_file(folder, f"{stem}-images-idx3-ubyte"))
    labels = read_idx(idx_file(folder, f"{stem}-labels-idx1-ubyte")).astype(np.int64)
    if pixels.shape[1:] != data.shape[:2] or len(pixels) != len(labels):
        raise ValueError(
            f"{folder} does not hold {data.name}: {len(labels)} labels for images of shape {pixels.shape}, "
            f"where (N, {data.shape[0]}, {data.shape[1]}) was expected"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(data.classes):
        raise ValueError(f"{folder}: label {labels.max()} is not one of the {len(data.classes)} of {data.name}")
    return Images(pixels[..., None], labels)


def _idx_folder(root: str, folders: tuple[str, ...], name: str) -> Path | None:
    places = (place / folder for place in roots(root) for folder in folders)
    return next((x for x in places if any((x / f"{name}{end}").is_file() for end in ("", ".gz"))), None)


def idx_file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataMissing(f"{folder / name} is not there, nor {name}.gz beside it")


def read_idx(path: Path) -> np.ndarray:
    """An idx file of unsigned bytes, plain or gzipped: two zero bytes, 8 for the type, the number of axes, the size of
    each as a big-endian int32, then the values."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if data[:3] != b"\x00\x00\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{path} is no idx file of unsigned bytes: it begins with {data[:4].hex(' ')}")
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if len(values) != shape.prod(dtype=np.int64):
        raise ValueError(f"{path} is truncated or damaged: {len(values)} values where its header says {shape.tolist()}")
    return values.reshape(shape)


class telling_where:  # noqa: N801  (reads as a phrase)
    """Around a download: what fails becomes DataMissing that says where was looked and how to place the files."""

    def __init__(self, name: str, looked: list[str]):
        self.name, self.looked = name, looked

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, (OSError, RuntimeError)):
            listed = "\n".join(f"  {place}" for place in self.looked)
            raise DataMissing(
                f"{self.name} is not here. Looked in:\n{listed}\nThe download through torchvision failed: {error}\n"
                "To place it by hand: put the files in one of these folders, or set ZOO_DATA or task.dataset.root."
            ) from error
