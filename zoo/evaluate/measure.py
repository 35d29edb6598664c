"""What is measured of a trained run: scores, the curve of its training, the loss by position, scores at other lengths.

Each measurement is a function from a run to numbers; a number is a name, a value and `at`, where on an axis it stands.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo import config as configs
from zoo.data import SourceStream
from zoo.evaluate.score import progress_bar
from zoo.evaluate.suite import Experiment
from zoo.model import Batch, Model
from zoo.task import Metric, run_metrics
from zoo.train import load_run
from zoo.train.run import autocast


@dataclass
class Number:
    """`at`: {"tokens": …}, {"position": …} or {"length": …}, or nothing. `facts` go into the row beside it."""

    name: str
    value: float
    at: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


Measurement = Callable[[Path, Experiment, torch.device], list[Number]]


def scores(run: Path, settings: Experiment, device: torch.device) -> list[Number]:
    """The task's metrics on the split."""
    return _scores(run, settings, device, {})


def lengths(run: Path, settings: Experiment, device: torch.device) -> list[Number]:
    """The same at other lengths than it was trained with."""
    numbers = []
    for length in settings.lengths:
        word = configs.dotted([f"{settings.length_field}={length}"])
        numbers += _scores(run, settings, device, {"length": length}, word)
    return numbers


def _scores(
    run: Path, settings: Experiment, device: torch.device, at: dict[str, int], overrides: dict[str, Any] | None = None
) -> list[Number]:
    recipe, task, model = load_run(run, device=device, overrides=overrides)
    longest = Longest()
    metrics = {**task.metrics(settings.split), "longest": longest}
    stream = task.stream(settings.split, batch_size=rows_at_once(recipe.train))
    with longest.watching(model), autocast(recipe.train.precision, device):
        values = run_metrics(model, metrics, stream, device=device, progress=first_batches(settings))
    facts = {"protocol": task.describe(settings.split), **sizes(model, longest.tokens)}
    return [Number(name, value, at, facts) for name, value in values.items()]


def first_batches(settings: Experiment) -> Callable[[Any], Any]:
    """What `run_metrics` draws its batches through: a progress bar, and the end where settings.batches says so."""
    return lambda stream: itertools.islice(progress_bar(settings.split)(stream), settings.batches or None)


def sizes(model: Any, tokens: int) -> dict[str, Any]:
    """Parameters, and the bytes that a sequence of so many tokens leaves as state, in the weights' precision."""
    facts: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    if isinstance(model, Model) and tokens:
        element = next(model.parameters()).element_size()
        facts |= {"tokens": tokens, "state_bytes": model.backbone.state_bytes(tokens, element)}
    return facts


class Longest(Metric):
    """Measures nothing, but knows the longest row that a model was given: any domain's model has a backbone."""

    def __init__(self) -> None:
        self.tokens = 0

    def watching(self, model: Any) -> Any:
        """A context in which the model's rows are noted."""

        def note(module: Any, inputs: tuple[Tensor, ...]) -> None:
            self.tokens = max(self.tokens, inputs[0].shape[1])

        return _Hook(model.backbone.register_forward_pre_hook(note) if isinstance(model, Model) else None)

    def update(self, model: Any, batch: Batch) -> None:
        pass

    def reduce(self, ranks: Any) -> None:
        pass

    def compute(self) -> dict[str, float]:
        return {}


class _Hook:
    def __init__(self, handle: Any):
        self.handle = handle

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self.handle is not None:
            self.handle.remove()


# ---------------------------------------------------------------------------------------------------------------------


def curve(run: Path, settings: Experiment, device: torch.device) -> list[Number]:
    """The validation numbers that training left, over the tokens trained on."""
    recipe, task, _ = load_run(run)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if not CURVE_NAMES.isdisjoint(row)]
    stream = task.stream("train", batch_size=recipe.train.batch_size, seed=recipe.train.seed)
    tokens = tokens_seen(stream, [row["step"] for row in rows])
    return [
        Number(name, value, {"step": row["step"], "tokens": tokens[row["step"]]})
        for row in rows
        for name, value in row.items()
        if name in CURVE_NAMES and value is not None
    ]


