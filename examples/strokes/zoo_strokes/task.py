"""The task: drawings as batches, moves as prompts, SVG as artefacts, and how many drawings close."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from zoo import config as configs
from zoo.config import Choice
from zoo.data import Shuffled, SourceStream
from zoo.generation import generate
from zoo.model import Batch, Context, Model
from zoo.registry import datasets
from zoo.task import Media, Metric, Request, Task
from zoo_strokes.data import END, START, STEPS


class StrokesTask(Task):
    domain = "strokes"
    endings = (".svg",)

    @dataclass
    class Config:
        """drawn: how many drawings an evaluation draws, to count those that close."""

        dataset: Choice | None = configs.choice(datasets, "strokes/outlines")
        drawn: int = 64

    def __init__(self, config: Config, assets: Path | None = None):
        self.config = config = configs.build(self.Config, config)
        assert config.dataset is not None
        self.data = datasets.get(config.dataset.name)(config.dataset.config)

    def provenance(self) -> dict[str, Any]:
        return self.data.provenance()

    def stream(self, split: str, *, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0) -> SourceStream:
        training = split == "train"
        source = Shuffled(self.data.drawings(split), self._collate, seed=seed if training else None)
        return SourceStream(source, batch_size=batch_size, rank=rank, world=world, endless=training)

    def _collate(self, drawings: list[np.ndarray]) -> Batch:
        """inputs (B, T): start, then the moves; targets: the moves, then the end; nothing is scored after it."""
        length = self.data.most_moves + 1
        inputs = torch.full((len(drawings), length), END)
        targets = torch.full((len(drawings), length), -100)
        for row, moves in enumerate(drawings):
            whole = torch.from_numpy(np.concatenate(([START], moves, [END])))
            inputs[row, : len(moves) + 1], targets[row, : len(moves) + 1] = whole[:-1], whole[1:]
        return Batch(inputs, targets)

    # -- prompts and drawings ------------------------------------------------------------------------------------------

    def prompt(self, obj: str | list[str]) -> Batch:
        """Moves as digits, "0012", or several such texts; "" begins anew."""
        texts = [obj] if isinstance(obj, str) else list(obj)
        for text in texts:
            if not set(text) <= set("01234567"):
                raise ValueError(f"prompt {text!r}; it takes moves as digits: 0 is east, 2 north, 7 south-east")
        rows = [torch.tensor([START, *map(int, text)]) for text in texts]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=END)
        return Batch(padded, ctx=Context(lengths=torch.tensor([len(row) for row in rows])))

    def length(self, prompt: Batch) -> int:
        return self.data.most_moves + 2 - prompt.inputs.shape[1]

    def artefact(self, inputs: Tensor) -> list[int]:
        """Drawn tokens (N,) -> moves up to the end."""
        moves = inputs.tolist()
        return moves[: moves.index(END)] if END in moves else moves

    def artefacts(self, prompt: Batch, drawn: Tensor) -> list[list[int]]:
        """Whole drawings: what was given, and what was added."""
        assert prompt.ctx.lengths is not None
        given = zip(prompt.inputs.tolist(), prompt.ctx.lengths.tolist(), strict=True)
        return [row[1:length] + self.artefact(new) for (row, length), new in zip(given, drawn, strict=True)]

    def ask(self, request: Request) -> list[str]:
        request.only(self.domain, "prompts", "count")
        return (request.prompts or [""]) * (request.count or 1)

    def write(self, artefacts: list[list[int]], path: Path) -> None:
        """All drawings in a row, as SVG."""
        side = 2 * self.data.most_moves // 3
        lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side * len(artefacts)} {side}">']
        for number, moves in enumerate(artefacts):
            x, y = places(moves).T
            points = " ".join(f"{a + side * (number + 0.5)},{side / 2 - b}" for a, b in zip(x, y, strict=True))
            lines.append(f'<polyline points="{points}" fill="none" stroke="black" stroke-width="0.4"/>')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*lines, "</svg>", ""]), encoding="utf-8")

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def metrics(self, split: str) -> dict[str, Metric]:
        return {"strokes": Closing(self)}

    def baselines(self, split: str) -> dict[str, float]:
        """A pen that goes on as before, or turns: the nats a move of counting what follows what."""
        count = np.ones((START + 1, END + 1))
        for moves in self.data.drawings("train"):
            np.add.at(count, (np.append(START, moves), np.append(moves, END)), 1)
        chance = np.log(count / count.sum(axis=1, keepdims=True))
        held_out = [chance[np.append(START, moves), np.append(moves, END)] for moves in self.data.drawings(split)]
        return {"loss_of_pairs": -float(np.concatenate(held_out).mean())}

    def describe(self, split: str) -> str:
        return f"every move and end of each drawing once; {self.config.drawn} drawings from nothing, temperature 1"

    def draw(self, model: Model, count: int, seed: int = 0) -> list[list[int]]:
        given = self.prompt([""] * count)
        return self.artefacts(given, generate(model, given, max_new=self.length(given), seed=seed).cpu())

    def show(self, model: nn.Module) -> Media:
        assert isinstance(model, Model)
        return Media(images={"drawings": picture(self.draw(model, 8))})


class Closing:
    """loss, nats a move; closed, the share of drawings from nothing that end where they began."""

    def __init__(self, task: StrokesTask):
        self.task = task
        self.sums = torch.zeros(4, dtype=torch.float64)  # nats, moves, closed, drawn

    @torch.no_grad()
    def update(self, model: Any, batch: Batch) -> None:
        output = model(batch)
        self.sums[:2] += torch.stack([output.loss_sum.double(), output.count.double()]).cpu()
        if self.sums[3] == 0:
            drawings = self.task.draw(model, self.task.config.drawn)
            closed = sum(bool(moves) and not places(moves)[-1].any() for moves in drawings)
            self.sums[2:] = torch.tensor([closed, len(drawings)])

    def reduce(self, ranks: Any) -> None:
        self.sums = ranks.sum(self.sums)

    def compute(self) -> dict[str, float]:
        nats, moves, closed, drawn = self.sums.tolist()
        return {"loss": nats / max(moves, 1), "closed": closed / max(drawn, 1)}


def places(moves: list[int]) -> np.ndarray:
    """(N + 1, 2): where the pen is before the first move and after each."""
    return np.concatenate((np.zeros((1, 2), dtype=np.int64), STEPS[moves].reshape(-1, 2))).cumsum(axis=0)


def picture(drawings: list[list[int]], side: int = 96) -> Tensor:
    """(3, side, N side) float in [0, 1], for TensorBoard."""
    canvas = Image.new("RGB", (side * len(drawings), side), "white")
    for number, moves in enumerate(drawings):
        points = places(moves) * (3, -3) + (side * number + side // 2, side // 2)
        ImageDraw.Draw(canvas).line([tuple(map(int, point)) for point in points], fill="black", width=2)
    return torch.from_numpy(np.asarray(canvas).copy()).permute(2, 0, 1).float() / 255
