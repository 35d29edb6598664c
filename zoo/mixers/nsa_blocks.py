"""The compressed blocks of an NSA layer: made of their tokens, written into the state as these come, and counted."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.mixers.cache import take


class BlockMLP(nn.Module):
    """A block's mean plus an MLP of all of it, in-block positions added; (B, M, block, G, D) -> (B, M, G, D)."""

    def __init__(self, block: int, head_dim: int):
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(block, 1, head_dim))
        self.up = nn.Linear(block * head_dim, head_dim, bias=False)
        self.down = nn.Linear(head_dim, head_dim, bias=False)

    def forward(self, blocks: Tensor) -> Tensor:
        placed = (blocks + self.positions.to(blocks.dtype)).transpose(2, 3).flatten(3)
        return blocks.mean(2) + self.down(F.gelu(self.up(placed)))


def mean_of_blocks(x: Tensor) -> Tensor:
    """(B, M, block, G, D) to (B, M, G, D), summed in float32 at least."""
    return x.mean(2, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


def put_blocks(
    cache: Any,
    past: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    start: Tensor,
    lengths: Tensor | None,
    step: int,
    compress: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Write into `cache` (k, v (B, slots, G, D)) the compressed blocks that the new tokens complete, one per `step` at
    most.

    past      keys and values of the tokens before, one less than a block holds (B, block - 1, G, D)
    new       those of the call (B, T, G, D), of which `lengths` (B,) count; start (B,) tokens came before
    compress  (k, v) (B, M, block, G, D) -> (B, M, G, D) each
    """
    (batch, tokens), length, slots = new[0].shape[:2], past[0].shape[1] + 1, cache["k"].shape[1]
    count = min(-(-tokens // step), slots)
    if count == 0:
        return
    device = start.device
    end = start + (tokens if lengths is None else lengths)
    complete = (torch.div(start - length, step, rounding_mode="floor") + 1).clamp(min=0)  # before this call
    block = complete.unsqueeze(1) + torch.arange(count, device=device)  # (B, count)
    first = block * step - start.unsqueeze(1) + length - 1  # in past and chunk together
    place = (first.unsqueeze(-1) + torch.arange(length, device=device)).clamp(0, length + tokens - 2).flatten(1)
    gathered = (
        take(torch.cat((old.to(fresh.dtype), fresh), dim=1), place).unflatten(1, (count, length))
        for old, fresh in zip(past, new, strict=True)
    )
    made = (block * step + length <= end.unsqueeze(1))[..., None, None]
    rows, slot = torch.arange(batch, device=device).unsqueeze(1), block % slots
    for name, fresh in zip(("k", "v"), compress(*gathered), strict=True):
        cache[name].index_put_((rows, slot), torch.where(made, fresh.to(cache[name].dtype), take(cache[name], slot)))


def selected_pairs(tokens: int, block: int, top: int) -> int:
    """Query-key pairs of the selected branch: all earlier tokens while every block is chosen, then top - 1 blocks and
    the own one up to the query."""
    dense = min(tokens, top * block)
    whole, rest = divmod(tokens - dense, block)
    own = whole * block * (block + 1) // 2 + rest * (rest + 1) // 2
    return dense * (dense + 1) // 2 + (tokens - dense) * (top - 1) * block + own


def compressed_pairs(tokens: int, block: int, stride: int) -> int:
    """Query-block pairs of the compressed branch: token t sees (t + 1 - block) // stride + 1 blocks."""
    whole, rest = divmod(max(0, tokens - block + 1), stride)
    return stride * whole * (whole + 1) // 2 + rest * (whole + 1)
