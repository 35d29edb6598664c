"""In which order the elements of an image are written down: named permutations of (row, column, channel).

An order gives, place by place, the index of the element in an array (H, W, C), row-major. Any of them gives an exact
likelihood, for all elements are there once; only those that go row by row can complete a given upper half.
"""

from collections.abc import Callable

import numpy as np

Order = Callable[[int, int, int], np.ndarray]


def by_pixel(path: np.ndarray, channels: int) -> np.ndarray:
    """Pixels in the order of `path` (H * W,), the channels of each one after another."""
    return (path[:, None] * channels + np.arange(channels)).ravel()


def raster(height: int, width: int, channels: int) -> np.ndarray:
    """Row by row, left to right, the channels of a pixel together."""
    return np.arange(height * width * channels)


def planar(height: int, width: int, channels: int) -> np.ndarray:
    """The whole first channel row by row, then the second."""
    return raster(height, width, channels).reshape(-1, channels).T.ravel()


def columns(height: int, width: int, channels: int) -> np.ndarray:
    """Column by column, top to bottom."""
    return by_pixel(np.arange(height * width).reshape(height, width).T.ravel(), channels)


def snake(height: int, width: int, channels: int) -> np.ndarray:
    """Row by row, every other one from right to left: neighbours in the row of numbers are neighbours in the image."""
    grid = np.arange(height * width).reshape(height, width)
    grid[1::2] = grid[1::2, ::-1].copy()
    return by_pixel(grid.ravel(), channels)


def spiral(height: int, width: int, channels: int) -> np.ndarray:
    """From the middle outwards: the rings that a clockwise walk from the upper left corner makes, backwards."""
    grid, rings = np.arange(height * width).reshape(height, width), []
    while grid.size:
        rings.append(grid[0])
        grid = np.rot90(grid[1:])
    return by_pixel(np.concatenate(rings)[::-1], channels)


def hilbert(height: int, width: int, channels: int) -> np.ndarray:
    """Along Hilbert's curve over the smallest square of a power of two that holds the image."""
    side = 1 << (max(height, width) - 1).bit_length()
    path = [_hilbert_place(step, side) for step in range(side * side)]
    inside = [row * width + column for row, column in path if row < height and column < width]
    return by_pixel(np.array(inside), channels)


def _hilbert_place(step: int, side: int) -> tuple[int, int]:
    """(row, column) of the curve's `step`: from the finest quadrant to the coarsest, turned as the curve turns."""
    row = column = 0
    size = 1
    while size < side:
        right = 1 & (step // 2)
        down = 1 & (step ^ right)
        if not down:
            if right:
                row, column = size - 1 - row, size - 1 - column
            row, column = column, row
        row, column = row + size * down, column + size * right
        step //= 4
        size *= 2
    return row, column


def shuffled(height: int, width: int, channels: int) -> np.ndarray:
    """Pixels in one fixed random order."""
    return by_pixel(np.random.default_rng(0).permutation(height * width), channels)


ORDERS: dict[str, Order] = {
    "raster": raster,
    "planar": planar,
    "columns": columns,
    "snake": snake,
    "spiral": spiral,
    "hilbert": hilbert,
    "shuffled": shuffled,
}


def rows_given(order: np.ndarray, height: int, width: int, channels: int, rows: int) -> int | None:
    """How many places the upper `rows` rows take up, if they come first in `order`; else None."""
    count = rows * width * channels
    return count if (order[:count] < count).all() else None
