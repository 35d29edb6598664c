"""The recall task: a synthetic data set as batches with their answers; accuracy, pooled and by segment."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.recall.data import SegmentStream, Synthetic
from zoo import config as configs
from zoo.config import Choice
from zoo.model import Batch, ModelConfig
from zoo.registry import datasets
from zoo.task import Metric, Task


class RecallTask(Task):
    domain = "recall"

    @dataclass
    class Config:
        dataset: Choice | None = configs.choice(datasets, "recall/mqar")

    def __init__(self, config: Config, assets: Path | None = None):
        self.config = config = configs.build(self.Config, config)
        assert config.dataset is not None
        self.data = data_set(config.dataset.name, json.dumps(configs.to_dict(config.dataset.config)))

    def model_config(self, config: ModelConfig) -> ModelConfig:
        return configs.build(ModelConfig, config, {"head": {"vocabulary": self.data.vocabulary}})

    def provenance(self) -> dict[str, Any]:
        return self.data.provenance()

    def stream(self, split: str, *, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0) -> SegmentStream:
        """The order is the data set's own, so `seed` has no effect: task.dataset.seed decides what is drawn."""
        return SegmentStream(
            self.data.segments(split), batch_size=batch_size, rank=rank, world=world, endless=split == "train"
        )

    def prompt(self, obj: list[int] | list[list[int]]) -> Batch:
        """Token ids, or several lists of one length -> tokens (B, T)."""
        rows = torch.tensor(obj, dtype=torch.int64)
        return Batch(rows if rows.dim() == 2 else rows.unsqueeze(0))

    def artefact(self, inputs: Tensor) -> list[int]:
        return inputs.tolist()

    def metrics(self, split: str) -> dict[str, Metric]:
        return {"recall": Accuracy([part.name for part in self.data.segments(split)])}

    def describe(self, split: str) -> str:
        parts = self.data.segments(split)
        named = ", ".join(f"{part.name} ({len(part)})" for part in parts)
        return f"{self.data.name}, segments {named}; accuracy per example, then over all examples"


@functools.lru_cache(maxsize=2)
def data_set(name: str, config: str) -> Synthetic:
    """By its name and its config as JSON; made once for all runs of a process that ask for the same numbers.
    They share it, so nothing changes a data set after it is made."""
    kind = datasets.get(name)
    return kind(configs.build(kind.Config, json.loads(config)))


class Accuracy:
    """loss in nats an answer; accuracy, per example and then over all of them; and that of each segment, where there
    is more than one (`accuracy_256x64`)."""

    def __init__(self, segments: list[str]):
        self.segments = segments
        self.nats = torch.zeros((), dtype=torch.float64)
        self.answers = torch.zeros((), dtype=torch.int64)
        self.right = torch.zeros(len(segments), dtype=torch.float64)
        self.examples = torch.zeros(len(segments), dtype=torch.int64)

    @torch.no_grad()
    def update(self, model: Any, batch: Batch) -> None:
        h, _ = model.head.embed(batch.inputs, batch.ctx)
        h, _ = model.backbone(h, batch.ctx)
        output = model.head.loss(h, batch)
        right = model.head.right(model.head.answers(h, batch), batch)
        place = batch.targets["segment"].cpu()
        self.nats += output.loss_sum.double().cpu()
        self.answers += output.count.cpu()
        self.right.index_add_(0, place, right.double().mean(dim=1).cpu())
        self.examples.index_add_(0, place, torch.ones_like(place))

    def reduce(self, ranks: Any) -> None:
        self.nats, self.answers, self.right, self.examples = (
            ranks.sum(x) for x in (self.nats, self.answers, self.right, self.examples)
        )

    def compute(self) -> dict[str, float]:
        pooled = {
            "accuracy": float(self.right.sum()) / max(1, int(self.examples.sum())),
            "loss": float(self.nats) / max(1, int(self.answers)),
        }
        if len(self.segments) == 1:
            return pooled
        each = self.right / self.examples.clamp(min=1)
        return pooled | {f"accuracy_{name}": float(x) for name, x in zip(self.segments, each, strict=True)}
