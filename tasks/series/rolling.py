"""One model for every horizon: its own forecast is fed back, on a state whose size does not grow.

How the uncertainty of what was fed back is carried on:
    point      it is not: one path, of means; intervals are those of a prediction from it
    quantiles  one path for the mean and one for each level; what the paths predict is pooled, and its quantiles go on
    samples    paths are drawn; quantiles are those of the paths
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tasks.series.outputs import quantiles_of
from zoo.generation import Sampling, prefill
from zoo.model import Batch, Context, Model
from zoo.state import repeat

Mode = Literal["point", "quantiles", "samples"]
ROWS_ON_CPU = 512  # that are rolled at once there, so that what is worked on stays in the caches


@dataclass
class Forecast:
    """mean (R, C, horizon); quantiles (R, C, horizon, Q) at `levels`, or None from a model of points."""

    mean: Tensor
    quantiles: Tensor | None
    levels: list[float]


@torch.no_grad()
def roll(
    model: Model,
    batch: Batch,
    horizon: int,
    *,
    levels: list[float],
    mode: Mode = "quantiles",
    samples: int = 100,
    seed: int = 0,
) -> Forecast:
    """Forecast `horizon` steps after the histories of `batch`; the model in eval mode, batch on its device.

    levels   for mode quantiles evenly spaced around 0.5, for the paths of all levels count alike
    samples  paths of mode samples
    """
    if horizon < 1:
        raise ValueError(f"horizon = {horizon}; it takes 1 or more steps")
    generator = torch.Generator(batch.inputs.device).manual_seed(seed)
    whole = len(batch.inputs)
    each = min(whole, ROWS_ON_CPU) if batch.inputs.device.type == "cpu" else whole
    pieces = [_rows(batch, slice(begin, begin + each)) for begin in range(0, whole, each)]
    return _joined([_roll(model, piece, horizon, levels, mode, samples, generator) for piece in pieces])


def _rows(batch: Batch, rows: slice) -> Batch:
    """Of a batch to forecast: inputs, lengths and known covariates."""
    lengths = batch.ctx.lengths
    ctx = batch.ctx if lengths is None else replace(batch.ctx, lengths=lengths[rows])
    known = (batch.condition or {}).get("known")
    return Batch(batch.inputs[rows], condition=None if known is None else {"known": known[rows]}, ctx=ctx)


def _joined(parts: list[Forecast]) -> Forecast:
    if len(parts) == 1:
        return parts[0]
    quantiles = [part.quantiles for part in parts if part.quantiles is not None]
    return Forecast(
        torch.cat([part.mean for part in parts]), torch.cat(quantiles) if quantiles else None, parts[0].levels
    )


def _roll(
    model: Model, batch: Batch, horizon: int, levels: list[float], mode: Mode, samples: int, generator: torch.Generator
) -> Forecast:
    head: Any = model.head
    rows, tokens = batch.inputs.shape[:2]
    steps = -(-horizon // head.config.predict)
    blocks = head.config.predict // head.config.patch
    cache: Any = model.backbone.init_cache(rows, tokens + blocks * (steps - 1))
    state: Any = head.init_state(batch.inputs, batch.condition, batch.ctx.lengths)
    h, cache, state = prefill(model, batch, cache, state, 2048)

    means, quantiles, drawn = [], [], []
    several = {"point": 1, "quantiles": 1 + len(levels), "samples": samples}[mode]
    paths = 1
    for step in range(steps):
        params = head.logits(h, state)
        if mode == "samples":
            if paths < several:
                params = params.repeat_interleave(several, dim=0)
                cache, state, paths = repeat(cache, several), repeat(state, several), several
            fed = head.draw(params, state, Sampling(), generator)
            drawn.append(fed.unflatten(0, (rows, paths)))
        else:
            mean, spread = head.summary(params, state, levels)
            if paths > 1 and spread is not None:
                mean = mean.unflatten(0, (rows, paths))[:, 0]
                spread = pooled(spread.unflatten(0, (rows, paths))[:, 1:], levels)
            means.append(mean)
            quantiles.append(spread)
            if mode == "quantiles" and spread is not None and step + 1 < steps:
                fed = torch.cat((mean.unsqueeze(1), spread.movedim(-1, 1)), dim=1).flatten(0, 1)
                if paths == 1:
                    cache, state, paths = repeat(cache, several), repeat(state, several), several
            else:
                fed = mean
        if step + 1 < steps:
            inputs, state = head.feed(fed, state)
            hidden, state = head.embed(inputs, Context(), state)
            hidden, cache = model.backbone(hidden, Context(), cache)
            h = hidden[:, -1]

    if mode == "samples":
        whole = torch.cat(drawn, dim=-1)[..., :horizon].float()  # (R, S, C, H)
        return Forecast(whole.mean(1), quantiles_of(whole.movedim(1, -1), levels), levels)
    known = [spread for spread in quantiles if spread is not None]
    together = torch.cat(known, dim=-2)[:, :, :horizon] if known else None
    return Forecast(torch.cat(means, dim=-1)[..., :horizon], together, levels)


def pooled(spread: Tensor, levels: list[float]) -> Tensor:
    """(R, Q paths, C, steps, Q) -> (R, C, steps, Q): the quantiles of all paths' quantiles."""
    everything = spread.movedim(1, -1).flatten(-2)
    return quantiles_of(everything, levels)
