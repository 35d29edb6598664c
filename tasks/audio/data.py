"""Recordings: sounds of one rate with labels, by split.

A data set is a class with a Config, `rate` (Hz), `attributes` (name of each kind of label -> its values), `load(split)`
and `provenance()`. Splits are train, valid and test. A sound is (T,) int16, so that 8-bit mu-law of it is exact.
"""

import hashlib
import io
import os
import re
import urllib.request
import wave
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from tasks.audio.waves import at_loudness
from zoo.files import ChecksumError, DataMissing, cache_folder

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Recordings:
    """sounds, each (T,) int16; labels (N, A) int64, a column for each attribute; names of the recordings."""

    sounds: list[np.ndarray]
    labels: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.sounds)

    def part(self, keep: Iterable[int]) -> "Recordings":
        places = list(keep)
        return Recordings([self.sounds[i] for i in places], self.labels[places], [self.names[i] for i in places])


class AudioData(Protocol):
    Config: ClassVar[type]
    rate: int

    @property
    def attributes(self) -> dict[str, tuple[str, ...]]: ...

    def load(self, split: str) -> Recordings: ...

    def provenance(self) -> dict[str, Any]: ...


def check_split(split: str, data: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split {split!r} of {data} does not exist; accepted: {', '.join(SPLITS)}")


def digest(recordings: Recordings) -> str:
    """Sixteen hex digits that name the samples and labels themselves, in their order."""
    made = hashlib.sha256(recordings.labels.astype(np.int64).tobytes())
    for sound in recordings.sounds:
        made.update(len(sound).to_bytes(8, "little") + sound.astype("<i2").tobytes())
    return made.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------


class SpokenDigits:
    """The Free Spoken Digit Dataset (CC BY-SA 4.0): 6 speakers x 10 digits x 50, 8 kHz, 16 bits, mono, 21.9 minutes.

    The official split: of each speaker and digit, recordings 0 to 4 test and 5 to 49 train. Read from
    `free-spoken-digit-dataset/recordings/{digit}_{speaker}_{index}.wav`, and all files together checked by one digest.
    """

    @dataclass
    class Config:
        """root      the folder that holds free-spoken-digit-dataset; default: $ZOO_DATA, then the cache
        held_out  training recordings of each speaker and digit kept for validation; 0: none, and validation reads the
                  test split, so that nothing may be chosen by it
        limit     take only so many recordings of each split, spread evenly over it; 0: all
        loudness  root mean square, of 1, that each recording is brought to; 0: as recorded, where the loudest speaker
                  is nine times as loud as the quietest
        """

        root: str = ""
        held_out: int = 0
        limit: int = 0
        loudness: float = 0.0

        def __post_init__(self):
            if not 0 <= self.loudness <= 0.1:
                raise ValueError(f"dataset.loudness = {self.loudness}; it takes 0 (as recorded) to 0.1 of full scale")
            if not 0 <= self.held_out < 45:
                raise ValueError(f"dataset.held_out = {self.held_out}; it takes 0 to 44 of 45 training recordings")
            if self.limit < 0:
                raise ValueError(f"dataset.limit = {self.limit}; it takes 0 (all) or more recordings")

    NAME = "audio/spoken_digits"
    FOLDER = "free-spoken-digit-dataset/recordings"
    ARCHIVE = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.zip"
    SHA256 = "6b1a8e30f4df78a933fe25cf1ca0140c8c6f169c0a83649a15b70a5ae7407014"  # of all names and bytes: `read_files`
    TESTED = 5
    rate = 8000
    attributes: ClassVar[dict[str, tuple[str, ...]]] = {
        "digit": tuple("0123456789"),
        "speaker": ("george", "jackson", "lucas", "nicolas", "theo", "yweweler"),
    }

    def __init__(self, config: Config):
        self.config = config
        self._all: Recordings | None = None

    def load(self, split: str) -> Recordings:
        check_split(split, self.NAME)
        whole = self._whole()
        index = np.array([int(name.rsplit("_", 1)[1]) for name in whole.names])
        last_trained = 50 - self.config.held_out
        if split == "test" or (split == "valid" and not self.config.held_out):
            chosen = index < self.TESTED
        elif split == "valid":
            chosen = index >= last_trained
        else:
            chosen = (index >= self.TESTED) & (index < last_trained)
        places = np.flatnonzero(chosen)
        if 0 < self.config.limit < len(places):
            places = places[np.linspace(0, len(places) - 1, self.config.limit).round().astype(int)]
        return whole.part(places)

    def provenance(self) -> dict[str, Any]:
        self._whole()
        config = self.config
        taken = {"held_out": config.held_out, "limit": config.limit, "loudness": config.loudness}
        return {"data": self.NAME, "sha256": self.SHA256, **taken}

    def _whole(self) -> Recordings:
        if self._all is None:
            files = read_files(self._folder(), self.SHA256)
            digits, speakers = self.attributes["digit"], self.attributes["speaker"]
            names = [name.removesuffix(".wav") for name in files]
            parts = [name.split("_") for name in names]
            labels = np.array([[digits.index(digit), speakers.index(speaker)] for digit, speaker, _ in parts])
            sounds = [read_pcm(data, name) for name, data in files.items()]
            if self.config.loudness:
                sounds = [at_loudness(sound, self.config.loudness) for sound in sounds]
            self._all = Recordings(sounds, labels, names)
        return self._all

    def _folder(self) -> Path:
        shared = os.environ.get("ZOO_DATA")
        named = self.config.root
        roots = [Path(named).expanduser()] if named else [*([Path(shared)] if shared else []), cache_folder()]
        for root in roots:
            if (root / self.FOLDER).is_dir():
                return root / self.FOLDER
        try:
            return unpack_recordings(self.ARCHIVE, roots[-1] / self.FOLDER)
        except (OSError, HTTPException, zipfile.BadZipFile) as error:
            looked = "\n".join(f"  {root / self.FOLDER}" for root in roots)
            raise DataMissing(
                f"{self.NAME} is not here. Looked in:\n{looked}\nThe download from {self.ARCHIVE} failed: {error}\n"
                f"To place it by hand: unpack it so that {roots[-1] / self.FOLDER} holds 3,000 .wav files, or set "
                "ZOO_DATA or task.dataset.root to the folder that holds free-spoken-digit-dataset."
            ) from error


def read_files(folder: Path, sha256: str) -> dict[str, bytes]:
    """Every .wav of the folder by name, sorted, if names and bytes together have this digest. Raises ChecksumError."""
    made, files = hashlib.sha256(), {}
    for path in sorted(folder.glob("*.wav"), key=lambda path: path.name):
        files[path.name] = path.read_bytes()
        made.update(path.name.encode() + b"\0" + files[path.name])
    if made.hexdigest() != sha256:
        raise ChecksumError(
            f"the {len(files)} .wav files of {folder} have together sha256 {made.hexdigest()}, not {sha256}: some are "
            "damaged, missing or of another version. Remove the folder to have it downloaded again"
        )
    return files


def read_pcm(data: bytes, name: str) -> np.ndarray:
    """(T,) int16 of a mono 16-bit wav file, by the standard library alone."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            if (file.getnchannels(), file.getsampwidth()) != (1, 2):
                raise ValueError(
                    f"{name} has {file.getnchannels()} channels of {file.getsampwidth()} bytes, not 1 of 2"
                )
            return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.int16)
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{name} is damaged: {error}") from error


def unpack_recordings(url: str, folder: Path) -> Path:
    """The recordings of the data set's archive into `folder`, which appears only when all are there."""
    request = urllib.request.Request(url, headers={"User-Agent": "gatedfwa-zoo"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        archive = zipfile.ZipFile(io.BytesIO(answer.read()))
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    beside.mkdir(parents=True)
    for member in archive.namelist():
        if re.fullmatch(r"[^/]+/recordings/\w+\.wav", member):
            (beside / Path(member).name).write_bytes(archive.read(member))
    os.rename(beside, folder)
    return folder
