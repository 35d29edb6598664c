"""The data set `audio/folder`: a user's own recordings, of any rate and number of channels, as soundfile reads them."""

import logging
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks.audio.data import SPLITS, Recordings, check_split, digest
from tasks.audio.waves import to_pcm
from zoo.files import ClassFolder

log = logging.getLogger(__name__)
ENDINGS = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64"})
SILENCE = 1e-4  # a recording that moves by no more than twice this is taken for silent, at whatever offset
LEAST_RATE, MOST_RATE = 1000, 768000  # Hz; what lies beyond is a damaged header
FINEST = 1000  # the largest term of a ratio of rates
ENDLESS = 0x7FFFF000  # from this size on a writer did not know the length: it wrote to a pipe


class Folder:
    """A user's own recordings, in sub-folders by class: `yes/1.wav`, or `train/yes/1.flac` where splits have folders.

    Channels are averaged, the rate is changed to `rate` by torchaudio, values of any width are rounded to 16 bits.
    Files that cannot be read, are silent, or shorter than `least`, are skipped, counted and listed in `bad`; more than
    `max_bad` are refused, as are an empty class folder and a folder without recordings. All are held in memory.
    """

    @dataclass
    class Config:
        """path     the folder
        rate     Hz that all are changed to
        least    seconds that a recording has to last
        most     seconds of a recording that are read; 0: all of it
        share    of the recordings for valid and for test, each, where no folder says so
        silent   take silent recordings, too
        max_bad  files that may be skipped
        """

        path: str = ""
        rate: int = 8000
        least: float = 0.05
        most: float = 0.0
        share: float = 0.05
        silent: bool = False
        max_bad: int = 10

        def __post_init__(self):
            if self.rate < 1000:
                raise ValueError(f"dataset.rate = {self.rate}; it takes 1,000 or more Hz")
            if not 0 < self.share < 0.5:
                raise ValueError(f"dataset.share = {self.share}; it takes a number between 0 and 0.5")
            if min(self.least, self.most, self.max_bad) < 0:
                raise ValueError("dataset.least, dataset.most and dataset.max_bad take 0 or more")

    def __init__(self, config: Config):
        if not config.path:
            raise ValueError("audio/folder needs task.dataset.path, a folder with recordings in sub-folders by class")
        self.config = config
        self.root = Path(config.path).expanduser()
        self.rate = config.rate

    @cached_property
    def _files(self) -> ClassFolder:
        return ClassFolder(self.root, self.config.share, ENDINGS, "recording")

    @property
    def attributes(self) -> dict[str, tuple[str, ...]]:
        return {"class": self._files.classes}

    @cached_property
    def _read(self) -> tuple[dict[str, Recordings], list[str]]:
        return read_folder(self._files, self.config)

    @property
    def bad(self) -> list[str]:
        """path: why it was skipped."""
        return self._read[1]

    def load(self, split: str) -> Recordings:
        check_split(split, "audio/folder")
        recordings = self._read[0][split]
        if not len(recordings):
            raise ValueError(
                f"{self.root} has no recording for split {split!r}: make a folder {split!r} in it"
                + ("" if self._files.named else f", or raise task.dataset.share = {self.config.share}")
            )
        return recordings

    def provenance(self) -> dict[str, Any]:
        parts = self._read[0]
        return {
            "data": "audio/folder",
            "rate": self.rate,
            "sha256": {split: digest(recordings) for split, recordings in parts.items()},
            "recordings": {split: len(recordings) for split, recordings in parts.items()},
            "classes": list(self._files.classes),
            "skipped": len(self.bad),
        }


class BadRecording(ValueError):
    """A file that cannot be read, or holds nothing to learn from."""


