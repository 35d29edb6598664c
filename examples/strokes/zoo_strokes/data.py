"""Closed outlines, drawn by a rule: a pen makes unit moves in eight directions and ends where it began.

A move is a number from 0 (east) counted against the clock to 7 (south-east).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

STEPS = np.array([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)])  # (8, 2), x and y of a move
END = len(STEPS)  # the token after the last move
START = END + 1  # what stands before the first one
SPLITS = {"train": 0, "valid": 1, "test": 2}


class Outlines:
    """Convex outlines whose opposite sides are equal: rectangles, hexagons, octagons, turned and of either sense."""

    @dataclass
    class Config:
        """longest  side, in moves
        train, held_out  drawings of the training split, and of valid and test each
        """

        longest: int = 5
        train: int = 4000
        held_out: int = 500
        seed: int = 0

        def __post_init__(self):
            if self.longest < 1 or self.train < 1 or self.held_out < 1:
                raise ValueError("longest, train and held_out take 1 or more")

    def __init__(self, config: Config):
        self.config = config

    @property
    def most_moves(self) -> int:
        return 8 * self.config.longest

    def drawings(self, split: str) -> list[np.ndarray]:
        """Each (N,) int64 moves, without start and end."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r} does not exist; accepted: {', '.join(SPLITS)}")
        rng = np.random.default_rng([self.config.seed, SPLITS[split]])
        return [self._outline(rng) for _ in range(self.config.train if split == "train" else self.config.held_out)]

    def provenance(self) -> dict[str, Any]:
        """What names the data exactly: they are made by rule, so the rule's numbers do."""
        return {"dataset": "strokes/outlines", "version": 1, **vars(self.config)}

    def _outline(self, rng: np.random.Generator) -> np.ndarray:
        sides = rng.permutation(4)[: rng.integers(2, 5)]  # which of four directions it has, with their opposites
        lengths = np.zeros(4, dtype=np.int64)
        lengths[sides] = rng.integers(1, self.config.longest + 1, len(sides))
        turned = np.repeat(np.arange(8), np.tile(lengths, 2)) + rng.integers(8)
        return (turned if rng.integers(2) else -turned) % 8
