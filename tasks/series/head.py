"""Patches in, the distribution of the values of the next patches out.

A patch is normalised with statistics that do not look ahead (normalise.py), missing values become 0 with a flag of
their own, and a linear layer, with a residual MLP if asked for, makes a token of it. From a token's hidden state a
linear layer predicts the following `predict` steps. Beside it may run a linear highway: an autoregression on the last
values themselves, for which attention over tokens is a roundabout way (LSTNet, arXiv 1703.07015, section 3.6); and a
prediction may start from copies of what stood a season or more before, among which the hidden state chooses (a pointer
into the past, as See et al., arXiv 1704.04368, have for words).
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.series.normalise import Scaling, begin, here, last, normalised, seasonal_unit, statistics
from tasks.series.outputs import outputs
from zoo import config as configs
from zoo.config import Choice
from zoo.model import Batch, Context, Head, Output
from zoo.state import State

FARTHEST = 30.0  # deviations; inputs beyond are cut, so that a spike after a calm past does not drown the rest


class SeriesHead(Head):
    copied: Tensor

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
                   arXiv 2205.13504), which follows a level that moves while a forecast is rolled; with lags the copies
                   stand for the level
        lags       steps after which series repeat themselves, such as [24, 168]; none: []. A prediction is then
                   around a mixture of the values so long before (or a multiple of it), weighed for each step by the
                   hidden state; in units of the mean error that a copy with the first lag makes, in which a normalised
                   loss counts; and tokens hold the differences to these values, too. For series that repeat themselves
                   more closely than their deviation tells, and data too few to learn copying from
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
        lags: list[int] = field(default_factory=list)
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
        if config.lags and not (min(config.lags) >= 1 and config.lags[0] < config.prefix * config.patch):
            raise ValueError(
                f"head.lags = {config.lags}; they take 1 or more, and the first must be less than the steps before the "
                f"first scored prediction, head.prefix * head.patch = {config.prefix * config.patch}"
            )
        assert config.output is not None
        self.output = outputs.get(config.output.name)(config.output.config)
        features = (2 + len(config.lags)) * config.channels * config.patch + config.known * config.predict
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

        self.choice = nn.Linear(width, config.channels * config.predict * len(config.lags)) if config.lags else None
        if self.choice is not None:
            nn.init.zeros_(self.choice.weight)
            nn.init.zeros_(self.choice.bias)
            ahead = torch.arange(config.predict)
            copied = torch.stack([self.reach - lag + ahead % lag for lag in config.lags])  # (K, predict)
            self.register_buffer("copied", copied, persistent=False)  # places in the past

    @property
    def reach(self) -> int:
        """Steps of the past that predictions look at directly."""
        return max(self.config.highway, *self.config.lags, 0)

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
        history = None
        if state is None:
            scaling = self._scaling(values, self.config.prefix)
        else:
            scaling, history = here(state, values.shape[1]), state.get("history")
            state = self._remember(values, state)
        x = normalised(values, scaling.location, scaling.scale)
        missing = x.isnan()
        x = x.masked_fill(missing, 0).clamp(-FARTHEST, FARTHEST)
        shown = [x, missing.to(x.dtype), *self._differences(values, history, scaling.unit), known]
        features = torch.cat([part.flatten(2) for part in shown], dim=-1)
        h = self.patch(features)
        if self.deep is not None:
            h = h + self.deep(features)
        return self.drop(h), state

    def init_state(self, inputs: Tensor, condition: Any = None, lengths: Tensor | None = None) -> State:
        """Statistics of the history `inputs` (normalise.py); "history" (B, C, reach) its last values; "known"
        (B, M, K, P) the covariates of the M patches that follow, and "fed" (B,), how many of these were."""
        values = inputs[:, :, : self.config.channels]
        state = begin(self._scaling(values, values.shape[1]))
        rows, config = len(inputs), self.config
        if self.reach:
            state["history"] = values.new_full((rows, config.channels, self.reach), torch.nan)
        known = (condition or {}).get("known")
        if config.known:
            if known is None or not known.shape[1]:
                raise ValueError(f"this model was trained with {config.known} known covariates: give those to come")
            state["known"] = known
        state["fed"] = torch.zeros(rows, dtype=torch.int64, device=inputs.device)
        return state

    def _remember(self, values: Tensor, state: dict) -> dict:
        state = {**state, "place": state["place"] + values.shape[1]}
        if self.reach:
            steps = values.transpose(1, 2).flatten(2)  # (B, C, T P)
            state["history"] = torch.cat((state["history"], steps), dim=-1)[..., -self.reach :]
        return state

    def _scaling(self, values: Tensor, prefix: int) -> Scaling:
        over = self.config.statistics
        location, scale = statistics(values, over, prefix)
        if not self.config.lags:
            return Scaling(location, scale, scale)
        return Scaling(location, scale, seasonal_unit(values, self.config.lags[0], over, prefix, scale))

    def _differences(self, values: Tensor, history: Tensor | None, unit: Tensor) -> list[Tensor]:
        """values (B, T, C, P) after `history` (B, C, reach) -> for each lag what has changed since, (B, T, C, P)."""
        if not self.config.lags:
            return []
        steps = values.transpose(1, 2).flatten(2)
        before = steps.new_full((*steps.shape[:2], self.reach), torch.nan) if history is None else history
        whole, found = torch.cat((before, steps), dim=-1), []
        for lag in self.config.lags:
            apart = steps - whole[..., self.reach - lag : whole.shape[-1] - lag]
            apart = apart.unflatten(-1, (-1, self.config.patch)).transpose(1, 2) / unit.unsqueeze(-1)
            found.append(apart.nan_to_num(0.0).clamp(-FARTHEST, FARTHEST))
        return found

    # -- out -------------------------------------------------------------------------------------------------------

    def loss(self, h: Tensor, batch: Batch) -> Output:
        """Over targets (B, T, C, predict) in the data's units, NaN unscored, from the end of the prefix on."""
        values, first = batch.inputs[:, :, : self.config.channels], self.config.prefix - 1
        scaling = self._scaling(values, self.config.prefix)
        if self.config.statistics == "running":
            scaling = Scaling(*(x[:, first:] for x in scaling))
        target = normalised(batch.targets[:, first:], scaling.location, scaling.unit)
        params = self._params(h[:, first:], self._past(values)[:, first:], scaling)
        scored = ~target.isnan()
        unit = (scaling.unit if self.config.units == "data" else torch.ones_like(scaling.unit)).unsqueeze(-1)
        loss = self.output.loss(params, target.masked_fill(~scored, 0), unit.expand_as(target))
        loss = loss.masked_fill(~scored, 0)
        return Output(loss.sum(), scored.sum())

    def _params(self, h: Tensor, past: Tensor, scaling: Scaling) -> Tensor:
        """h (B, T, width), past (B, T, C, reach) -> (B, T, C, predict, size), of (y - location) / unit."""
        shape = (self.config.channels, self.config.predict, self.output.size)
        h = self.drop(h)
        params = self.out(h).float().unflatten(-1, shape)
        if not self.reach:
            return params
        x = normalised(past, scaling.location, scaling.scale).clamp(-FARTHEST, FARTHEST)
        line = torch.zeros_like(params[..., 0])
        if self.choice is not None:
            line = line + self._copies(self.choice(h).float(), x)
        if self.highway is not None:
            line = line + self._line(self.highway, x[..., self.reach - self.config.highway :])
        return self.output.shift(params, line * (scaling.scale / scaling.unit).unsqueeze(-1))

    def _past(self, values: Tensor) -> Tensor:
        """values (B, T, C, P) -> (B, T, C, reach): the last steps at each patch, NaN before the first."""
        if not self.reach:
            return values[..., :0]
        steps = F.pad(values.transpose(1, 2).flatten(2), (self.reach - self.config.patch, 0), value=torch.nan)
        return steps.unfold(-1, self.reach, self.config.patch).transpose(1, 2)

    def _copies(self, weight: Tensor, x: Tensor) -> Tensor:
        """x (B, T, C, reach), weight (B, T, C predict K) before a softmax over the K copies that are there ->
        (B, T, C, predict)."""
        copies = x[..., self.copied]  # (B, T, C, K, predict)
        missing = copies.isnan()
        weight = weight.unflatten(-1, (x.shape[2], *self.copied.shape))
        weight = weight.masked_fill(missing, torch.finfo(weight.dtype).min).softmax(-2)
        return (weight * copies.masked_fill(missing, 0)).sum(-2)

    def _line(self, highway: nn.Linear, x: Tensor) -> Tensor:
        """x (B, T, C, highway) -> (B, T, C, predict)."""
        if self.config.level == "mean":
            return highway(x.nan_to_num(0.0)).float()
        newest = torch.arange(x.shape[-1], device=x.device).masked_fill(x.isnan(), 0).argmax(-1, keepdim=True)
        level = x.gather(-1, newest).nan_to_num(0.0)
        change = highway((x - level).nan_to_num(0.0)).float()
        return change if self.config.lags else level + change

    def logits(self, h_last: Tensor, state: Any) -> Tensor:
        """(B, width) -> (B, C, predict, size), of (y - location) / unit."""
        scaling = last(state)
        past = state["history"] if self.reach else h_last.new_zeros(0)
        return self._params(h_last.unsqueeze(1), past.unsqueeze(1), scaling).squeeze(1)

    def summary(self, params: Tensor, state: Any, levels: list[float]) -> tuple[Tensor, Tensor | None]:
        """Mean (B, C, predict) and quantiles (B, C, predict, Q), in the data's units."""
        location, _, unit = (x[:, 0].unsqueeze(-1) for x in last(state))
        quantiles = self.output.quantiles(params, levels)
        if quantiles is not None:
            quantiles = quantiles * unit.unsqueeze(-1) + location.unsqueeze(-1)
        return self.output.mean(params) * unit + location, quantiles

    def draw(self, params: Tensor, state: Any, sampling: Any, generator: Any) -> Tensor:
        """(B, C, predict) in the data's units; temperature 0 draws the mean."""
        location, _, unit = (x[:, 0].unsqueeze(-1) for x in last(state))
        drawn = self.output.mean(params) if sampling.temperature == 0 else self.output.draw(params, generator)
        return drawn * unit + location

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