def read_folder(folder: ClassFolder, config: Any) -> tuple[dict[str, Recordings], list[str]]:
    """Recordings by split, and `path: why` for each file that was skipped. Raises ValueError for more than max_bad."""
    sounds: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    labels: dict[str, list[int]] = {split: [] for split in SPLITS}
    names: dict[str, list[str]] = {split: [] for split in SPLITS}
    bad: list[str] = []
    for path, split, label in folder.files:
        try:
            sounds[split].append(checked(read_sound(path, config.rate, config.most), config))
            labels[split].append(folder.classes.index(label))
            names[split].append(path.relative_to(folder.root).as_posix())
        except BadRecording as error:
            bad.append(f"{path}: {error}")
            if len(bad) > config.max_bad:
                listed = "\n  ".join(bad)
                raise ValueError(
                    f"more than max_bad = {config.max_bad} recordings of task.dataset cannot be used:\n  {listed}"
                ) from error
    if bad:
        listed = "\n  ".join(bad)
        log.warning("%s: %d of %d recordings were skipped:\n  %s", folder.root, len(bad), len(folder.files), listed)
    parts = {
        split: Recordings(sounds[split], np.array(labels[split], dtype=np.int64).reshape(-1, 1), names[split])
        for split in SPLITS
    }
    if not any(len(part) for part in parts.values()):
        raise ValueError(f"{folder.root} has no recording that can be used:\n  " + "\n  ".join(bad))
    return parts, bad


def checked(sound: np.ndarray, config: Any) -> np.ndarray:
    """Raises BadRecording."""
    if len(sound) < max(1, round(config.least * config.rate)):
        raise BadRecording(f"lasts {len(sound) / config.rate:.3f} s, less than task.dataset.least = {config.least}")
    if not config.silent and int(sound.max()) - int(sound.min()) <= 2 * SILENCE * 32768:
        raise BadRecording("is silent; task.dataset.silent=true takes it")
    return sound


def read_sound(path: Path, rate: int, most: float = 0.0) -> np.ndarray:
    """(T,) int16 at `rate`, channels averaged; of its first `most` seconds, 0: all. Raises BadRecording."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # the library that it wraps may be missing, too
        raise ValueError(f"reading {path} needs the package soundfile: {error}") from error
    try:
        with soundfile.SoundFile(str(path)) as file:
            frames, found = file.frames, file.samplerate
            wanted = frames if not most else min(frames, round(most * found))
            sound = file.read(wanted, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        raise BadRecording(f"is no recording that can be read: {error}") from error
    if len(sound) < wanted:
        raise BadRecording(f"is truncated: {wanted - len(sound)} samples are missing")
    if missing := missing_bytes(path):
        raise BadRecording(f"is truncated: {missing} bytes are missing")
    if not LEAST_RATE <= found <= MOST_RATE:
        raise BadRecording(f"has a rate of {found} Hz; {LEAST_RATE} to {MOST_RATE} are read")
    if not np.isfinite(sound).all():
        raise BadRecording("holds values that are not finite")
    return to_pcm(resampled(sound.mean(axis=1), found, rate))


def missing_bytes(path: Path) -> int:
    """How many bytes of sound the header of a wav or aiff file promises and the file does not hold, for soundfile takes
    fewer without a word; 0 where the header does not know."""
    held = path.stat().st_size
    with path.open("rb") as file:
        order = {b"RIFF": "little", b"FORM": "big"}.get(file.read(4))
        file.seek(12)
        while order and len(head := file.read(8)) == 8:
            size, begin = int.from_bytes(head[4:], order), file.tell()  # type: ignore[arg-type]
            if head[:4] in (b"data", b"SSND"):
                return 0 if size >= ENDLESS else max(0, begin + size - held)
            file.seek(begin + size + size % 2)
    return 0


def resampled(sound: np.ndarray, found: int, wanted: int) -> np.ndarray:
    """(T,) float32 at `found` Hz -> at `wanted`, by torchaudio's windowed sinc.

    Its filters take memory by the product of the reduced rates, so that of an odd one (44,101 to 8,000) the nearest
    fraction with terms of at most FINEST stands for it. Ratios of usual rates are exact.
    """
    if found == wanted or not len(sound):
        return sound
    from torchaudio.functional import resample

    ratio = Fraction(wanted, found).limit_denominator(max(1, min(FINEST, FINEST * found // wanted)))
    return resample(torch.from_numpy(sound), ratio.denominator, ratio.numerator).numpy()
