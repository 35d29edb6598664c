"""The head: moves in, a softmax over the next move out. It embeds where the pen is, which sampling has to remember."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.generation import Sampling, sample_logits
from zoo.model import Batch, Context, Head, Output
from zoo.ops import linear_cross_entropy
from zoo.state import State
from zoo_strokes.data import END, START, STEPS


class StrokesHead(Head):
    @dataclass
    class Config:
        """reach: how far from the start, in x or y, the head tells places apart."""

        reach: int = 16

    def __init__(self, config: Config, width: int):
        super().__init__()
        self.config = config
        self.moves = nn.Embedding(START + 1, width)
        self.places = nn.ModuleList(nn.Embedding(2 * config.reach + 1, width) for _ in "xy")
        self.out = nn.Linear(width, END + 1, bias=False)
        self.register_buffer("steps", torch.tensor([*STEPS.tolist(), (0, 0), (0, 0)]), persistent=False)  # (10, 2)
        for module in (self.moves, *self.places, self.out):
            nn.init.normal_(module.weight, std=0.02)

    def init_state(self, inputs: Tensor, condition: Any = None, lengths: Tensor | None = None) -> State:
        """{"pen": (B, 2) int64}, where the pen is before the first token."""
        return {"pen": torch.zeros(len(inputs), 2, dtype=torch.int64, device=inputs.device)}

    def embed(self, inputs: Tensor, ctx: Context, state: Any = None) -> tuple[Tensor, State | None]:
        """Tokens (B, T) int64 -> (B, T, C): the move, and the place that it leads to."""
        taken = self.steps[inputs]  # (B, T, 2)
        if ctx.lengths is not None:  # of rows padded on the right, the padding moves nothing
            real = torch.arange(inputs.shape[1], device=inputs.device) < ctx.lengths.unsqueeze(1)
            taken = taken * real.unsqueeze(2)
        pen = taken.cumsum(dim=1)
        if state is not None:
            pen = pen + state["pen"].unsqueeze(1)
            state = {"pen": pen[:, -1]}
        h = self.moves(inputs)
        for axis, places in enumerate(self.places):
            h = h + places(pen[..., axis].clamp(-self.config.reach, self.config.reach) + self.config.reach)
        return h, state

    def loss(self, h: Tensor, batch: Batch) -> Output:
        """Cross-entropy in nats over targets (B, T), -100 unscored."""
        return Output(*linear_cross_entropy(h, self.out.weight, batch.targets))

    def logits(self, h_last: Tensor, state: State | None) -> Tensor:
        """(B, C) -> (B, 9): the moves, and the end."""
        return self.out(h_last)

    def sample(self, params: Tensor, state: Any, sampling: Sampling, generator: Any) -> tuple[Tensor, Any]:
        return sample_logits(params, sampling, generator).unsqueeze(1), state
