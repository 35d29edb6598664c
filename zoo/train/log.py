"""What a run says while it trains: terminal, log.txt, metrics.jsonl, TensorBoard, samples; nothing twice."""

import contextlib
import json
import math
import os
import sys
import time
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from zoo import weights
from zoo.task import Media

HEADLINE = 6  # numbers of an evaluation that its line shows


@dataclass
class Meters:
    """Sums and counts since the last line; stored in checkpoints, so that a resumed run prints the same line."""

    sums: dict[str, list[float]] = field(default_factory=dict)  # name -> [sum, count]

    def add(self, name: str, total: float, count: float) -> None:
        entry = self.sums.setdefault(name, [0.0, 0.0])
        entry[0] += total
        entry[1] += count

    def take(self) -> dict[str, float]:
        """The means, and start again."""
        means = {name: total / count for name, (total, count) in self.sums.items() if count}
        self.sums = {}
        return means


class RunLog:
    """Opens the run's logs so that they continue after `step`: rows of later steps are dropped from metrics.jsonl and
    hidden in TensorBoard (purge_step)."""

    def __init__(self, run: Path, *, step: int, steps: int, peak: float | None = None):
        """peak: FLOP/s of all devices together, for the model FLOPs utilisation (MFU)."""
        self.run, self.steps, self.peak = run, steps, peak
        run.mkdir(parents=True, exist_ok=True)
        drop_rows_after(run / "metrics.jsonl", step)
        self._text = (run / "log.txt").open("a", encoding="utf-8")
        self._rows = (run / "metrics.jsonl").open("a", encoding="utf-8")
        # From the first session on: TensorBoard takes only the second and later marks for restarts
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True) if on_terminal() else None
        self._clock, self._carry = time.monotonic(), 0.0
        # Since the last row: seconds of training, the elements, steps and model FLOPs that they went into
        self._spent, self._elements, self._done, self._flops = 0.0, 0.0, 0, 0.0

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        self._board.close()
        self._rows.close()
        self._text.close()

    def say(self, line: str) -> None:
        """A line for the person and log.txt."""
        self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        self._text.flush()
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    def bar(self, what: str, total: int | None) -> Any:
        """A context: a bar for what goes on between two steps, on a terminal, until it ends. `update()` moves it."""
        return tqdm(desc=what, total=total, unit="batch", leave=False, dynamic_ncols=True, disable=self._bar is None)

    def pause(self) -> None:
        """Time from here until `go_on` (evaluation, saving) is not training time."""
        self._carry += time.monotonic() - self._clock

    def go_on(self) -> None:
        self._clock = time.monotonic()

    def advance(self, step: int) -> float:
        """A step is done; returns the seconds of training since the one before."""
        now = time.monotonic()
        seconds = now - self._clock + self._carry
        self._clock, self._carry = now, 0.0
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        return seconds

    def count(self, elements: float, seconds: float, flops: float = 0.0) -> None:
        """The scored elements (tokens) that a step trained on, how long it took, and the FLOPs that it needed."""
        self._elements += elements
        self._flops += flops
        self._spent += seconds
        self._done += 1

    def train_row(self, step: int, means: Mapping[str, float]) -> None:
        """The means since the last row."""
        rate = self._elements / max(self._spent, 1e-9)
        left = (self.steps - step) * self._spent / max(self._done, 1)
        timing = {"tokens_per_second": rate}
        if self.peak and self._flops:
            timing["mfu"] = self._flops / max(self._spent, 1e-9) / self.peak
        self._spent, self._elements, self._done, self._flops = 0.0, 0.0, 0, 0.0
        self._row(step, means, timing)
        loss = means.get("train/loss", float("nan"))
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {_short(rate)} tokens/s")
            self._text.write(f"step {step}/{self.steps} loss {loss:.4f}\n")
        else:
            self.say(f"step {step}/{self.steps}  loss {loss:.4f}  {_short(rate)} tokens/s  {_duration(left)} left")

    def evaluation_row(self, step: int, values: Mapping[str, float], first: Sequence[str] = ()) -> None:
        """All values go into metrics.jsonl and TensorBoard; HEADLINE of them onto the line, those of `first` before."""
        self._row(step, values, {})
        shown = list(dict.fromkeys(name for name in (*first, *values) if name in values))[:HEADLINE]
        more = [f"(+{len(values) - len(shown)} more in metrics.jsonl)"] if len(values) > len(shown) else []
        self.say("  ".join([f"step {step}/{self.steps}", *(f"{name} {figure(values[name])}" for name in shown), *more]))

    def _row(self, step: int, values: Mapping[str, float], timing: Mapping[str, float]) -> None:
        row = {name: number(value) for name, value in {**values, **timing}.items()}
        self._rows.write(json.dumps({"step": step, **row}) + "\n")
        self._rows.flush()
        for name, value in {**values, **{f"time/{name}": value for name, value in timing.items()}}.items():
            self._board.add_scalar(name, value, step)

    def media(self, step: int, media: Media) -> None:
        """Into TensorBoard, and as plain files into run/samples/."""
        for name, text in media.text.items():
            # TensorBoard reads Markdown: four spaces keep a sample as it is
            self._board.add_text(name, "\n".join("    " + line for line in text.splitlines()), step)
        for name, image in media.images.items():
            self._board.add_image(name, image, step)
        for name, (samples, rate) in media.audio.items():
            self._board.add_audio(name, samples[None], step, sample_rate=rate)
        write_media(media, self.run / "samples", f"step-{step:08d}-")

    def flush(self) -> None:
        self._board.flush()