def tokens_seen(stream: Any, steps: list[int]) -> dict[int, int]:
    """Step -> tokens that training had read by then."""
    batches = iter(stream)
    if isinstance(stream, SourceStream):  # its training batches are all of one size
        each = elements(next(batches))
        return {step: step * each for step in steps}
    counts = itertools.accumulate(elements(batch) for batch in itertools.islice(batches, max(steps, default=0)))
    return {step: count for step, count in enumerate(counts, 1) if step in set(steps)}


CURVE_NAMES = {"valid/loss", "valid/accuracy"}


def elements(batch: Batch) -> int:
    """Tokens of a batch's rows."""
    tensor = batch.inputs if isinstance(batch.inputs, Tensor) else batch.targets
    while not isinstance(tensor, Tensor):
        tensor = next(iter(tensor.values() if isinstance(tensor, dict) else tensor))
    return tensor.shape[0] * (tensor.shape[1] if tensor.dim() > 1 else 1)


# ---------------------------------------------------------------------------------------------------------------------


def positions(run: Path, settings: Experiment, device: torch.device) -> list[Number]:
    """The mean loss at places of a row, in octaves: [0, 16), [16, 32), [32, 64), … Rows are the evaluation's own but
    with everything scored: where rows overlap, a token is scored once in each."""
    word = {"task": {"stride": _whole_rows(run)}} if _whole_rows(run) else {}
    recipe, task, model = load_run(run, device=device, overrides=word)
    by_place = ByPosition()
    stream = task.stream(settings.split, batch_size=rows_at_once(recipe.train))
    with autocast(recipe.train.precision, device):
        run_metrics(model, {"positions": by_place}, stream, device=device, progress=first_batches(settings))
    return [Number("loss", loss, {"position": begin}) for begin, loss in by_place.losses().items()]


def _whole_rows(run: Path) -> int:
    """The context, for a task whose evaluation rows overlap by a stride; 0 for others."""
    config = load_run(run)[0].task.config  # type: ignore[union-attr]
    return int(config.context) if hasattr(config, "stride") and hasattr(config, "context") else 0


class ByPosition(Metric):
    """For heads that look at each token alone (`tokenwise`), with targets (B, T, …)."""

    def __init__(self) -> None:
        self.sums: dict[int, list[float]] = {}

    @torch.no_grad()
    def update(self, model: Any, batch: Batch) -> None:
        if not (isinstance(model, Model) and model.head.tokenwise and isinstance(batch.targets, Tensor)):
            raise ValueError("measure: positions needs a head that scores each token alone; leave it out here")
        h, _ = model.head.embed(batch.inputs, batch.ctx)
        h, _ = model.backbone(h, batch.ctx)
        for begin, end in octaves(h.shape[1]):
            output = model.head.loss(h[:, begin:end], Batch(None, batch.targets[:, begin:end], ctx=batch.ctx))
            held = self.sums.setdefault(begin, [0.0, 0.0])
            held[0] += float(output.loss_sum)
            held[1] += float(output.count)

    def reduce(self, ranks: Any) -> None:
        pass

    def compute(self) -> dict[str, float]:
        return {}

    def losses(self) -> dict[int, float]:
        return {begin: total / count for begin, (total, count) in sorted(self.sums.items()) if count}


def octaves(tokens: int, first: int = 16) -> list[tuple[int, int]]:
    """[(0, 16), (16, 32), (32, 64), …] up to `tokens`."""
    edges = [0, first]
    while edges[-1] < tokens:
        edges.append(2 * edges[-1])
    return [(begin, min(end, tokens)) for begin, end in zip(edges, edges[1:], strict=False) if begin < tokens]


def rows_at_once(train: Any) -> int:
    return train.eval_batch_size or train.micro_batch_size or train.batch_size


MEASURE: dict[str, Measurement] = {"scores": scores, "lengths": lengths, "curve": curve, "positions": positions}
