"""Recall head: token embedding in; out, through the same matrix, only at the places where an answer is due.

With 4 answers to 64 tokens and 8,192 words that is where most of the work would be; the loss is the same.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.generation import Sampling, sample_logits
from zoo.model import Batch, Context, Head, Output
from zoo.ops import linear_cross_entropy
from zoo.state import State

ROWS_AT_ONCE = 4096  # whose logits stand at once while answers are compared


class RecallHead(Head):
    @dataclass
    class Config:
        """vocabulary  number of token ids; 0 waits for the task's data set
        dropout     on the embedded tokens
        """

        vocabulary: int = 0
        dropout: float = 0.0

        def __post_init__(self):
            if not 0 <= self.dropout < 1:
                raise ValueError(f"head.dropout = {self.dropout}; it takes a number from 0 up to, not including, 1")

    def __init__(self, config: Config, width: int):
        super().__init__()
        if config.vocabulary < 1:
            raise ValueError(f"head.vocabulary = {config.vocabulary}; a recall model needs the number of its token ids")
        self.config = config
        # Held under the name that its weights have everywhere, head.embed.weight, which is also that of a method.
        nn.Module.__setattr__(self, "embed", nn.Embedding(config.vocabulary, width))
        self.drop = nn.Dropout(config.dropout)
        nn.init.normal_(self.weight, std=0.02)

    @property
    def weight(self) -> Tensor:
        """(V, C), of both ends."""
        module = self._modules["embed"]
        assert isinstance(module, nn.Embedding)
        return module.weight

    def embed(self, inputs: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """Tokens (B, T) int64 -> (B, T, C)."""
        return self.drop(nn.functional.embedding(inputs, self.weight)), state

    def loss(self, h: Tensor, batch: Batch) -> Output:
        """Cross-entropy in nats over the answers: batch.targets {"places": (B, L), "values": (B, L)} int64.

        In eval mode the metric `accuracy` comes with it: per example the share of right answers, over examples.
        """
        answers = self.answers(h, batch)
        output = Output(*linear_cross_entropy(answers, self.weight, batch.targets["values"]))
        if not self.training:
            right = self.right(answers, batch).float().mean(dim=1)
            output.metrics["accuracy"] = (right.sum(), output.count.new_tensor(len(right)))
        return output

    def answers(self, h: Tensor, batch: Batch) -> Tensor:
        """(B, T, C) -> (B, L, C), where answers are due."""
        return h.take_along_dim(batch.targets["places"].unsqueeze(-1), dim=1)

    def right(self, answers: Tensor, batch: Batch) -> Tensor:
        """(B, L, C) -> (B, L) bool: the likeliest token is the value."""
        values = batch.targets["values"]
        step = max(1, ROWS_AT_ONCE // len(values))
        found = [self.logits(part, None).argmax(-1) for part in answers.split(step, dim=1)]
        return torch.cat(found, dim=1) == values

    def logits(self, h_last: Tensor, state: State | None) -> Tensor:
        """(…, C) -> (…, V)."""
        return h_last @ self.weight.to(h_last.dtype).T

    def sample(self, params: Tensor, state: Any, sampling: Sampling, generator: Any) -> tuple[Tensor, Any]:
        return sample_logits(params, sampling, generator).unsqueeze(1), state

    def flops(self, tokens: int) -> int:
        """Of one answer a row: how many there are, a batch says and not its length."""
        return 2 * self.weight.numel()
