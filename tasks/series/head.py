"""Patches in, the distribution of the values of the next patches out.

A patch is normalised with statistics that do not look ahead (normalise.py), missing values become 0 with a flag of
their own, and a linear layer, with a residual MLP if asked for, makes a token of it. From a token's hidden state a
linear layer predicts the following `predict` steps. Beside it may run a linear highway: an autoregression on the last
values themselves, for which attention over tokens is a roundabout way (LSTNet, arXiv 1703.07015, section 3.6).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.series.normalise import begin, here, last, normalised, statistics
from tasks.series.outputs import outputs
from zoo import config as configs
from zoo.config import Choice
from zoo.model import Batch, Context, Head, Output
from zoo.state import State

FARTHEST = 30.0  # deviations; inputs beyond are cut, so that a spike after a calm past does not drown the rest


class SeriesHead(Head):
    @dataclass
    class Config:
        """A 0 waits for the task to fill in its own.

        patch      P, steps of a token
        predict    steps that are predicted from a token, a multiple of patch
        channels   values of a step in one row
        known      covariates of a step that are known ahead
        prefix     patches that come before the first scored prediction
        statistics prefix: of the first `prefix` patches, for all positions; running: up to each position
        output     what is predicted of a value
        units      in which the loss counts: normalised, every row alike; or data, so that a squared error is that of
                   the benchmark
        highway    steps of the linear autoregression; 0: none
        level      what its values are differences to: the row's mean, or wherever it stands the last value (NLinear,
                   arXiv 2205.13504), which follows a level that moves while a forecast is rolled
        hidden     width of the MLP that embeds patches; 0: a linear layer
        dropout    on embedded patches and on hidden states before the output
        """

        patch: int = 0
        predict: int = 0
        channels: int = 1
        known: int = 0
        prefix: int = 0
        statistics: Literal["prefix", "running"] = "prefix"
        output: Choice | None = configs.choice(outputs, "quantiles")
        units: Literal["normalised", "data"] = "normalised"
        highway: int = 0
        level: Literal["mean", "last"] = "mean"
        hidden: int = 0
        dropout: float = 0.0

    def __init__(self, config: Config, width: int):
        super().__init__()
        self.config = config
        for name in ("patch", "predict", "channels", "prefix"):
            if getattr(config, name) < 1:
                raise ValueError(f"head.{name} = {getattr(config, name)}; a series model needs 1 or more")
        if config.predict % config.patch:
            raise ValueError(f"head.predict = {config.predict} is not a multiple of head.patch = {config.patch}")
        if not 0 <= config.dropout < 1:
            raise ValueError(f"head.dropout = {config.dropout}; it takes a number from 0 up to, not including, 1")
        assert config.output is not None
        self.output = outputs.get(config.output.name)(config.output.config)
        features = 2 * config.channels * config.patch + config.known * config.predict
        self.patch = nn.Linear(features, width)
        self.deep = None
        if config.hidden:
            self.deep = nn.Sequential(nn.Linear(features, config.hidden), nn.SiLU(), nn.Linear(config.hidden, width))
        self.drop = nn.Dropout(config.dropout)
        self.out = nn.Linear(width, config.channels * config.predict * self.output.size)
        nn.init.normal_(self.out.weight, std=0.02)
        self.highway = nn.Linear(config.highway, config.predict) if config.highway else None
        if self.highway is not None:
            nn.init.zeros_(self.highway.weight)
            nn.init.zeros_(self.highway.bias)

    @property
    def blocks(self) -> int:
        """Patches of a prediction."""
        return self.config.predict // self.config.patch

    def check(self, inputs: Tensor) -> None:
        rows = self.config.channels + self.config.known * self.blocks
        if inputs.dim() != 4 or inputs.shape[2:] != (rows, self.config.patch):
            raise ValueError(
                f"inputs have shape {tuple(inputs.shape)}; this model takes (rows, patches, {rows}, "
                f"{self.config.patch}): values, then covariates of what is predicted, by steps of a patch"
            )

    # -- in --------------------------------------------------------------------------------------------------------

    def embed(self, inputs: Tensor, ctx: Context, state: Any = None) -> tuple[Tensor, Any]:
        """(B, T, C + K m, P) -> (B, T, width)."""
        values, known = inputs[:, :, : self.config.channels], inputs[:, :, self.config.channels :]
        if state is None:
            location, scale = statistics(values, self.config.statistics, self.config.prefix)
        else:
            location, scale = here(state, values.shape[1])
            state = self._remember(values, state)
        x = normalised(values, location, scale)
        missing = x.isnan()
        x = x.masked_fill(missing, 0).clamp(-FARTHEST, FARTHEST)
        features = torch.cat((x.flatten(2), missing.to(x.dtype).flatten(2), known.flatten(2)), dim=-1)
        h = self.patch(features)
        if self.deep is not None:
            h = h + self.deep(features)
        return self.drop(h), state

    def init_state(self, inputs: Tensor, condition: Any = None, lengths: Tensor | None = None) -> State:
        """Statistics of the history `inputs` (normalise.py); "history" (B, C, highway) its last values; "known"
        (B, M, K, P) the covariates of the M patches that follow, and "fed" (B,), how many of these were."""
        values = inputs[:, :, : self.config.channels]
        state = begin(*statistics(values, self.config.statistics, values.shape[1]))
        rows, config = len(inputs), self.config
        if config.highway:
            state["history"] = values.new_full((rows, config.channels, config.highway), torch.nan)
        known = (condition or {}).get("known")
        if config.known:
            if known is None or not known.shape[1]:
                raise ValueError(f"this model was trained with {config.known} known covariates: give those to come")
            state["known"] = known
        state["fed"] = torch.zeros(rows, dtype=torch.int64, device=inputs.device)
        return state

    def _remember(self, values: Tensor, state: dict) -> dict:
        state = {**state, "place": state["place"] + values.shape[1]}
        if self.config.highway:
            steps = values.transpose(1, 2).flatten(2)  # (B, C, T P)
            state["history"] = torch.cat((state["history"], steps), dim=-1)[..., -self.config.highway :]
        return state

    # -- out -------------------------------------------------------------------------------------------------------

    def loss(self, h: Tensor, batch: Batch) -> Output:
        """Over targets (B, T, C, predict) in the data's units, NaN unscored, from the end of the prefix on."""
        values = batch.inputs[:, :, : self.config.channels]
        location, scale = statistics(values, self.config.statistics, self.config.prefix)
        first = self.config.prefix - 1
        if self.config.statistics == "running":
            location, scale = location[:, first:], scale[:, first:]
        target = normalised(batch.targets[:, first:], location, scale)
        params = self._params(h[:, first:], self._line(self._past(values)[:, first:], location, scale))
        scored = ~target.isnan()
        unit = scale.unsqueeze(-1) if self.config.units == "data" else torch.ones_like(scale).unsqueeze(-1)
        loss = self.output.loss(params, target.masked_fill(~scored, 0), unit.expand_as(target))
        loss = loss.masked_fill(~scored, 0)
        return Output(loss.sum(), scored.sum())

    def _params(self, h: Tensor, line: Tensor | None) -> Tensor:
        """h (B, T, width) -> (B, T, C, predict, size)."""
        shape = (self.config.channels, self.config.predict, self.output.size)
        params = self.out(self.drop(h)).float().unflatten(-1, shape)
        return params if line is None else self.output.shift(params, line)

    def _past(self, values: Tensor) -> Tensor:
        """values (B, T, C, P) -> (B, T, C, highway): the last steps at each patch, NaN before the first."""
        if not self.config.highway:
            return values
        steps = F.pad(values.transpose(1, 2).flatten(2), (self.config.highway - self.config.patch, 0), value=torch.nan)
        return steps.unfold(-1, self.config.highway, self.config.patch).transpose(1, 2)

    def _line(self, past: Tensor, location: Tensor, scale: Tensor) -> Tensor | None:
        if self.highway is None:
            return None
        x = normalised(past, location, scale).clamp(-FARTHEST, FARTHEST)
        if self.config.level == "mean":
            return self.highway(x.nan_to_num(0.0)).float()
        newest = torch.arange(x.shape[-1], device=x.device).masked_fill(x.isnan(), 0).argmax(-1, keepdim=True)
        level = x.gather(-1, newest).nan_to_num(0.0)
        return level + self.highway((x - level).nan_to_num(0.0)).float()

    def logits(self, h_last: Tensor, state: Any) -> Tensor:
        """(B, width) -> (B, C, predict, size), of normalised values."""
        location, scale = last(state)
        line = None
        if self.highway is not None:
            line = self._line(state["history"].unsqueeze(1), location.unsqueeze(1), scale.unsqueeze(1))
        return self._params(h_last.unsqueeze(1), line).squeeze(1)

    def summary(self, params: Tensor, state: Any, levels: list[float]) -> tuple[Tensor, Tensor | None]:
        """Mean (B, C, predict) and quantiles (B, C, predict, Q), in the data's units."""
        location, scale = (x.unsqueeze(-1) for x in last(state))
        quantiles = self.output.quantiles(params, levels)
        if quantiles is not None:
            quantiles = quantiles * scale.unsqueeze(-1) + location.unsqueeze(-1)
        return self.output.mean(params) * scale + location, quantiles

    def draw(self, params: Tensor, state: Any, sampling: Any, generator: Any) -> Tensor:
        """(B, C, predict) in the data's units; temperature 0 draws the mean."""
        location, scale = (x.unsqueeze(-1) for x in last(state))
        drawn = self.output.mean(params) if sampling.temperature == 0 else self.output.draw(params, generator)
        return drawn * scale + location

    def feed(self, values: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Values (B, C, predict) as the inputs of the next m tokens, with the covariates of what comes after them."""
        rows = values.unflatten(-1, (self.blocks, self.config.patch)).transpose(1, 2)
        if self.config.known:
            known = state["known"]
            step = torch.arange(self.blocks, device=values.device)
            place = state["fed"][:, None, None] + 1 + step[:, None] + step  # (B, m, m)
            place = place.clamp(max=known.shape[1] - 1)
            ahead = known[torch.arange(len(known), device=known.device)[:, None, None], place]  # (B, m, m, K, P)
            rows = torch.cat((rows, ahead.transpose(2, 3).flatten(2, 3)), dim=2)
        return rows, {**state, "fed": state["fed"] + self.blocks}

    def sample(self, params: Tensor, state: Any, sampling: Any, generator: Any) -> tuple[Tensor, Any]:
        return self.feed(self.draw(params, state, sampling, generator), state)

    def flops(self, tokens: int) -> int:
        parts = sum(p.weight.numel() for p in self.modules() if isinstance(p, nn.Linear))
        return 2 * tokens * parts
