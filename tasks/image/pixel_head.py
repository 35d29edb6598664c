"""Whole pixels as elements: a token is a pixel, and its sub-pixels are drawn one after another from one hidden state.

    p(image) = prod_t prod_c p(x_tc | x_t'<t, x_tc'<c)

The backbone runs once a pixel instead of once a sub-pixel and remembers the pixels before; what the channels of one
pixel tell of each other goes through a small MLP in front of each channel's softmax (as PixelCNN++, arXiv 1701.05517,
has a linear one). The likelihood is as exact as that of sub-pixels, at a third of the backbone's work an image.

A row of inputs begins with a pixel of `levels` and goes on with the pixels; place t of the row predicts pixel t. A
pixel's neighbours that are known already enter as smooth functions of their values, not as tokens: levels are ordered.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.image.head import MOST_LEVELS, check_values, nearby_places
from tasks.image.orders import ORDERS
from zoo.generation import Sampling, sample_logits
from zoo.layers import Linear, init_normal
from zoo.model import Batch, Context, Head, Output
from zoo.ops import linear_cross_entropy
from zoo.registry import nearest
from zoo.state import State

# (rows up, columns to the left) of the pixels that a token sees, where they come earlier in the order
NEARBY = ((0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, -1), (1, 2), (1, -2), (2, 0), (2, 1), (2, -1), (3, 0))
COARSE, FINE = 5, 7  # octaves in which a value is told to the backbone, and to the next channel of its pixel
WAVES = 32  # half turns over the levels of the finest wave that the softmax's logits are made of, beside free ones


class PixelHead(Head):
    @dataclass
    class Config:
        """height, width, channels  of the image; 0: the task fills them in
        levels   values that a sub-pixel takes
        order    in which the pixels stand; raster, columns, snake, spiral, hilbert, shuffled
        hidden   width of the MLP in front of each channel's softmax; 0: twice the model's
        dropout  on the embedded pixels
        """

        height: int = 0
        width: int = 0
        channels: int = 3
        levels: int = 256
        order: str = "raster"
        hidden: int = 0
        dropout: float = 0.0

        def __post_init__(self):
            if self.order not in ORDERS:
                raise ValueError(f"order = {self.order!r}{nearest(self.order, ORDERS)}")
            for name, least in (("height", 0), ("width", 0), ("channels", 1), ("levels", 2), ("hidden", 0)):
                if getattr(self, name) < least:
                    raise ValueError(f"{name} = {getattr(self, name)}; it takes {least} or more")
            if self.levels > MOST_LEVELS:
                raise ValueError(f"levels = {self.levels}; it takes {MOST_LEVELS} or fewer")
            if not 0 <= self.dropout < 1:
                raise ValueError(f"dropout = {self.dropout}; it takes a number from 0 up to, not including, 1")

        @property
        def elements(self) -> int:
            return self.height * self.width

    places: Tensor  # (T, 2) int64: row and column of each place's pixel
    nearby: Tensor  # (T, K) int64: the input that holds each neighbour; 0, the start, where none is known
    coarse: Tensor  # (levels + 1, 1 + 2 COARSE): a value as functions of it; zeros for the start
    fine: Tensor  # (levels + 1, 1 + 2 FINE)
    waves: Tensor  # (levels, F)

    def __init__(self, config: Config, width: int):
        super().__init__()
        if config.elements < 1:
            raise ValueError(f"head.height = {config.height}, head.width = {config.width}; an image needs 1 or more")
        self.config = config
        order = ORDERS[config.order](config.height, config.width, 1)
        shape, channels = (config.height, config.width), config.channels
        self.register_buffer("places", torch.from_numpy(np.stack(np.unravel_index(order, shape), axis=1)), False)
        nearby = torch.from_numpy(nearby_places(order, (*shape, 1), NEARBY)) + 1  # a pixel is the next input
        self.register_buffer("nearby", nearby, persistent=False)
        self.register_buffer("coarse", functions_of(config.levels, COARSE), persistent=False)
        self.register_buffer("fine", functions_of(config.levels, FINE), persistent=False)
        self.register_buffer("waves", waves_of(config.levels), persistent=False)

        self.positions = nn.ModuleList(nn.Embedding(size, width) for size in shape)
        shown = len(NEARBY) * (channels * self.coarse.shape[1] + 1)
        self.near = nn.Sequential(nn.Linear(shown, width), nn.GELU(), nn.Linear(width, width))
        self.drop = nn.Dropout(config.dropout)
        hidden = config.hidden or 2 * width
        self.up = Linear(width, channels * hidden)
        self.told = nn.ModuleList(Linear(c * self.fine.shape[1], hidden) for c in range(1, channels))
        self.down = nn.ModuleList(Linear(hidden, width) for _ in range(channels))
        self.out = nn.Linear(width, channels * config.levels, bias=False)
        self.smooth = nn.Linear(width, channels * self.waves.shape[1], bias=False)
        nn.init.zeros_(self.smooth.weight)
        init_normal((self.positions, self.near[2], self.up, self.down, self.out), 0.02)

    @property
    def start(self) -> int:
        """Each sub-pixel of the pixel before the first one."""
        return self.config.levels

    def check(self, inputs: Tensor) -> None:
        if inputs.dim() != 3 or inputs.shape[2] != self.config.channels:
            raise ValueError(
                f"inputs of shape {tuple(inputs.shape)}: this model takes pixels, (B, T, {self.config.channels})"
            )
        check_values(inputs, self.config.levels, "value")

    # -- in --------------------------------------------------------------------------------------------------------

    def init_state(self, inputs: Tensor, condition: Any = None, lengths: Tensor | None = None) -> State:
        """place (B,) how many inputs a row has seen; seen (B, T, channels) int16 its inputs so far."""
        if condition is not None:
            raise ValueError("a model of whole pixels is unconditional: it takes no class")
        rows, device = inputs.shape[0], inputs.device
        seen = torch.zeros(rows, self.config.elements, self.config.channels, dtype=torch.int16, device=device)
        return {"place": torch.zeros(rows, dtype=torch.int64, device=device), "seen": seen}

    def embed(self, inputs: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """(B, T, channels) int64 -> (B, T, C)."""
        rows, tokens = inputs.shape[:2]
        if state is None:
            if tokens > self.config.elements:
                raise ValueError(f"a row of {tokens} pixels: an image here has {self.config.elements}")
            place = torch.arange(tokens, device=inputs.device).unsqueeze(0)  # (1, T): all rows begin
            values = inputs[:, self.nearby[:tokens].flatten()]
        else:
            known: Any = state
            place = known["place"].unsqueeze(1) + torch.arange(tokens, device=inputs.device)
            place = place.clamp(max=self.config.elements - 1)
            at = place.unsqueeze(-1).expand(-1, -1, self.config.channels)
            seen = known["seen"].scatter(1, at, inputs.to(torch.int16))
            at = self.nearby[place].flatten(1).unsqueeze(-1).expand(-1, -1, self.config.channels)
            values = seen.gather(1, at).long()
            state = {"place": known["place"] + (tokens if ctx.lengths is None else ctx.lengths), "seen": seen}
        values = values.view(rows, tokens, len(NEARBY) * self.config.channels)
        there = (self.nearby[place] > 0).to(self.coarse.dtype).expand(rows, -1, -1)
        h = self.near(torch.cat((F.embedding(values, self.coarse).flatten(2), there), dim=-1))
        for axis, table in enumerate(self.positions):
            h = h + table(self.places[place, axis])
        return self.drop(h), state

    # -- out -------------------------------------------------------------------------------------------------------

    def loss(self, h: Tensor, batch: Batch) -> Output:
        """Nats, summed over the sub-pixels (B, T, channels): every one is scored, and enters the next channel's
        distribution, so targets take no -100."""
        targets, parts = batch.targets, []
        told = F.embedding(targets, self.fine)
        heads, weights = self.up(h).chunk(self.config.channels, dim=-1), self._weights()
        for channel, weight in enumerate(weights):
            y = self._channel(h, heads[channel], told, channel)
            parts.append(linear_cross_entropy(y, weight, targets[..., channel].contiguous()))
        return Output(torch.stack([loss for loss, _ in parts]).sum(), torch.stack([n for _, n in parts]).sum())

    def _weights(self) -> tuple[Tensor, ...]:
        """Of each channel's softmax, (levels, C): free for each level, plus what neighbouring levels share. A
        distribution around some value is then learned in hundreds of steps, not level by level."""
        parts = self.smooth.weight.chunk(self.config.channels)
        return tuple(
            free + self.waves @ part
            for free, part in zip(self.out.weight.chunk(self.config.channels), parts, strict=True)
        )

    def _channel(self, h: Tensor, inner: Tensor, told: Tensor, channel: int) -> Tensor:
        """h (…, C) and its part of `up` -> what the channel's softmax reads; told (…, channels or fewer, F): the values
        of the channels before."""
        if channel:
            inner = inner + self.told[channel - 1](told[..., :channel, :].flatten(-2))
        return h + self.down[channel](F.gelu(inner)).to(h.dtype)

    def logits(self, h_last: Tensor, state: State | None) -> Tensor:
        """(B, C), the hidden state itself: a channel's logits come from it and the channels drawn before."""
        return h_last

    def sample(self, params: Tensor, state: Any, sampling: Sampling, generator: Any) -> tuple[Tensor, Any]:
        """One pixel (B, 1, channels)."""
        heads, drawn = self.up(params).chunk(self.config.channels, dim=-1), []
        told = self.fine.new_zeros(len(params), self.config.channels, self.fine.shape[1])
        for channel, weight in enumerate(self._weights()):
            y = self._channel(params, heads[channel], told, channel)
            drawn.append(sample_logits(F.linear(y, weight.to(y.dtype)), sampling, generator))
            told = torch.cat((told[:, :channel], self.fine[drawn[-1]].unsqueeze(1), told[:, channel + 1 :]), dim=1)
        return torch.stack(drawn, dim=-1).unsqueeze(1), state

    def coordinates(self, places: Tensor) -> Tensor:
        """(B, T) -> (B, T, 2): row and column of the pixel that comes next."""
        return self.places[places.clamp(max=self.config.elements - 1)]

    def flops(self, tokens: int) -> int:
        parts = (self.near, self.up, self.told, self.down, self.out)  # `smooth` is folded into `out`
        return 2 * tokens * sum(p.numel() for part in parts for p in part.parameters() if p.ndim == 2)


def functions_of(levels: int, octaves: int) -> Tensor:
    """(levels + 1, 1 + 2 octaves): of each value x in (0, 1) itself, scaled to [-1, 1], and the sines and cosines of
    pi x, 2 pi x, 4 pi x, …; zeros for what is no value."""
    x = (torch.arange(levels) + 0.5) / levels
    turns = math.pi * x.unsqueeze(1) * 2.0 ** torch.arange(octaves)
    table = torch.cat((2 * x.unsqueeze(1) - 1, turns.sin(), turns.cos()), dim=1)
    return torch.cat((table, torch.zeros(1, table.shape[1])))


def waves_of(levels: int) -> Tensor:
    """(levels, 1 + 2 W): values scaled to [-1, 1], and sines and cosines of pi k x for k = 1 … W."""
    x = (torch.arange(levels) + 0.5) / levels
    turns = math.pi * x.unsqueeze(1) * torch.arange(1, min(WAVES, levels // 2) + 1)
    return torch.cat((2 * x.unsqueeze(1) - 1, turns.sin(), turns.cos()), dim=1)
