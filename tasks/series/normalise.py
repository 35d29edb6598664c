"""Instance normalisation that never looks ahead, and what a head remembers of it while a forecast rolls on.

Statistics of a row come from its first patches, which are then left out of the loss ("prefix": all positions share
them; RevIN's look-back, Kim et al., ICLR 2022), or at each patch from what there is up to it ("running"). A forecast
keeps those of the end of its history, however far it rolls.

Shapes: B rows, T patches, C values a step, P steps a patch. NaN is a missing value.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.state import State

Kind = Literal["standard", "mean_abs"]
Over = Literal["prefix", "running"]
LEAST = 0.02  # of the deviation, that a seasonal unit has


def statistics(values: Tensor, over: Over, prefix: int, kind: Kind = "standard") -> tuple[Tensor, Tensor]:
    """values (B, T, C, P) -> (location, scale), each (B, 1 or T, C) float32.

    standard: mean and population deviation; mean_abs: 0 and the mean of absolute values (Chronos, arXiv 2403.07815).
    A scale of nothing, a constant or missing past, is 1.
    """
    values = values[:, :prefix] if over == "prefix" else values
    there = ~values.isnan()
    wide = values.masked_fill(~there, 0).double()
    # Squares are taken around the first value there is, or a large mean would drown the deviation.
    flat, flat_there = wide.movedim(2, 1).flatten(2), there.movedim(2, 1).flatten(2)  # (B, C, T P)
    origin = flat.gather(-1, flat_there.int().argmax(-1, keepdim=True)) * (kind == "standard")
    wide = (wide - origin.unsqueeze(1)).masked_fill(~there, 0)
    count, total = there.sum(-1).double(), wide.abs().sum(-1) if kind == "mean_abs" else wide.sum(-1)
    squares = wide.square().sum(-1)
    if over == "prefix":
        count, total, squares = (x.sum(1, keepdim=True) for x in (count, total, squares))
    else:
        count, total, squares = (x.cumsum(1) for x in (count, total, squares))
    mean = total / count.clamp(min=1)
    if kind == "mean_abs":
        location, scale = torch.zeros_like(mean), mean
    else:
        location = torch.where(count > 0, mean + origin.squeeze(-1).unsqueeze(1), 0)
        scale = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
    nothing = scale <= 1e-6 * location.abs() + 1e-12
    return location.float(), torch.where(nothing, 1.0, scale).float()


def normalised(values: Tensor, location: Tensor, scale: Tensor) -> Tensor:
    """values (B, T, C, P), statistics (B, 1 or T, C); NaN stays."""
    return (values - location.unsqueeze(-1)) / scale.unsqueeze(-1)


def seasonal_unit(values: Tensor, lag: int, over: Over, prefix: int, scale: Tensor) -> Tensor:
    """values (B, T, C, P) -> (B, 1 or T, C) float32: the mean of |y(t) - y(t - lag)| over what is there, which is what
    a seasonal naive forecast is off by and what MASE divides by.

    At least LEAST of `scale`, or a series that repeated itself exactly would have no bounds for what it does next; and
    `scale` where there are no two such values.
    """
    values = values[:, :prefix] if over == "prefix" else values
    steps = values.transpose(1, 2).flatten(2).double()  # (B, C, T P)
    apart = (steps - F.pad(steps, (lag, 0), value=torch.nan)[..., : steps.shape[-1]]).abs()
    there = ~apart.isnan()
    count, total = there.cumsum(-1), apart.masked_fill(~there, 0).cumsum(-1)
    ends = slice(values.shape[-1] - 1, None, values.shape[-1])  # of patches
    count, total = (x[..., ends].transpose(1, 2) for x in (count, total))
    if over == "prefix":
        count, total = count[:, -1:], total[:, -1:]
    error = (total / count.clamp(min=1)).float()
    return torch.where(count > 0, torch.maximum(error, LEAST * scale), scale)


# ---------------------------------------------------------------------------------------------------------------------
# State: {"location", "scale", "unit" (B, N, C): of each patch of the history, the last one for all that follow;
# "place" (B,)}


class Scaling(NamedTuple):
    """What inputs are normalised by, and the unit in which predictions are made; each (B, N, C)."""

    location: Tensor
    scale: Tensor
    unit: Tensor


def begin(scaling: Scaling) -> dict[str, State]:
    location, scale, unit = (x.contiguous() for x in scaling)
    return {
        "location": location,
        "scale": scale,
        "unit": unit,
        "place": torch.zeros(len(location), dtype=torch.int64, device=location.device),
    }


def here(state: dict, tokens: int) -> Scaling:
    """Of the next so many patches, each (B, tokens, C)."""
    location = state["location"]
    place = state["place"].unsqueeze(1) + torch.arange(tokens, device=location.device)
    index = place.clamp(max=location.shape[1] - 1).unsqueeze(-1).expand(-1, -1, location.shape[2])
    return Scaling(*(state[name].gather(1, index) for name in Scaling._fields))


def last(state: dict) -> Scaling:
    """What holds while the forecast rolls, each (B, 1, C)."""
    return Scaling(*(state[name][:, -1:] for name in Scaling._fields))
