"""Values as tokens, in the manner of Chronos (arXiv 2403.07815): scaled, put into bins, and predicted by a softmax.

A value is divided by the mean of the absolute values of the prefix (or of the history, in a forecast) and put into one
of `bins` bins of equal width between -limit and limit; the bin's middle stands for it. A missing value is a token more.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tasks.series.normalise import Scaling, begin, here, last, normalised, statistics
from zoo.generation import sample_logits
from zoo.model import Batch, Context, Head, Output
from zoo.ops import linear_cross_entropy
from zoo.state import State


class SeriesTokenHead(Head):
    @dataclass
    class Config:
        """patch, predict, channels, known: the task fills them in, and each value is a token: 1, 1, 1, 0.
        prefix, statistics: as in the head of patches
        """

        bins: int = 1024
        limit: float = 15.0
        patch: int = 1
        predict: int = 1
        channels: int = 1
        known: int = 0
        prefix: int = 0
        statistics: Literal["prefix", "running"] = "prefix"
        dropout: float = 0.0

    def __init__(self, config: Config, width: int):
        super().__init__()
        self.config = config
        for name, only in (("patch", 1), ("predict", 1), ("channels", 1), ("known", 0)):
            if getattr(config, name) != only:
                raise ValueError(
                    f"{name} = {getattr(config, name)}, but head series_tokens makes a token of every value: it takes "
                    "task.patch = task.predict = 1, task.channels = independent and no covariates"
                )
        if config.bins < 2 or config.limit <= 0 or config.prefix < 1:
            raise ValueError("series_tokens takes bins >= 2, limit > 0 and prefix >= 1")
        self.drop = nn.Dropout(config.dropout)
        self.token = nn.Embedding(config.bins + 1, width)
        self.out = nn.Linear(width, config.bins, bias=False)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.out.weight, std=0.02)

    def check(self, inputs: Tensor) -> None:
        if inputs.dim() != 4 or inputs.shape[2:] != (1, 1):
            raise ValueError(f"inputs have shape {tuple(inputs.shape)}; this model takes (rows, values, 1, 1)")

    def bins(self, x: Tensor) -> Tensor:
        """Scaled values -> int64 bins, `config.bins` where missing."""
        span, count = 2 * self.config.limit, self.config.bins
        place = ((x + self.config.limit) / span * count).nan_to_num(0.0).floor().clamp(0, count - 1).long()
        return place.masked_fill(x.isnan(), count)

    def middles(self, device: Any) -> Tensor:
        """(bins,) scaled."""
        width = 2 * self.config.limit / self.config.bins
        return (torch.arange(self.config.bins, device=device) + 0.5) * width - self.config.limit

    def embed(self, inputs: Tensor, ctx: Context, state: Any = None) -> tuple[Tensor, Any]:
        if state is None:
            location, scale = statistics(inputs, self.config.statistics, self.config.prefix, "mean_abs")
        else:
            location, scale, _ = here(state, inputs.shape[1])
            state = {**state, "place": state["place"] + inputs.shape[1]}
        return self.drop(self.token(self.bins(normalised(inputs, location, scale))[:, :, 0, 0])), state

    def loss(self, h: Tensor, batch: Batch) -> Output:
        """Cross-entropy in nats over targets (B, T, 1, 1) in the data's units, NaN unscored, after the prefix."""
        location, scale = statistics(batch.inputs, self.config.statistics, self.config.prefix, "mean_abs")
        ids = self.bins(normalised(batch.targets, location, scale))[:, :, 0, 0]
        ids = ids.masked_fill(ids == self.config.bins, -100)
        ids[:, : self.config.prefix - 1].fill_(-100)
        return Output(*linear_cross_entropy(self.drop(h), self.out.weight, ids))

    def init_state(self, inputs: Tensor, condition: Any = None, lengths: Tensor | None = None) -> State:
        location, scale = statistics(inputs, self.config.statistics, inputs.shape[1], "mean_abs")
        return begin(Scaling(location, scale, scale))

    def logits(self, h_last: Tensor, state: Any) -> Tensor:
        """(B, width) -> (B, bins)."""
        return self.out(h_last).float()

    def summary(self, params: Tensor, state: Any, levels: list[float]) -> tuple[Tensor, Tensor]:
        """Mean (B, 1, 1) and quantiles (B, 1, 1, Q), in the data's units."""
        probabilities, middles = params.softmax(-1), self.middles(params.device)
        wanted = params.new_tensor(levels).expand(len(params), -1).contiguous()
        place = torch.searchsorted(probabilities.cumsum(-1), wanted).clamp(max=len(middles) - 1)
        scale = last(state).scale[:, 0]
        mean = (probabilities * middles).sum(-1, keepdim=True) * scale
        return mean.unsqueeze(-1), (middles[place] * scale)[:, None, None]

    def draw(self, params: Tensor, state: Any, sampling: Any, generator: Any) -> Tensor:
        """(B, 1, 1) in the data's units."""
        drawn = sample_logits(params, sampling, generator)
        return (self.middles(params.device)[drawn] * last(state).scale[:, 0, 0])[:, None, None]

    def feed(self, values: Tensor, state: Any) -> tuple[Tensor, Any]:
        return values.unsqueeze(1), state

    def sample(self, params: Tensor, state: Any, sampling: Any, generator: Any) -> tuple[Tensor, Any]:
        return self.feed(self.draw(params, state, sampling, generator), state)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.out.weight.numel()
