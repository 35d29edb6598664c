"""A waveform, sample by sample: 8-bit mu-law levels with a softmax, as in WaveNet (arXiv 1609.03499).

A row of inputs begins with the token 256 and goes on with the levels; place t predicts sample t, so a recording's loss
is its exact negative log-likelihood. Beside the level itself the head may show the backbone the amplitudes of the last
`history` samples, through a small MLP: as companded, and over their own root mean square, so that what was learned of a
loud voice holds for a faint one.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tasks.audio.labels import Labels, check_labels, start_labels, without_labels
from tasks.audio.waves import LEVELS, amplitudes
from zoo.generation import Sampling, sample_logits
from zoo.layers import document_positions, init_normal
from zoo.model import Batch, Context, Head, Output
from zoo.ops import linear_cross_entropy, may_look
from zoo.state import State

START = LEVELS
QUIET = 1e-3  # amplitudes below this are not raised any further: about the smallest level


class SampleHead(Head):
    @dataclass
    class Config:
        """classes        values of each attribute that the model is conditioned on; () for none. The task fills it in
        class_dropout  share of the training rows whose labels are hidden, for classifier-free guidance
        history        so many of the last samples' amplitudes are shown at every place; 0: none
        dropout        on the embedded samples
        """

        classes: tuple[int, ...] = ()
        class_dropout: float = 0.1
        history: int = 0
        dropout: float = 0.0

        def __post_init__(self):
            check_labels(self.classes, self.class_dropout)
            if self.history < 0:
                raise ValueError(f"history = {self.history}; it takes 0 or more samples")
            if not 0 <= self.dropout < 1:
                raise ValueError(f"dropout = {self.dropout}; it takes a number from 0 up to, not including, 1")

    companded: Tensor  # (257,) float32, each level in [-1, 1]; 0 for the start
    linear: Tensor  # (257,) float32, the amplitude that it stands for

    def __init__(self, config: Config, width: int):
        super().__init__()
        self.config = config
        tables = {"companded": np.linspace(-1, 1, LEVELS, dtype=np.float32), "linear": amplitudes()}
        for name, table in tables.items():
            self.register_buffer(name, torch.from_numpy(np.append(table, np.float32(0))), persistent=False)
        # Held under the name that its weights have everywhere, head.embed.weight, which is also that of a method.
        nn.Module.__setattr__(self, "embed", nn.Embedding(LEVELS + 1, width))
        self.labels = Labels(config.classes, width, config.class_dropout) if config.classes else None
        self.drop = nn.Dropout(config.dropout)
        self.out = nn.Linear(width, LEVELS, bias=False)
        init_normal((self._modules["embed"], self.out), 0.02)
        self.near = None
        if config.history:
            first, second = nn.Linear(2 * config.history + 1, width), nn.Linear(width, width)
            nn.init.normal_(second.weight, std=0.02)  # the first as torch has it: its inputs are few, and of size 1
            self.near = nn.Sequential(first, nn.GELU(), second)

    def check(self, inputs: Tensor) -> None:
        if not may_look(inputs) or not inputs.numel():
            return
        low, high = (int(x) for x in inputs.aminmax())
        if low < 0 or high > START:
            wrong = low if low < 0 else high
            raise ValueError(f"sample {wrong} is out of range: levels are 0 to {LEVELS - 1}, and {START} at a start")

    def init_state(self, inputs: Tensor, condition: Any = None, lengths: Tensor | None = None) -> State:
        """labels (B, A); recent (B, history - 1) the inputs before this call."""
        rows, device = inputs.shape[0], inputs.device
        state: dict[str, Any] = start_labels(self.labels, rows, condition, device)
        if self.config.history > 1:
            state["recent"] = torch.full((rows, self.config.history - 1), START, dtype=torch.int64, device=device)
        return state

    def embed(self, inputs: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """(B, T) int64 levels, START first -> (B, T, C)."""
        known: Any = self.init_state(inputs) if state is None else state
        embedding = self._modules["embed"]
        assert embedding is not None
        h = embedding(inputs)
        if self.labels is not None:
            h = h + self.labels(known["labels"])
        if self.near is not None:
            seen = inputs if self.config.history == 1 else torch.cat((known["recent"], inputs), dim=1)
            h = h + self.near(self._amplitudes(seen, inputs.shape[1], ctx).to(h.dtype))
            if self.config.history > 1:
                known = {**known, "recent": last_of(seen, self.config.history - 1, ctx.lengths)}
        return self.drop(h), None if state is None else known

    def _amplitudes(self, seen: Tensor, tokens: int, ctx: Context) -> Tensor:
        """(B, T, 2 history + 1) float32, of the samples up to and including each input's, none of another document."""
        windows = seen.unfold(1, self.config.history, 1)  # (B, T, history), the newest last
        if ctx.cu_seqlens is not None:
            age = torch.arange(self.config.history - 1, -1, -1, device=seen.device)
            own = age <= document_positions(ctx.cu_seqlens, tokens).unsqueeze(1)
            windows = torch.where(own, windows, START)
        linear = self.linear[windows]
        size = linear.square().mean(dim=-1, keepdim=True).sqrt() + QUIET
        return torch.cat((self.companded[windows], linear / size, size.log() / 2), dim=-1)

    def loss(self, h: Tensor, batch: Batch) -> Output:
        """Nats, summed over the samples."""
        return Output(*linear_cross_entropy(h, self.out.weight, batch.targets))

    def logits(self, h_last: Tensor, state: State | None) -> Tensor:
        """(B, C) -> (B, 256)."""
        return self.out(h_last)

    def sample(self, params: Tensor, state: Any, sampling: Sampling, generator: Any) -> tuple[Tensor, Any]:
        return sample_logits(params, sampling, generator).unsqueeze(1), state

    def unconditional(self, state: Any) -> State:
        return without_labels(self.labels, state)

    def flops(self, tokens: int) -> int:
        near = 0 if self.near is None else sum(p.numel() for p in self.near.parameters() if p.ndim == 2)
        return 2 * tokens * (self.out.weight.numel() + near)


def last_of(seen: Tensor, count: int, lengths: Tensor | None) -> Tensor:
    """The last `count` of each row of `seen` (B, count + T), where `lengths` (B,) of the T are valid; None: all."""
    if lengths is None:
        return seen[:, seen.shape[1] - count :]
    return seen.gather(1, lengths.unsqueeze(1) + torch.arange(count, device=seen.device))
