"""What is predicted of each value: quantiles, a mixture of Student's t, or a point.

An output turns parameters (…, size) of normalised values into a loss (…), a mean, quantiles, and draws.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import Registry

outputs = Registry("output")


class Predicted(Protocol):
    """size: parameters a value. `scale` (broadcast to the targets): what normalised units are in the units in which the
    loss is to count; likelihoods ignore it."""

    Config: ClassVar[type]
    size: int

    def shift(self, params: Tensor, line: Tensor) -> Tensor:
        """Move the distribution by `line` (…)."""
        ...

    def loss(self, params: Tensor, target: Tensor, scale: Tensor) -> Tensor: ...

    def mean(self, params: Tensor) -> Tensor: ...

    def quantiles(self, params: Tensor, levels: list[float]) -> Tensor | None:
        """(…, Q), rising; None where there is no distribution."""
        ...

    def draw(self, params: Tensor, generator: Any) -> Tensor: ...


def nine() -> list[float]:
    return [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def check_levels(levels: list[float]) -> None:
    if not levels or sorted(set(levels)) != list(levels) or not 0 < levels[0] <= levels[-1] < 1:
        raise ValueError(f"levels = {levels}; they take rising numbers between 0 and 1, such as {nine()}")


def pinball(quantiles: Tensor, target: Tensor, levels: Tensor | float) -> Tensor:
    """quantiles (…, Q), target (…), levels (Q,) or one -> (…, Q): twice the pinball loss, absolute error at 0.5."""
    below = target.unsqueeze(-1) - quantiles
    return 2 * torch.maximum(levels * below, (levels - 1) * below)


def quantiles_of(draws: Tensor, levels: list[float]) -> Tensor:
    """draws (…, N) -> (…, Q), on lines between neighbours: the i-th of N, counted from 1, stands at level i / (N + 1).
    So nine quantiles at 0.1, 0.2 … keep their levels, and pooling them again and again does not narrow them."""
    rising, count = draws.sort(-1).values, draws.shape[-1]
    place = (draws.new_tensor(levels) * (count + 1) - 1).clamp(0, count - 1)
    left = place.floor().long().clamp(max=max(0, count - 2))
    right = (left + 1).clamp(max=draws.shape[-1] - 1)
    return torch.lerp(rising[..., left], rising[..., right], place - left)


@outputs.register("quantiles")
class Quantiles(nn.Module):
    """Quantile regression (Koenker and Bassett, 1978), and by its side the mean by squared error."""

    @dataclass
    class Config:
        """mean  weight of the squared error of the mean beside the mean pinball loss; 0: the point is the median"""

        levels: list[float] = field(default_factory=nine)
        mean: float = 0.0

        def __post_init__(self):
            check_levels(self.levels)
            if self.mean < 0:
                raise ValueError(f"mean = {self.mean}; it takes 0 or more")

    levels: Tensor

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.size = len(config.levels) + (config.mean > 0)
        # On the device once: a step that is recorded (zoo/train/graph.py) takes nothing from the host
        self.register_buffer("levels", torch.tensor(config.levels), persistent=False)

    def shift(self, params: Tensor, line: Tensor) -> Tensor:
        return params + line.unsqueeze(-1)

    def loss(self, params: Tensor, target: Tensor, scale: Tensor) -> Tensor:
        params, target = params * scale.unsqueeze(-1), target * scale
        count = len(self.config.levels)
        loss = pinball(params[..., :count], target, self.levels.to(params)).mean(-1)
        if self.config.mean:
            loss = loss + self.config.mean * (params[..., count] - target).square()
        return loss

    def mean(self, params: Tensor) -> Tensor:
        if self.config.mean:
            return params[..., -1]
        return self.quantiles(params, [0.5])[..., 0]

    def quantiles(self, params: Tensor, levels: list[float]) -> Tensor:
        """Those that are not predicted lie on the line between their neighbours, beyond the outermost on those."""
        rising = params[..., : len(self.config.levels)].sort(-1).values
        if list(levels) == list(self.config.levels):
            return rising
        return torch.stack([self._at(rising, params.new_tensor(level)) for level in levels], dim=-1)

    def draw(self, params: Tensor, generator: Any) -> Tensor:
        rising = params[..., : len(self.config.levels)].sort(-1).values
        return self._at(rising, torch.rand(params.shape[:-1], generator=generator, device=params.device))

    def _at(self, rising: Tensor, level: Tensor) -> Tensor:
        known = self.levels.to(rising)
        if len(known) == 1:
            return rising[..., 0]
        level = level.expand(rising.shape[:-1]).contiguous()
        right = torch.searchsorted(known, level).clamp(1, len(known) - 1)
        share = ((level - known[right - 1]) / (known[right] - known[right - 1])).clamp(0, 1)
        low, high = (rising.gather(-1, place.unsqueeze(-1)).squeeze(-1) for place in (right - 1, right))
        return low + share * (high - low)


@outputs.register("student_t")
class StudentT:
    """A mixture of Student's t distributions (as in Moirai, arXiv 2402.02592), by its negative log-likelihood in nats
    of normalised values. Quantiles are those of `draws` draws with a seed of their own."""

    @dataclass
    class Config:
        components: int = 3
        draws: int = 256

        def __post_init__(self):
            if self.components < 1 or self.draws < 2:
                raise ValueError("student_t takes components >= 1 and draws >= 2")

    def __init__(self, config: Config):
        self.config = config
        self.size = 4 * config.components

    def _parts(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weight, location, scale, freedom = params.unflatten(-1, (4, self.config.components)).unbind(-2)
        return weight.log_softmax(-1), location, F.softplus(scale) + 1e-3, 2 + F.softplus(freedom)

    def shift(self, params: Tensor, line: Tensor) -> Tensor:
        parts = params.unflatten(-1, (4, self.config.components))
        moved = torch.zeros(4, 1, device=params.device, dtype=params.dtype)
        moved[1].fill_(1)
        return (parts + moved * line[..., None, None]).flatten(-2)

    def loss(self, params: Tensor, target: Tensor, scale: Tensor) -> Tensor:
        weight, location, spread, freedom = self._parts(params)
        z = (target.unsqueeze(-1) - location) / spread
        log_density = (
            torch.lgamma((freedom + 1) / 2)
            - torch.lgamma(freedom / 2)
            - 0.5 * torch.log(math.pi * freedom)
            - spread.log()
            - (freedom + 1) / 2 * torch.log1p(z.square() / freedom)
        )
        return -(weight + log_density).logsumexp(-1)

    def mean(self, params: Tensor) -> Tensor:
        weight, location, _, _ = self._parts(params)
        return (weight.exp() * location).sum(-1)

    def quantiles(self, params: Tensor, levels: list[float]) -> Tensor:
        generator = torch.Generator(params.device).manual_seed(0)
        draws = torch.stack([self.draw(params, generator) for _ in range(self.config.draws)], dim=-1)
        return quantiles_of(draws, levels)

    def draw(self, params: Tensor, generator: Any) -> Tensor:
        weight, location, spread, freedom = self._parts(params)
        noise = torch.empty_like(weight).exponential_(generator=generator).clamp_(min=1e-30)
        which = (weight.exp() / noise).argmax(-1, keepdim=True)
        location, spread, freedom = (x.gather(-1, which).squeeze(-1) for x in (location, spread, freedom))
        # Bailey's polar method (1994): t = r cos(2 pi v) with r^2 = f (u^(-2/f) - 1); takes a generator, unlike gamma
        u, v = (torch.rand(location.shape, generator=generator, device=params.device) for _ in range(2))
        radius = (freedom * torch.expm1(-2 / freedom * u.clamp(min=1e-12).log())).sqrt()
        return location + spread * radius * torch.cos(2 * math.pi * v)


@outputs.register("point")
class Point:
    """One number, by squared, absolute or Huber error."""

    @dataclass
    class Config:
        error: Literal["squared", "absolute", "huber"] = "squared"

    def __init__(self, config: Config):
        self.config = config
        self.size = 1

    def shift(self, params: Tensor, line: Tensor) -> Tensor:
        return params + line.unsqueeze(-1)

    def loss(self, params: Tensor, target: Tensor, scale: Tensor) -> Tensor:
        guess, target = params[..., 0] * scale, target * scale
        if self.config.error == "squared":
            return (guess - target).square()
        if self.config.error == "absolute":
            return (guess - target).abs()
        return F.huber_loss(guess, target, reduction="none")

    def mean(self, params: Tensor) -> Tensor:
        return params[..., 0]

    def quantiles(self, params: Tensor, levels: list[float]) -> None:
        return None

    def draw(self, params: Tensor, generator: Any) -> Tensor:
        return params[..., 0]
