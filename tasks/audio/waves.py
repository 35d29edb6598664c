"""Sound as numbers: 16-bit samples, 8-bit mu-law levels, amplitudes in [-1, 1]; and wav files."""

import wave
from functools import cache
from pathlib import Path

import numpy as np
import torch

LEVELS = 256
FULL = 32768  # the 16-bit value that amplitude 1 stands for


@cache
def mu_law_table() -> np.ndarray:
    """(65536,) uint8: the level of each 16-bit value, by torchaudio; index 0 is -32768."""
    from torchaudio.functional import mu_law_encoding

    with torch.device("cpu"):  # whatever the device that a model is being made on
        return mu_law_encoding(torch.arange(-FULL, FULL, dtype=torch.float64) / FULL, LEVELS).numpy().astype(np.uint8)


@cache
def amplitudes() -> np.ndarray:
    """(256,) float32: what each mu-law level stands for, in [-1, 1]."""
    from torchaudio.functional import mu_law_decoding

    with torch.device("cpu"):
        return mu_law_decoding(torch.arange(LEVELS), LEVELS).numpy().astype(np.float32)


def to_levels(sound: np.ndarray) -> np.ndarray:
    """(…) int16 -> mu-law levels (…) uint8."""
    return mu_law_table()[sound.astype(np.int64) + FULL]


def from_levels(levels: np.ndarray) -> np.ndarray:
    """Mu-law levels (…) -> (…) int16."""
    return to_pcm(amplitudes()[levels])


def to_pcm(sound: np.ndarray) -> np.ndarray:
    """Amplitudes, clipped to [-1, 1] -> int16."""
    return np.clip(np.round(sound.astype(np.float64) * FULL), -FULL, FULL - 1).astype(np.int16)


def to_float(sound: np.ndarray) -> np.ndarray:
    """int16 -> float32 in [-1, 1)."""
    return sound.astype(np.float32) / FULL


def fit(sound: np.ndarray, length: int, before: int = 0) -> np.ndarray:
    """`before` zeros, then the sound, then zeros, or its end cut off: `length` samples."""
    made = np.zeros(length, dtype=sound.dtype)
    kept = sound[: max(0, length - before)]
    made[before : before + len(kept)] = kept
    return made


def at_loudness(sound: np.ndarray, size: float) -> np.ndarray:
    """(T,) int16 -> (T,) int16 of root mean square `size`, of full scale; peaks are clipped there, silence stays."""
    amplitudes = to_float(sound)
    return to_pcm(amplitudes * (size / max(float(np.sqrt(np.square(amplitudes).mean())), 1e-5)))


def write_wav(path: Path, sound: np.ndarray, rate: int) -> None:
    """(T,) int16 as a mono 16-bit wav file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(sound.astype("<i2").tobytes())
