"""Piano rolls for eyes, ears and other programs: a picture, a plain synthesis, a MIDI file."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tasks.audio.scores import KEYS, LOWEST
from tasks.audio.waves import to_pcm

PARTIALS = ((1, 1.0), (2, 0.45), (3, 0.2), (4, 0.1))  # of a tone: multiple of its frequency, loudness


def held_notes(roll: np.ndarray) -> list[tuple[int, int, int]]:
    """(T, 88) bool -> (key, first frame, frame after the last), sorted by time: a key that goes on sounding is held."""
    edge = np.zeros((1, KEYS), dtype=np.int8)
    changes = np.diff(np.concatenate((edge, roll.astype(np.int8), edge)), axis=0)
    keys, begins = np.nonzero(changes.T == 1)
    _, ends = np.nonzero(changes.T == -1)
    found = list(zip(keys.tolist(), begins.tolist(), ends.tolist(), strict=True))
    return sorted(found, key=lambda note: (note[1], note[0]))


def write_midi(path: Path, roll: np.ndarray, frame_seconds: float) -> None:
    """One track of piano, a quarter note a frame."""
    import mido

    file = mido.MidiFile(ticks_per_beat=480)
    track = mido.MidiTrack()
    file.tracks.append(track)
    track.append(mido.MetaMessage("set_tempo", tempo=round(frame_seconds * 1e6)))
    events = []
    for key, begin, end in held_notes(roll):
        events += [(begin, 1, key), (end, 0, key)]
    now = 0
    for frame, on, key in sorted(events):
        kind = "note_on" if on else "note_off"
        track.append(mido.Message(kind, note=LOWEST + key, velocity=72, time=480 * (frame - now)))
        now = frame
    track.append(mido.MetaMessage("end_of_track", time=480 * (len(roll) - now)))
    file.save(str(path))


def render(roll: np.ndarray, frame_seconds: float, rate: int) -> np.ndarray:
    """(T,) int16: a few partials for every note, dying away."""
    frame = round(frame_seconds * rate)
    sound = np.zeros(len(roll) * frame + rate // 4)
    for key, begin, end in held_notes(roll):
        length = (end - begin) * frame + rate // 4  # it rings on a little
        time = np.arange(length) / rate
        pitch = 440.0 * 2 ** ((LOWEST + key - 69) / 12)
        tone = np.zeros(length)
        for multiple, loudness in PARTIALS:
            if multiple * pitch < rate / 2:
                tone += loudness * np.sin(2 * np.pi * multiple * pitch * time)
        attack = np.minimum(1, time / 0.01)
        release = np.minimum(1, (length - np.arange(length)) / (rate / 4))
        sound[begin * frame : begin * frame + length] += tone * attack * release * np.exp(-1.5 * time)
    loudest = np.abs(sound).max() if len(sound) else 0
    return to_pcm(0.9 * sound / loudest if loudest else sound)


def roll_picture(roll: np.ndarray, zoom: int = 4) -> Tensor:
    """(3, 88 zoom / 2, T zoom) float in [0, 1]: time to the right, high notes above, octaves marked."""
    ground = np.where(np.arange(KEYS) % 12 == 3, 0.82, 0.95)  # key 3 is a C
    shade = np.where(roll.T, 0.1, ground[:, None]) if len(roll) else np.ones((KEYS, 1))
    large = shade[::-1].repeat(zoom // 2, axis=0).repeat(zoom, axis=1)
    return torch.from_numpy(large.copy()).float().expand(3, -1, -1)
