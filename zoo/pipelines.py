"""A model with the task that belongs to it: prompt in, artefact out.

text = zoo.pipeline("runs/text-demo").sample("def ", max_new=200)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoo.generation import Sampling, generate
from zoo.model import Model
from zoo.task import Task
from zoo.train import load_run


@dataclass
class Pipeline:
    model: Model
    task: Task

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
        stop      for text, cut before the first of these strings
        progress  wraps the steps, given them and their number: tqdm, for example
        """
        several = isinstance(prompt, (list, tuple))
        given = self.task.prompt(prompt)
        max_new = self.task.length(given) if max_new is None else max_new
        steps = generate(self.model, given, max_new=max_new, sampling=sampling, stream=True, seed=seed)
        drawn: list[torch.Tensor] = []
        artefacts: list[Any] = []
        for step in progress(steps, max_new) if progress else steps:
            drawn.append(step)
            look = stop and len(drawn) % 8 == 0  # decoding waits for the device, so it is not done at every step
            if look or len(drawn) == max_new:
                artefacts = self.task.artefacts(given, torch.cat(drawn, dim=1).cpu())
                if stop and all(cut(text, stop) is not None for text in artefacts):
                    break
        if stop:
            artefacts = [text if (kept := cut(text, stop)) is None else kept for text in artefacts]
        return artefacts if several else artefacts[0]

    def stream(
        self,
        prompt: str,
        *,
        max_new: int | None = None,
        sampling: Sampling = Sampling(),
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """The same for one text prompt, piece by piece as it is drawn. A character made of several tokens comes whole,
        and what might be the beginning of a stop string is held back until it is known not to be."""
        given = self.task.prompt(prompt)
        max_new = self.task.length(given) if max_new is None else max_new
        steps = generate(self.model, given, max_new=max_new, sampling=sampling, stream=True, seed=seed)
        drawn: list[torch.Tensor] = []
        shown = ""
        for step in steps:
            drawn.append(step[0].cpu())
            text = self.task.artefact(torch.cat(drawn))
            if not isinstance(text, str):
                raise TypeError(f"stream() is for text; {type(self.task).__name__} makes {type(text).__name__}")
            kept = cut(text, stop)
            if kept is not None:
                yield kept[len(shown) :]
                return
            ready = text[: len(text) - held_back(text, stop)]
            if len(ready) > len(shown):
                yield ready[len(shown) :]
                shown = ready
        if drawn:
            yield text[len(shown) :]


def cut(text: str, stop: Sequence[str]) -> str | None:
    """`text` up to the first stop string that it holds; None if it holds none."""
    places = [place for place in (text.find(s) for s in stop if s) if place >= 0]
    return text[: min(places)] if places else None


def held_back(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end may still change or begin a stop string."""
    settled = text.rstrip("\N{REPLACEMENT CHARACTER}")  # behind it stands the beginning of a character
    begun = max((n for s in stop for n in range(1, len(s)) if settled.endswith(s[:n])), default=0)
    return len(text) - len(settled) + begun


def pipeline(name: str | Path, *, device: str | None = None, ema: bool = True) -> Pipeline:
    """A pipeline from a run folder.

    device  default: the GPU where there is one
    ema     take the averaged weights where the run kept them
    Raises FileNotFoundError when `name` is no run folder.
    """
    _, task, model = load_run(Path(name), ema=ema, device=device)
    if not isinstance(model, Model):
        raise TypeError(f"{name} holds a {type(model).__name__}; only models with a head can be sampled from")
    return Pipeline(model, task)
