"""Next-token head: token embedding in, softmax over the vocabulary out, by default through the same matrix."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.generation import Sampling, sample_logits
from zoo.model import Batch, Context, Head, Output
from zoo.ops import linear_cross_entropy, may_look
from zoo.state import State


class TextHead(Head):
    @dataclass
    class Config:
        """vocabulary  number of token ids; 0 waits for the task to fill in its tokenizer's
        tied        one matrix for embedding and output (Press and Wolf, arXiv 1608.05859)
        dropout     on the embedded tokens
        """

        vocabulary: int = 0
        tied: bool = True
        dropout: float = 0.0

    tokenwise = True

    def __init__(self, config: Config, width: int):
        super().__init__()
        if config.vocabulary < 1:
            raise ValueError(f"head.vocabulary = {config.vocabulary}; a text model needs the number of its token ids")
        if not 0 <= config.dropout < 1:
            raise ValueError(f"head.dropout = {config.dropout}; it takes a number from 0 up to, not including, 1")
        self.config = config
        # Held under the name that its weights have everywhere, head.embed.weight, which is also that of a method.
        nn.Module.__setattr__(self, "embed", nn.Embedding(config.vocabulary, width))
        self.drop = nn.Dropout(config.dropout)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.out = None if config.tied else nn.Linear(width, config.vocabulary, bias=False)
        if self.out is not None:
            nn.init.normal_(self.out.weight, std=0.02)

    @property
    def embedding(self) -> nn.Embedding:
        module = self._modules["embed"]
        assert isinstance(module, nn.Embedding)
        return module

    @property
    def out_weight(self) -> Tensor:
        return self.embedding.weight if self.out is None else self.out.weight

    def check(self, inputs: Tensor) -> None:
        if not may_look(inputs) or not inputs.numel():
            return
        low, high = (int(x) for x in inputs.aminmax())
        if low < 0 or high >= self.config.vocabulary:
            raise ValueError(
                f"token {low if low < 0 else high} is outside the vocabulary: this model has {self.config.vocabulary} "
                f"tokens, 0 to {self.config.vocabulary - 1}"
            )

    def embed(self, inputs: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """Tokens (B, T) int64 -> (B, T, C)."""
        return self.drop(self.embedding(inputs)), state

    def loss(self, h: Tensor, batch: Batch) -> Output:
        """Cross-entropy in nats over targets (B, T), -100 unscored."""
        return Output(*linear_cross_entropy(h, self.out_weight, batch.targets))

    def init_state(self, inputs: Tensor, condition: Any = None, lengths: Tensor | None = None) -> State:
        """{"occurred": (B, V) int32}: how often each token stands in the prompt, for the repetition penalty."""
        real = torch.ones_like(inputs)
        if lengths is not None:
            real = (torch.arange(inputs.shape[1], device=inputs.device) < lengths.unsqueeze(1)).to(inputs.dtype)
        counts = torch.zeros(inputs.shape[0], self.config.vocabulary, dtype=torch.int64, device=inputs.device)
        return {"occurred": counts.scatter_add_(1, inputs, real).int()}

    def logits(self, h_last: Tensor, state: State | None) -> Tensor:
        """(B, C) -> (B, V)."""
        return h_last @ self.out_weight.T

    def sample(self, params: Tensor, state: Any, sampling: Sampling, generator: Any) -> tuple[Tensor, Any]:
        """(B, V) -> tokens (B, 1), and the state with them counted."""
        drawn = sample_logits(params, sampling, generator, state["occurred"]).unsqueeze(1)
        state["occurred"].scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.int32))
        return drawn, state

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.out_weight.numel()
