"""Small things that every block needs: rotary positions, token shift, MLP.

Shapes: B batch, T tokens, H or G heads, D head dim, C width.
"""

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.ops.linear import wide_linear
from zoo.ops.mlp import mlp_in_pieces
from zoo.ops.swiglu import swiglu


def apply_rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) of x (B, T, H, D); computed in float32 (or wider), returned in x's dtype."""
    cos, sin = (part.unsqueeze(2) for part in table)  # (B, T, 1, D/2)
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


def token_shift(y: Tensor, keep: Tensor, previous: Tensor | None = None, starts: Tensor | None = None) -> Tensor:
    """keep_t * y_t + (1 - keep_t) * y_{t-1} per head (SPEC 3.2; Forgetting Transformer, arXiv 2503.02130).

    y         (B, T, G, D) projected keys or values
    keep      (B, T, G) in [0, 1], the weight of the token itself
    previous  (B, G, D) the token before the first one; None: zeros
    starts    (T,) bool, True where a packed document begins: nothing is shifted in there
    """
    before = torch.zeros_like(y[:, :1]) if previous is None else previous.unsqueeze(1).to(y.dtype)
    shifted = torch.cat((before, y[:, :-1]), dim=1)
    if starts is not None:
        shifted = shifted.masked_fill(starts[None, :, None, None], 0)
    keep = keep.unsqueeze(-1).to(y.dtype)
    return keep * y + (1 - keep) * shifted


def document_starts(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(T,) bool, True at the first token of each packed document; empty documents leave no mark of their own."""
    marks = torch.zeros(tokens + 1, dtype=torch.bool, device=cu_seqlens.device)
    return marks.index_fill(0, cu_seqlens.long(), True)[:tokens]


def document_positions(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(T,) int64: each token's place in its packed document."""
    place = torch.arange(tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens.long(), place, right=True) - 1
    return place - cu_seqlens.long()[document]


def init_normal(parts: Iterable[nn.Module | None], std: float) -> None:
    """N(0, std^2) for the weights of every linear layer and embedding in `parts`; biases stay as they are."""
    for part in filter(None, parts):
        for module in part.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)


class Linear(nn.Linear):
    """Without a bias; under autocast the weight's gradient stays float32 (zoo.ops.wide_linear)."""

    def __init__(self, inner: int, outer: int):
        super().__init__(inner, outer, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return wide_linear(x, self.weight)


class MLP(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202) or GELU; (…, C) -> (…, C)."""

    def __init__(self, width: int, hidden: int, kind: Literal["swiglu", "gelu"]):
        super().__init__()
        self.gated = kind == "swiglu"
        self.up = Linear(width, 2 * hidden if self.gated else hidden)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor, chunk: int = 0) -> Tensor:
        """chunk: tokens of each row at once, recomputed in the backward pass; 0: all, kept for it."""
        if chunk:
            return mlp_in_pieces(x, self.up.weight, self.down.weight, tokens=chunk, gated=self.gated)
        if self.gated:
            return self.down(swiglu(self.up(x)))
        return self.down(F.gelu(self.up(x)))

    def flops(self, tokens: int) -> int:
        return 2 * tokens * (self.up.weight.numel() + self.down.weight.numel())


class PassOn(nn.Identity):
    """In the place of an MLP: the block then adds its normalised input once more (Zoology's identity state mixer)."""

    def flops(self, tokens: int) -> int:
        return 0
