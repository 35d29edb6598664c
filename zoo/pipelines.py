"""A model with the task that belongs to it: prompt in, artefact out.

text = zoo.pipeline("runs/text-demo").sample("def ", max_new=200)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo import registry
from zoo.generation import Sampling, generate
from zoo.model import Batch, Model
from zoo.task import Task
from zoo.train import load_published, load_run

LOOK_EVERY = 8  # steps between two looks for stop strings: a look waits for the device


@dataclass
class Pipeline:
    model: Model
    task: Task

    def __post_init__(self):
        self.task.attach(self.model)

    def sample(
        self,
        prompt: Any,
        *,
        max_new: int | None = None,
        sampling: Sampling = Sampling(),
        seed: int | None = None,
        stop: Sequence[str] = (),
        progress: Callable[[Iterator[Any], int], Iterable[Any]] | None = None,
    ) -> Any:
        """Continue a prompt, or each prompt of a list; returns the task's artefact (what was added to a text, a whole
        image), or a list of them.

        max_new   at most so many elements; None: as many as the task says (256 tokens of text, the rest of an image)
        stop      for text: end before the first of these strings to be complete
        progress  wraps the steps, given them and their number: tqdm, for example
        """
        given = self.task.prompt(prompt)
        count = self.task.length(given) if max_new is None else max_new
        steps = self._steps(given, count, sampling, seed)
        if progress is not None:
            steps = iter(progress(steps, count))
        artefacts = self._up_to_stop(steps, stop) if stop else self.task.artefacts(given, joined(steps))
        return artefacts if isinstance(prompt, (list, tuple)) else artefacts[0]

    def stream(
        self,
        prompt: Any,
        *,
        max_new: int | None = None,
        sampling: Sampling = Sampling(),
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[Any]:
        """The same for one prompt, piece by piece as it is drawn: text, or sound (n,) int16."""
        given = self.task.prompt(prompt)
        count = self.task.length(given) if max_new is None else max_new
        steps = self._steps(given, count, sampling, seed)
        if (pieces := self.task.pieces(given, steps)) is not None:
            yield from (rows[0] for rows in pieces)
            return
        transcript = Transcript(self._text, stop)
        for step in steps:
            if piece := transcript.add(step[0].cpu()):
                yield piece
            if transcript.stopped:
                return
        if piece := transcript.finish():
            yield piece

    def _steps(self, given: Batch, max_new: int, sampling: Sampling, seed: int | None) -> Iterator[Tensor]:
        return generate(self.model, given, max_new=max_new, sampling=sampling, stream=True, seed=seed)

    def _up_to_stop(self, steps: Iterator[Tensor], stop: Sequence[str]) -> list[str]:
        rows: list[Transcript] = []
        texts: list[str] = []
        while block := list(islice(steps, LOOK_EVERY)):
            fresh = joined(block)
            rows = rows or [Transcript(self._text, stop) for _ in fresh]
            texts = texts or [""] * len(rows)
            texts = [text + row.add(tokens) for text, row, tokens in zip(texts, rows, fresh, strict=True)]
            if all(row.stopped for row in rows):
                break
        return [text + row.finish() for text, row in zip(texts, rows, strict=True)]

    def _text(self, row: Tensor) -> str:
        text = self.task.artefact(row)
        if not isinstance(text, str):
            raise TypeError(
                f"streams and stop strings are for text; {type(self.task).__name__} makes {type(text).__name__}"
            )
        return text


def joined(steps: Iterable[Tensor]) -> Tensor:
    """(B, N, …) on the CPU."""
    return torch.cat(list(steps), dim=1).cpu()


# ---------------------------------------------------------------------------------------------------------------------
# Text that grows

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what the beginning of a character is decoded to
LONG = 32  # undecoded tokens from which on it is worth a try to settle some of them


class Transcript:
    """The text of one row of tokens as it grows, up to the first stop string. Only the newest tokens are decoded, with
    those of the piece before them in front: a decoder may treat the beginning of a text differently.

    A character made of several tokens comes whole, and what might be the beginning of a stop string is held back until
    it is known not to be. The pieces are together `decode` of all tokens, cut where a stop string is first complete.
    """

    def __init__(self, decode: Callable[[Tensor], str], stop: Sequence[str] = ()):
        self.decode, self.stop = decode, [s for s in stop if s]
        self.stopped = False
        self._context = self._pending = torch.empty(0, dtype=torch.int64)  # tokens, decoded and not yet
        self._behind = 0  # characters that the context alone is decoded to
        self._held = ""

    def add(self, tokens: Tensor) -> str:
        """tokens (N,), the next ones; returns the text that is settled by them, which may be none."""
        if self.stopped:
            return ""
        self._pending = torch.cat((self._pending, tokens)) if len(self._pending) else tokens
        return self._show(self._settled(), final=False)

    def finish(self) -> str:
        """What is left when no more tokens come."""
        return "" if self.stopped else self._show(self._decode_on(self._pending), final=True)

    def _settled(self) -> str:
        """Of the pending tokens, the text that no further token can change."""
        whole, count = self._decode_on(self._pending), len(self._pending)
        if whole.endswith(BROKEN):
            # The last bytes may begin a character, of which at most three can be missing its end. Where bytes are no
            # characters at all this goes on and on, so all but the last tokens are taken if they can be told apart.
            count -= 4
            settled = self._decode_on(self._pending[:count]) if count > LONG else None
            if settled is None or settled + self.decode(self._pending[count:]) != whole:
                return ""
            whole = settled
        self._context, self._pending = self._pending[:count], self._pending[count:]
        self._behind = len(self.decode(self._context))
        return whole

    def _decode_on(self, tokens: Tensor) -> str:
        if not len(self._context):
            return self.decode(tokens) if len(tokens) else ""
        return self.decode(torch.cat((self._context, tokens)))[self._behind :]

    def _show(self, text: str, *, final: bool) -> str:
        text = self._held + text
        kept = cut(text, self.stop)
        self.stopped = kept is not None
        if kept is not None:
            return kept
        ready = len(text) - (0 if final else begun(text, self.stop))
        self._held = text[ready:]
        return text[:ready]


def cut(text: str, stop: Sequence[str]) -> str | None:
    """`text` up to the stop string that is complete first; None if it holds none."""
    found = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    return text[: min(found)[1]] if found else None


def begun(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end may begin a stop string."""
    return max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


def pipeline(name: str | Path, *, device: str | None = None, ema: bool = True) -> Pipeline:
    """A pipeline from a run folder, or from published weights, <model>.<tag>.

    device  default: the GPU where there is one
    ema     of a run: take the averaged weights where it kept them
    Raises FileNotFoundError when `name` is neither.
    """
    if not Path(name).exists() and str(name).partition(".")[0] in registry.models:
        _, task, model = load_published(str(name), device=device)
    else:
        _, task, model = load_run(Path(name), ema=ema, device=device)
    if not isinstance(model, Model):
        raise TypeError(f"{name} holds a {type(model).__name__}; only models with a head can be sampled from")
    return Pipeline(model, task)
