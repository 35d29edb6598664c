"""BaseConv (Arora et al., "Zoology", arXiv 2312.04927): a short causal convolution, gated by a projection.

    y_t = (c + sum_{i=0..k-1} f_i * x_{t-i}) * (x_t W + b) + x_t        (* elementwise, one filter f a channel)

The simplest mixer that compares a token with its neighbours: in front of another mixer it binds each value to the key
before it. Its state is the last k - 1 inputs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.layers import document_positions, init_normal
from zoo.mixers.base import Context, Dims, Mixer
from zoo.mixers.cache import take
from zoo.registry import mixers
from zoo.state import State


@mixers.register("baseconv")
class BaseConv(Mixer):
    @dataclass
    class Config:
        """kernel_size: how many tokens the filter spans, the token itself included."""

        kernel_size: int = 3

        def __post_init__(self):
            if self.kernel_size < 1:
                raise ValueError(f"kernel_size = {self.kernel_size}; it counts the token itself: 1 or more")

    reach: int

    def __init__(self, config: Config, dims: Dims):
        super().__init__()
        self.width, self.taps = dims.width, config.kernel_size
        self.reach = config.kernel_size - 1
        self.projection = nn.Linear(dims.width, dims.width)
        init_normal((self.projection,), dims.init_std)
        nn.init.zeros_(self.projection.bias)
        bound = config.kernel_size**-0.5  # as nn.Conv1d begins with one channel a group
        self.filter = nn.Parameter(torch.empty(dims.width, self.taps).uniform_(-bound, bound))  # [:, i] for x_{t-i}
        self.filter_bias = nn.Parameter(torch.empty(dims.width).uniform_(-bound, bound))

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        convolved = self._convolve(x, ctx, state)
        return (convolved * self.projection(x) + x).to(x.dtype), state

    def _convolve(self, x: Tensor, ctx: Context, state: Any) -> Tensor:
        """Sums of shifted copies: for a few taps no slower than a convolution, and it fuses with what is around it."""
        tokens = x.shape[1]
        tail = x.new_zeros(x.shape[0], self.reach, self.width) if state is None else state["tail"].to(x.dtype)
        longer = torch.cat((tail, x), dim=1)  # (B, k - 1 + T, C)
        place = None if ctx.cu_seqlens is None else document_positions(ctx.cu_seqlens, tokens)
        y = self.filter_bias + self.filter[:, 0] * x
        for i in range(1, self.taps):
            shifted = longer[:, self.reach - i : self.reach - i + tokens]
            if place is not None:  # nothing comes in from the document before
                shifted = shifted.masked_fill((place < i)[None, :, None], 0)
            y = y + self.filter[:, i] * shifted
        if state is not None:
            state["tail"].copy_(self._last(longer, ctx, tokens))
        return y

    def _last(self, longer: Tensor, ctx: Context, tokens: int) -> Tensor:
        """The last k - 1 inputs of each row's valid tokens."""
        if ctx.lengths is None:
            return longer[:, tokens:]
        return take(longer, ctx.lengths.unsqueeze(1) + torch.arange(self.reach, device=longer.device))

    def init_state(self, batch: int, max_len: int, *, device: Any, dtype: Any) -> State:
        return {"tail": torch.zeros(batch, self.reach, self.width, device=device, dtype=dtype)}

    def flops(self, tokens: int) -> int:
        return 2 * tokens * (self.projection.weight.numel() + self.filter.numel())

    def state_bytes(self, tokens: int, element_size: int = 2) -> int:
        return self.reach * self.width * element_size
