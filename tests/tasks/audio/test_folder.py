"""A user's own recordings: every width, rate and channel count that wav files have, and files that are none."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest

from tasks.audio.folder import BadRecording, read_sound, resampled
from tasks.audio.waves import to_float, write_wav
from zoo import registry
from zoo.config import ConfigError, build


def tone(rate=8000, seconds=0.5, pitch=440.0):
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(rate * seconds)) / rate)


def folder(path, **fields):
    entry = registry.datasets.get("audio/folder")
    return entry(build(entry.Config, {"path": str(path), **fields}))


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_width_and_channel_count(tmp_path, subtype, channels, soundfile):
    path = tmp_path / "a.wav"
    weights = np.linspace(0.5, 1.5, channels) if channels > 1 else np.ones(1)  # the channels' mean is the tone
    soundfile.write(path, tone()[:, None] * weights, 8000, subtype=subtype)
    sound = read_sound(path, 8000)
    assert sound.dtype == np.int16
    assert np.abs(to_float(sound) - tone()).max() < (0.01 if subtype == "PCM_U8" else 1e-4)


@pytest.mark.parametrize("rate", [4000, 11025, 44100, 48000])
@pytest.mark.parametrize("ending", [".wav", ".flac"])
def test_any_rate(tmp_path, rate, ending, soundfile):
    soundfile.write(tmp_path / f"a{ending}", tone(rate), rate)
    sound = to_float(read_sound(tmp_path / f"a{ending}", 8000))
    assert abs(len(sound) - 4000) <= 1
    inner = slice(200, 3800)  # the filter rings at the ends
    assert np.abs(sound[inner] - tone()[: len(sound)][inner]).max() < 0.01
    assert len(read_sound(tmp_path / f"a{ending}", 8000, most=0.25)) == pytest.approx(2000, abs=1)


def test_what_cannot_be_read_is_named(tmp_path, soundfile):
    write_wav(tmp_path / "whole.wav", np.ones(4000, np.int16), 8000)
    data = (tmp_path / "whole.wav").read_bytes()
    cases = {
        "text.wav": (b"This is no recording.\n" * 20, "is no recording that can be read"),
        "empty.wav": (b"", "is no recording that can be read"),
        "cut.wav": (data[:3044], "is truncated: 5000 bytes are missing"),
        "header.wav": (data[:20], "is no recording that can be read"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadRecording, match=message):
            read_sound(tmp_path / name, 8000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.1, np.nan, 0.2] * 500), 8000, subtype="FLOAT")
    with pytest.raises(BadRecording, match="not finite"):
        read_sound(tmp_path / "nan.wav", 8000)
    with pytest.raises(BadRecording, match=r"nothing\.wav"):
        read_sound(tmp_path / "nothing.wav", 8000)
    write_wav(tmp_path / "slow.wav", np.ones(400, np.int16), 3)
    with pytest.raises(BadRecording, match="rate of 3 Hz"):
        read_sound(tmp_path / "slow.wav", 8000)


FORMS = {".wav": ("PCM_U8", "PCM_24", "FLOAT", "ALAW", "IMA_ADPCM"), ".aiff": ("PCM_16",), ".flac": ("PCM_16",)}


@pytest.mark.parametrize(("ending", "subtype"), [(end, subtype) for end, kinds in FORMS.items() for subtype in kinds])
def test_truncated_files_are_refused_whatever_their_form(tmp_path, ending, subtype, soundfile):
    whole, cut = tmp_path / f"whole{ending}", tmp_path / f"cut{ending}"
    soundfile.write(whole, tone(), 8000, subtype=subtype)
    assert len(read_sound(whole, 8000)) == pytest.approx(4000, abs=50)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    with pytest.raises(BadRecording, match="truncated|cannot|can be read"):
        read_sound(cut, 8000)


def test_what_stands_before_the_sound_and_unknown_lengths(tmp_path, soundfile):
    """A long list of words before the samples; a header that a pipe could not go back to."""
    write_wav(tmp_path / "a.wav", np.arange(4000, dtype=np.int16), 8000)
    data = (tmp_path / "a.wav").read_bytes()
    listed = data[:36] + b"LIST" + (6001).to_bytes(4, "little") + bytes(6002) + data[36:]
    piped = data[:40] + b"\xff" * 4 + data[44:]
    for content, missing in ((listed, 0), (listed[:-500], 500), (piped, 0)):
        (tmp_path / "b.wav").write_bytes(content)
        if missing:
            with pytest.raises(BadRecording, match=f"{missing} bytes are missing"):
                read_sound(tmp_path / "b.wav", 8000)
        else:
            assert read_sound(tmp_path / "b.wav", 8000).tolist() == list(range(4000))


def test_odd_rates_take_no_odd_memory(tmp_path):
    """44,101 and 8,000 have no common divisor: a filter for each of 8,000 phases would take a gigabyte."""
    from torchaudio.functional import resample

    with pytest.MonkeyPatch.context() as patch:
        asked = []
        patch.setattr(
            "torchaudio.functional.resample", lambda x, old, new: asked.append((old, new)) or resample(x, old, new)
        )
        made = resampled(tone(44101).astype(np.float32), 44101, 8000)
        for found, wanted in ((44100, 8000), (11025, 16000), (22050, 48000), (8000, 44100), (44100, 192000)):
            resampled(tone(found).astype(np.float32), found, wanted)
    assert max(max(pair) for pair in asked) <= 1000
    assert all(
        old * wanted == new * found
        for (old, new), found, wanted in [(asked[1], 44100, 8000), (asked[5], 44100, 192000)]
    )
    assert np.abs(made[200:3800] - tone()[200:3800]).max() < 0.01


def test_nothing_imports_soundfile_before_it_is_needed(repository):
    """The rest of the zoo works where it, or the library that it wraps, is missing."""
    blocked = "import sys; sys.modules['soundfile'] = None; import pkgutil, importlib, zoo, tasks\n"
    walk = "for m in pkgutil.walk_packages(tasks.__path__, 'tasks.'): importlib.import_module(m.name)\n"
    read = "from tasks.audio.folder import read_sound; from pathlib import Path; read_sound(Path('a.wav'), 8000)"
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    ran = subprocess.run([sys.executable, "-c", blocked + walk + read], env=environment, capture_output=True, text=True)
    assert ran.stderr.strip().splitlines()[-1].startswith("ValueError: reading a.wav needs the package soundfile")


@pytest.fixture
def words(tmp_path, soundfile):
    """Two classes in split folders, and bad files among the good ones."""
    for split, count in (("train", 4), ("valid", 1), ("test", 2)):
        for name, pitch in (("no", 300), ("yes", 700)):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                soundfile.write(tmp_path / split / name / f"{number}.wav", tone(pitch=pitch), 8000)
    (tmp_path / "train/no/text.wav").write_text("hello")
    soundfile.write(tmp_path / "train/yes/silent.flac", np.zeros(4000), 8000)
    soundfile.write(tmp_path / "train/yes/offset.wav", np.full(4000, 0.3), 8000)
    soundfile.write(tmp_path / "train/yes/short.wav", tone(seconds=0.01), 8000)
    (tmp_path / "train/yes/notes.txt").write_text("of no interest")
    return tmp_path


def test_bad_files_are_skipped_counted_and_listed(words, caplog):
    data = folder(words)
    with caplog.at_level(logging.WARNING):
        train = data.load("train")
    assert len(train) == 8
    assert train.labels[:, 0].tolist() == [0] * 4 + [1] * 4
    assert data.attributes == {"class": ("no", "yes")}
    assert len(data.load("test")) == 4
    reasons = {line.split(": ")[0].rsplit("/", 1)[1]: line for line in data.bad}
    assert "is no recording" in reasons["text.wav"]
    assert "is silent" in reasons["silent.flac"]
    assert "is silent" in reasons["offset.wav"]
    assert "lasts 0.010 s" in reasons["short.wav"]
    assert "4 of 18 recordings were skipped" in caplog.text
    assert data.provenance()["skipped"] == 4
    assert data.provenance()["recordings"] == {"train": 8, "valid": 2, "test": 4}
    with pytest.raises(ValueError, match=r"more than max_bad = 3 recordings(.|\n)*silent"):
        folder(words, max_bad=3).load("train")
    assert len(folder(words, silent=True, least=0.0).load("train")) == 11


def test_recordings_without_split_folders(tmp_path, soundfile):
    (tmp_path / "a").mkdir()
    for number in range(60):
        soundfile.write(tmp_path / "a" / f"{number}.wav", tone(seconds=0.06), 8000)
    data = folder(tmp_path, share=0.2)
    sizes = [len(data.load(split)) for split in ("train", "valid", "test")]
    assert sum(sizes) == 60
    assert min(sizes) > 3


def test_folders_that_do_not_fit(tmp_path, soundfile):
    with pytest.raises(ValueError, match=r"needs task\.dataset\.path"):
        folder("")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        folder(tmp_path / "nowhere").load("train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="class folder .*empty holds no recording"):
        folder(tmp_path).load("train")
    (tmp_path / "empty/x.wav").write_text("no")
    with pytest.raises(ValueError, match="no recording that can be used"):
        folder(tmp_path).load("train")
    for field, message in (({"rate": 10}, "rate = 10"), ({"share": 0.6}, "share = 0.6"), ({"most": -1.0}, "take 0 or")):
        with pytest.raises(ConfigError, match=message):
            folder(tmp_path, **field)
