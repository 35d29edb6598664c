"""Images side by side, as one picture."""

from pathlib import Path

import numpy as np
from PIL import Image


def make_grid(images: np.ndarray, columns: int = 0, gap: int = 1) -> np.ndarray:
    """(N, H, W, C) uint8 -> (h, w, 3) uint8, row by row, black between; columns 0: as square as it gets."""
    count, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    grid = np.zeros((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), dtype=np.uint8)
    for number, image in enumerate(images):
        top, left = gap + (number // columns) * (height + gap), gap + (number % columns) * (width + gap)
        grid[top : top + height, left : left + width] = image if channels == 3 else image[..., :1]
    return grid


def write_png(picture: np.ndarray, path: Path, zoom: int = 1) -> None:
    """(h, w, 3) uint8 -> a PNG file, each pixel `zoom` wide."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.repeat(zoom, axis=0).repeat(zoom, axis=1)).save(path)


def as_media(picture: np.ndarray):
    """(h, w, 3) uint8 -> (3, h, w) float32 in [0, 1], as TensorBoard takes it."""
    import torch

    return torch.from_numpy(picture).permute(2, 0, 1).float() / 255
