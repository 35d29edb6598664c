"""A call of the selected branch, cut into pieces so that the scratch of each fits; and which pairs count.

A pair is a (row, token, kv head, place in block_index), numbered in that order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

SCRATCH_BYTES = 5 << 30  # for partial rows; above it a call runs in several pieces


@dataclass
class Piece:
    """Some tokens and some key/value heads of a call; its tensors are small, contiguous copies."""

    tokens: slice
    heads: slice
    group: int
    dim: int
    block: int
    slots: int  # places of blocks of one row and head
    keys_total: int
    index: Tensor  # (B,T,G,top) of this piece
    place: Tensor
    first_key: Tensor
    first_block: Tensor

    @property
    def pairs(self) -> int:
        return self.index.numel()

    @property
    def top(self) -> int:
        return self.index.shape[3]

    def queries(self, x: Tensor) -> Tensor:
        """This piece of (B,T,H,...)."""
        return x[:, self.tokens, self.heads.start * self.group : self.heads.stop * self.group]

    def keys(self, x: Tensor) -> Tensor:
        return x[:, :, self.heads]

    def sizes(self) -> dict[str, int]:
        return {"T": self.index.shape[1], "N": self.keys_total}

    def switches(self) -> dict[str, int]:
        return {
            "G": self.index.shape[2], "TOP": self.top, "GROUP": self.group, "D": self.dim,
            "BLOCK_D": max(16, triton.next_power_of_2(self.dim)), "BLOCK": self.block,
        }  # fmt: skip

    def padded_block(self) -> int:
        return max(16, triton.next_power_of_2(self.block))


def pieces(q: Tensor, k: Tensor, block_index: Tensor, places: Any, block: int) -> Iterator[Piece]:
    """Runs of heads while one head's scratch fits, else runs of tokens of one head."""
    batch, length, heads, dim = q.shape
    kv_heads, top = block_index.shape[2:]
    group = heads // kv_heads
    token_bytes = batch * top * group * (dim * q.dtype.itemsize + 4)
    fitting = _even_share(length, SCRATCH_BYTES // token_bytes)
    heads_each = _even_share(kv_heads, SCRATCH_BYTES // (token_bytes * length))
    # Documents: the places after the last token's are never used.
    slots = triton.cdiv(k.shape[1], block) if places.documents == 0 else length // block + places.documents
    slots = max(1, slots)  # without keys, too, the index has to say that there are no items
    for g in range(0, kv_heads, heads_each):
        for t in range(0, length, fitting):
            tokens, some = slice(t, min(t + fitting, length)), slice(g, min(g + heads_each, kv_heads))
            yield Piece(
                tokens, some, group, dim, block, slots, k.shape[1], block_index[:, tokens, some].contiguous(),
                *(x[:, tokens].contiguous() for x in (places.place, places.first_key, places.first_block)),
            )  # fmt: skip


def _even_share(total: int, most: int) -> int:
    """Of `total` cut into as few parts of at most `most` as there can be."""
    return triton.cdiv(total, triton.cdiv(total, max(1, most)))


# ----------------------------------------------------------------------------------------------------------- a pair


@triton.jit
def is_wanted(chosen, own, FAR: tl.constexpr):
    """Whether it is a block that the query sees, with FAR other than the first, the previous and the own one."""
    if FAR:
        wanted = (chosen > 0) & (chosen < own - 1)
    else:
        wanted = (chosen >= 0) & (chosen <= own)
    return wanted
