"""Mel spectrograms by torchaudio: for losses, distances, a classifier, and the eye."""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

SCALES = ((128, 8), (256, 20), (512, 40), (1024, 80))  # (window in samples, mel bands) of the distance that is told
# Of the loss: windows of 4 and 8 ms, at 8 kHz, see where an onset of speech begins
LOSS_SCALES = ((32, 5), (64, 8), (128, 10), (256, 40), (512, 40), (1024, 80))
NARROWEST = 160  # pixels of a picture: the frames of short sounds are drawn wider, each by the same whole number
FLOOR = 3e-4  # magnitudes below it count as silence: about what is quietest in a quiet recording


@cache
def mel_transform(rate: int, window: int, bands: int, hop: int, device: str) -> Any:
    """Kept outside of modules: what it holds is arithmetic, no weights."""
    from torchaudio.transforms import MelSpectrogram

    made = MelSpectrogram(rate, n_fft=window, hop_length=hop, n_mels=bands, power=1.0, norm="slaney")
    return made.to(device)


def log_mel(sound: Tensor, rate: int, *, window: int = 512, bands: int = 40, hop: int = 128) -> Tensor:
    """(…, T) amplitudes -> (…, bands, T // hop + 1) float32, natural logarithm of mel magnitudes. What is shorter than
    the window is filled up with silence."""
    if sound.shape[-1] < window:
        sound = torch.nn.functional.pad(sound, (0, window - sound.shape[-1]))
    with torch.autocast(sound.device.type, enabled=False):
        spectrum = mel_transform(rate, window, bands, hop, str(sound.device))(sound.float())
        return spectrum.clamp(min=FLOOR).log()


def mel_distance(one: Tensor, other: Tensor, rate: int, scales: tuple[tuple[int, int], ...] = SCALES) -> Tensor:
    """(B, T) and (B, T) -> (B,): the mean absolute difference of log mels, over several scales."""
    parts = []
    for window, bands in scales:
        made, wanted = (log_mel(x, rate, window=window, bands=bands, hop=window // 4) for x in (one, other))
        parts.append((made - wanted).abs().mean(dim=(1, 2)))
    return torch.stack(parts).mean(dim=0)


def picture(sound: np.ndarray, rate: int, height: int = 80) -> Tensor:
    """(T,) int16 -> (3, height, frames) float in [0, 1]: a log-mel spectrogram, low tones below."""
    from matplotlib import colormaps

    amplitudes = torch.from_numpy(sound.astype(np.float32) / 32768)
    mel = log_mel(amplitudes, rate, window=512, bands=height, hop=64)
    shown = ((mel - mel.max()) / 9 + 1).clamp(min=0)  # nine e-folds, about 78 dB
    return torch.from_numpy(colormaps["magma"](shown.flip(0).numpy())[..., :3]).permute(2, 0, 1).float()


def below_each_other(pictures: list[Tensor], gap: int = 2) -> Tensor:
    """(3, H, W) each -> one picture, NARROWEST wide or wider; narrower ones are filled up with black."""
    width = max(picture.shape[2] for picture in pictures)
    rows = []
    for picture in pictures:
        row = picture.new_zeros(3, picture.shape[1] + gap, width)
        row[:, : picture.shape[1], : picture.shape[2]] = picture
        rows.append(row)
    return torch.cat(rows, dim=1).repeat_interleave(-(-NARROWEST // width), dim=2)
