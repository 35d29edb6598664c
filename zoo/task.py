"""How a domain introduces its data to a model: Task and Metric. A task trains nothing.

To add a domain: a Head (zoo/model.py), a Stream (zoo/data.py) and a Task, registered by one entry point.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from zoo.data import Stream
from zoo.model import Batch, ModelConfig


class Metric(Protocol):
    """One pass over a split. It may call zoo.generate: FID and rolled-forward errors are not sums over batches."""

    def update(self, model: Any, batch: Batch) -> None: ...

    def reduce(self, ranks: Any) -> None:
        """Add up what the ranks hold; `ranks` offers `sum(tensor) -> tensor`. Afterwards `compute` agrees on all."""
        ...

    def compute(self) -> dict[str, float]: ...

    # A metric may also have `media() -> Media`: what an evaluation shows beside its numbers, once they are computed.


@dataclass
class Media:
    """What TensorBoard shows beside scalars: name -> content."""

    text: dict[str, str] = field(default_factory=dict)
    images: dict[str, torch.Tensor] = field(default_factory=dict)  # (3, H, W) float in [0, 1]
    audio: dict[str, tuple[torch.Tensor, int]] = field(default_factory=dict)  # (samples,) in [-1, 1], rate in Hz


@dataclass
class Request:
    """What `zoo sample` was asked for. A task takes the words that it knows, and names those that it does not.

    prompts  texts to continue
    label    a class, by name or number
    count    how many samples
    given    a file that holds the beginning
    """

    prompts: list[str] = field(default_factory=list)
    label: str | None = None
    count: int | None = None
    given: Path | None = None

    def only(self, domain: str, *known: str) -> None:
        """Raises ValueError for a word that the domain has no use for."""
        options = {"prompts": "--prompt", "label": "--class", "count": "--count", "given": "--given"}
        for name, option in options.items():
            if name not in known and getattr(self, name):
                takes = ", ".join(options[one] for one in known)
                raise ValueError(f"{domain} has no use for {option}; it takes {takes}")


class Task:
    """A domain's data, prompts, artefacts and metrics. `__init__(config: Config, assets: Path | None = None)`.

    `assets` is a folder written by `save_assets` beside weights (a tokenizer, scaling statistics): with it the task
    needs no training data to prompt, sample and decode.
    """

    Config: ClassVar[type]
    domain: ClassVar[str]
    endings: ClassVar[tuple[str, ...]] = (".txt",)  # of the files that `write` makes

    def model_config(self, config: ModelConfig) -> ModelConfig:
        """`config` with what the data decides filled in (vocabulary size, number of classes)."""
        return config

    def save_assets(self, folder: Path) -> None:
        """Write what prompts and artefacts need, for `assets=`."""

    def provenance(self) -> dict[str, Any]:
        """What names the data exactly (checksums, interpreter version); stored with the run and each number."""
        return {}

    def frozen(self) -> dict[str, str]:
        """Name -> sha256 of what the weights are useless without: a tokenizer, a codec. A run remembers them with its
        checkpoints, and is refused with others."""
        return {}

    def stream(self, split: str, *, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0) -> Stream:
        """split 'train': endless and shuffled; 'valid', 'test': one pass in order, nothing dropped."""
        raise NotImplementedError

    def prompt(self, obj: Any) -> Batch:
        """The domain's own object (a text, an image, a DataFrame; or a list of them) -> inputs for generation, with
        ctx.lengths where rows differ."""
        raise NotImplementedError

    def artefact(self, inputs: Any) -> Any:
        """Generated inputs of one row -> text, image, audio or DataFrame."""
        raise NotImplementedError

    def artefacts(self, prompt: Batch, drawn: torch.Tensor) -> list[Any]:
        """One artefact for each row of what was drawn after `prompt`."""
        return [self.artefact(row) for row in drawn]

    def length(self, prompt: Batch) -> int:
        """How many elements are drawn after `prompt` where nobody says."""
        return 256

    def elements(self, seconds: float) -> int:
        """How many elements are so much time, for `zoo sample --seconds`."""
        raise ValueError(f"{self.domain} has no seconds: --seconds is for sound and music; see --max-new")

    def pieces(self, prompt: Batch, steps: Iterator[torch.Tensor]) -> Iterator[list[Any]] | None:
        """What the steps drawn after `prompt` amount to, piece by piece as soon as it is known: for each row the next
        part of its artefact. None: the domain's artefacts do not come in parts."""
        return None

    def ask(self, request: Request) -> Any:
        """What `zoo sample` was asked for, as an object for `prompt`."""
        request.only(self.domain, "prompts")
        if not request.prompts:
            raise ValueError(f"{self.domain} continues a prompt: give one with --prompt")
        return request.prompts

    def write(self, artefacts: list[Any], path: Path) -> None:
        """Artefacts into one file, its format by the name's ending."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(str, artefacts)), encoding="utf-8")

    def attach(self, model: nn.Module, kept: Path | None = None, *, sealed: bool = False) -> None:
        """The trained model that this task came with, for what a domain offers beyond samples and for what it fits to
        finished weights; again with the same model, and no folder, changes nothing.

        kept    a folder of these very weights, for what was fitted to them; it need not exist yet
        sealed  it is read and not written to: that of published weights
        """

    def forecast_file(
        self, path: Path, horizon: int, *, columns: dict[str, Any], out: Path | None, plot: Path | None
    ) -> Any:
        """A table with the `horizon` steps after the end of the table in `path`, for `zoo sample --csv`."""
        raise ValueError(f"{self.domain} makes no forecasts: --csv and --horizon are for series")

    def metrics(self, split: str) -> dict[str, Metric]:
        """What is measured in one pass over `split`."""
        raise NotImplementedError

    def baselines(self, split: str) -> dict[str, float]:
        """What a reader sets beside the metrics and no model is needed for: gzip, the last value, a Markov chain."""
        return {}

    def describe(self, split: str) -> str:
        """The protocol in a few words: context, stride, horizon."""
        return ""

    def media(self, model: nn.Module, batch: Batch) -> Media:
        """Samples for TensorBoard, from a model in eval mode and a validation batch."""
        return self.show(model)

    def show(self, model: nn.Module) -> Media:
        """What the model makes without any data at hand: for the demo page and for the card of published weights."""
        return Media()


class OneRank:
    """The ranks of a single process: sums are themselves."""

    rank, world = 0, 1

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@torch.no_grad()
def run_metrics(
    model: nn.Module,
    metrics: dict[str, Metric],
    stream: Stream,
    *,
    device: Any = "cpu",
    ranks: Any = None,
    progress: Any = iter,
) -> dict[str, float]:
    """All metrics in one pass over `stream`, with the model in eval mode; restores its mode."""
    training = model.training
    model.eval()
    try:
        for batch in progress(stream):
            batch = batch.to(device)
            for metric in metrics.values():
                metric.update(model, batch)
    finally:
        model.train(training)
    for metric in metrics.values():
        metric.reduce(ranks or OneRank())
    return {name: value for metric in metrics.values() for name, value in metric.compute().items()}