class Silence(RunLog):
    """The log of every rank but the first: keeps the time, writes nothing."""

    def __init__(self, run: Path, *, step: int, steps: int, peak: float | None = None):
        self.run, self.steps, self.peak, self._bar = run, steps, None, None
        self._clock, self._carry = time.monotonic(), 0.0
        self._spent, self._elements, self._done, self._flops = 0.0, 0.0, 0, 0.0

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def _row(self, step: int, values: Mapping[str, float], timing: Mapping[str, float]) -> None:
        pass

    def media(self, step: int, media: Media) -> None:
        pass

    def flush(self) -> None:
        pass


def on_terminal() -> bool:
    """Whether there is a terminal to draw a bar on. One that says it has no columns shows none: lines, then."""
    with contextlib.suppress(OSError):  # where it can't be asked, it is as wide as any
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    return True


def write_media(media: Media, folder: Path, prefix: str = "") -> list[Path]:
    """Texts as .txt, images as .png, sounds as .wav; returns what was written. Nothing to write, no folder."""
    if not (media.text or media.images or media.audio):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in media.text.items():
        written.append(folder / f"{prefix}{_plain(name)}.txt")
        written[-1].write_text(text, encoding="utf-8")
    for name, image in media.images.items():
        written.append(folder / f"{prefix}{_plain(name)}.png")
        pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(written[-1])
    for name, (samples, rate) in media.audio.items():
        written.append(folder / f"{prefix}{_plain(name)}.wav")
        _write_wav(written[-1], samples, rate)
    return written


def drop_rows_after(path: Path, step: int) -> None:
    """Keep whole rows up to `step`; a killed process may have left half a line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        if row.get("step", 0) <= step:
            kept.append(line + "\n")
    weights.replace_file(path, "".join(kept).encode())


def number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def figure(value: float) -> str:
    """A metric for people: four decimals; a whole number above 1 without any, a large one with four digits."""
    if 1 < abs(value) < 1e15 and value == round(value):
        return f"{value:.0f}"
    return f"{value:.4g}" if abs(value) >= 1e5 else f"{value:.4f}"


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)


def _write_wav(path: Path, samples: Tensor, rate: int) -> None:
    pcm = (samples.detach().float().clamp(-1, 1) * 32767).round().to(torch.int16).cpu()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(pcm.numpy().tobytes())


def _short(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
