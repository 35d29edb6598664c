"""K parallel streams of codes: at every step one softmax for each stream that has a code there.

A row of inputs begins with a step without codes and goes on as the pattern lays the frames out; place t predicts step
t. The embeddings of a step's codes are added up.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tasks.audio.labels import Labels, check_labels, start_labels, without_labels
from tasks.audio.patterns import PATTERNS
from zoo.generation import Sampling, sample_logits
from zoo.layers import init_normal
from zoo.model import Batch, Context, Head, Output
from zoo.ops import linear_cross_entropy, may_look
from zoo.registry import nearest
from zoo.state import State


class CodeHead(Head):
    @dataclass
    class Config:
        """streams        K; 0: the task fills it in, and `levels` and `classes` too
        levels         codes of each stream
        pattern        parallel, delay, flat: the task's
        classes, class_dropout  as of samples
        dropout        on the embedded steps
        """

        streams: int = 0
        levels: int = 2
        pattern: str = "delay"
        classes: tuple[int, ...] = ()
        class_dropout: float = 0.1
        dropout: float = 0.0

        def __post_init__(self):
            check_labels(self.classes, self.class_dropout)
            if self.pattern not in PATTERNS:
                raise ValueError(f"pattern = {self.pattern!r}{nearest(self.pattern, PATTERNS)}")
            if self.streams < 0 or self.levels < 2:
                raise ValueError(
                    f"streams = {self.streams}, levels = {self.levels}; they take 0 or more, and 2 or more"
                )
            if not 0 <= self.dropout < 1:
                raise ValueError(f"dropout = {self.dropout}; it takes a number from 0 up to, not including, 1")

    rows: Tensor  # (K,) int64: where each stream's embeddings begin

    def __init__(self, config: Config, width: int):
        super().__init__()
        if config.streams < 1:
            raise ValueError(f"head.streams = {config.streams}; codes need 1 or more")
        self.config, self.pattern = config, PATTERNS[config.pattern](config.streams)
        self.register_buffer("rows", torch.arange(config.streams) * (config.levels + 1), persistent=False)
        # Held under the name that its weights have everywhere, head.embed.weight, which is also that of a method.
        nn.Module.__setattr__(self, "embed", nn.Embedding(config.streams * (config.levels + 1), width))
        self.labels = Labels(config.classes, width, config.class_dropout) if config.classes else None
        self.drop = nn.Dropout(config.dropout)
        self.out = nn.Linear(width, config.streams * config.levels, bias=False)
        init_normal((self._modules["embed"], self.out), 0.02)

    @property
    def empty(self) -> int:
        """Stands where a stream has no code."""
        return self.config.levels

    def check(self, inputs: Tensor) -> None:
        if inputs.dim() != 3 or inputs.shape[2] != self.config.streams:
            raise ValueError(
                f"inputs of shape {tuple(inputs.shape)}: this model takes (B, T, {self.config.streams}) codes"
            )
        if not may_look(inputs) or not inputs.numel():
            return
        low, high = (int(x) for x in inputs.aminmax())
        if low < 0 or high > self.config.levels:
            raise ValueError(
                f"code {low if low < 0 else high} is out of range: this model takes 0 to {self.config.levels - 1}, and "
                f"{self.empty} where there is none"
            )

    def init_state(self, inputs: Tensor, condition: Any = None, lengths: Tensor | None = None) -> State:
        """place (B,) how many inputs a row has seen; labels (B, A)."""
        rows, device = inputs.shape[0], inputs.device
        place = torch.zeros(rows, dtype=torch.int64, device=device)
        return {"place": place, **start_labels(self.labels, rows, condition, device)}

    def embed(self, inputs: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """(B, T, K) int64 -> (B, T, C)."""
        known: Any = self.init_state(inputs) if state is None else state
        embedding = self._modules["embed"]
        assert embedding is not None
        h = embedding(inputs + self.rows).sum(dim=2)
        if self.labels is not None:
            h = h + self.labels(known["labels"])
        known = {**known, "place": known["place"] + (inputs.shape[1] if ctx.lengths is None else ctx.lengths)}
        return self.drop(h), None if state is None else known

    def loss(self, h: Tensor, batch: Batch) -> Output:
        """Nats, summed over the codes; and each stream's, as metrics."""
        parts = {}
        for stream, weight in enumerate(self.out.weight.chunk(self.config.streams)):
            targets = batch.targets[..., stream].contiguous()
            parts[f"nats_stream_{stream + 1}"] = linear_cross_entropy(h, weight, targets)
        total = torch.stack([loss for loss, _ in parts.values()]).sum()
        count = torch.stack([count for _, count in parts.values()]).sum()
        return Output(total, count, {name: (loss.detach(), count) for name, (loss, count) in parts.items()})

    def logits(self, h_last: Tensor, state: State | None) -> Tensor:
        """(B, C) -> (B, K, levels)."""
        return self.out(h_last).unflatten(-1, (self.config.streams, self.config.levels))

    def sample(self, params: Tensor, state: Any, sampling: Sampling, generator: Any) -> tuple[Tensor, Any]:
        """One step (B, 1, K): a code for each stream that the pattern gives one here."""
        drawn = sample_logits(params.flatten(0, 1), sampling, generator).view(params.shape[:2])
        here = self.pattern.active(state["place"] - 1)  # the first input is the step without codes
        return torch.where(here, drawn, self.empty).unsqueeze(1), state

    def unconditional(self, state: Any) -> State:
        return without_labels(self.labels, state)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.out.weight.numel()
