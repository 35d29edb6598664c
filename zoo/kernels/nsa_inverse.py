"""From the queries' blocks to the blocks' queries: the index that zoo/kernels/nsa_selected.py walks.

    pieces   a call cut so that its scratch fits
    inverse  a piece's pairs sorted by block (a stable counting sort, _sort, run twice), cut into items

A pair is a (row, token, kv head, place in block_index), numbered in that order. An item is at most so many pairs of one
block, of tokens of one chunk: items run chunk by chunk, so that the query rows that they gather are still in L2.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SCRATCH_BYTES = 2 << 30  # for partial rows; above it a call runs in several pieces
FEW_PAIRS = 2048  # up to so many, a program per pair: nothing to sort, and no block is read by many
ITEM_ROWS = {"partial": 4096, "grads": 8192}  # of an item at most: its block is read once for all of them
CHUNKS = {"partial": 16, "grads": 4}  # of a piece's tokens at most
CHUNK_TOKENS = 256  # at least
SORT = (64, 32, 4)  # tokens, places of blocks, warps
INTEGERS = ["T", "slots", "chunks", "each"]


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

    def queries(self, x: Tensor) -> Tensor:
        """This piece of (B,T,H,...)."""
        return x[:, self.tokens, self.heads.start * self.group : self.heads.stop * self.group]

    def keys(self, x: Tensor) -> Tensor:
        return x[:, :, self.heads]

    def sizes(self, scale: float) -> dict[str, int | float]:
        _, tokens, kv_heads, _ = self.index.shape
        return {"T": tokens, "N": self.keys_total, "G": kv_heads, "slots": self.slots, "scale": scale}

    def switches(self) -> dict[str, int]:
        return self.row_switches() | {"BLOCK": self.block, "BLOCK_K": max(16, triton.next_power_of_2(self.block))}

    def row_switches(self) -> dict[str, int]:
        block_d = max(16, triton.next_power_of_2(self.dim))
        return {"TOP": self.index.shape[3], "GROUP": self.group, "D": self.dim, "BLOCK_D": block_d}


def pieces(q: Tensor, k: Tensor, block_index: Tensor, places: Any, block: int) -> Iterator[Piece]:
    """Runs of heads while one head's scratch fits, else runs of tokens of one head."""
    batch, length, heads, dim = q.shape
    kv_heads, top = block_index.shape[2:]
    group = heads // kv_heads
    token_bytes = batch * top * group * (dim * q.dtype.itemsize + 4)
    fitting = max(1, min(length, SCRATCH_BYTES // token_bytes))
    heads_each = max(1, SCRATCH_BYTES // (token_bytes * length)) if fitting == length else 1
    # Documents: the places after the last token's are never used.
    slots = triton.cdiv(k.shape[1], block) if places.documents == 0 else length // block + places.documents
    for g in range(0, kv_heads, heads_each):
        for t in range(0, length, fitting):
            tokens, some = slice(t, min(t + fitting, length)), slice(g, min(g + heads_each, kv_heads))
            yield Piece(
                tokens, some, group, dim, block, slots, k.shape[1], block_index[:, tokens, some].contiguous(),
                *(x[:, tokens].contiguous() for x in (places.place, places.first_key, places.first_block)),
            )  # fmt: skip


@dataclass
class Items:
    order: Tensor  # pairs, sorted by block; those of one block by token
    block: Tensor  # (count,) int32 ((row * G + kv head) * chunks + chunk) * slots + place
    first: Tensor  # (count,) int32 range in `order`, empty: nothing to do
    last: Tensor
    begin: Tensor  # (blocks + 1,) int32 the items of each block
    count: int
    blocks: int  # each counted once a chunk
    chunks: int
    single: bool  # every item is one pair
    together: bool  # no pairs for the first, previous and own blocks


def inverse(piece: Piece, kernel: str) -> Items:
    index, device = piece.index, piece.index.device
    batch, length, kv_heads, top = index.shape
    if kernel == "partial" and piece.pairs <= FEW_PAIRS:
        own = torch.div(piece.place, piece.block, rounding_mode="floor")[:, :, None, None]
        row = torch.arange(batch * kv_heads, device=device, dtype=torch.int32).view(batch, 1, kv_heads, 1) * piece.slots
        block = (row + piece.first_block[:, :, None, None] + index).flatten()
        pair = torch.arange(piece.pairs, device=device, dtype=torch.int32)
        last = pair + ((index >= 0) & (index <= own)).flatten().int()  # an empty item where there is no block
        return Items(pair, block, pair, last, pair, piece.pairs, batch * kv_heads * piece.slots, 1, True, False)
    tokens, places, warps = SORT
    chunk = max(CHUNK_TOKENS, triton.cdiv(length, CHUNKS[kernel]))
    chunks = triton.cdiv(length, chunk)
    blocks, together = batch * kv_heads * chunks * piece.slots, kernel == "partial"
    number = torch.empty(blocks, dtype=torch.int32, device=device)
    order = torch.empty(piece.pairs, dtype=torch.int32, device=device)

    def sort(start: Tensor, put: bool) -> None:
        _sort[batch * kv_heads * chunks, triton.cdiv(piece.slots, places)](
            index, piece.place, piece.first_block, start, order, chunk, chunks, length, kv_heads, piece.slots,
            TOP=top, BLOCK=piece.block, BLOCK_T=tokens, BLOCK_S=places, TOGETHER=together, PUT=put, num_warps=warps,
        )  # fmt: skip

    sort(number, False)
    bounds = _edges(number)
    sort(bounds, True)
    each = max(1, ITEM_ROWS[kernel] // piece.group)
    begin = _edges(torch.div(number + each - 1, each, rounding_mode="floor"))
    count = min(blocks, piece.pairs) + piece.pairs // each  # at least the items there are
    item = torch.arange(count, device=device, dtype=torch.int32)
    block = torch.searchsorted(begin[1:], item, right=True, out_int32=True)
    here = block.clamp(max=blocks - 1).long()
    first = bounds[here] + (item - begin[here]) * each
    last = torch.minimum(first + each, bounds[here + 1])
    return Items(order, block, first, last, begin, count, blocks, chunks, False, together)


def _edges(number: Tensor) -> Tensor:
    """Where each of `number` begins, and the end of the last."""
    edges = number.new_zeros(number.numel() + 1)
    torch.cumsum(number, 0, dtype=torch.int32, out=edges[1:])
    return edges


# --------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def is_near(chosen, own):
    """Whether it is the first, the previous or the own block."""
    return (chosen == 0) | (chosen == own) | (chosen == own - 1)


@triton.jit(do_not_specialize=INTEGERS)
def _sort(
    index_ptr, place_ptr, first_block_ptr, start_ptr, order_ptr, each, chunks, T, G, slots,
    TOP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, TOGETHER: tl.constexpr,
    PUT: tl.constexpr,
):  # fmt: skip
    """Counts the pairs of BLOCK_S places of blocks among `each` tokens of one key/value head; with PUT writes them to
    `order`, those of a block from its start on, by token. A token chooses a block at most once."""
    group = tl.program_id(0)
    batch, kv_head, begin = group // chunks // G, group // chunks % G, group % chunks * each
    end = min(begin + each, T)
    lowest = tl.program_id(1) * BLOCK_S
    slot = lowest + tl.arange(0, BLOCK_S)
    if PUT:
        reached = tl.load(start_ptr + group * slots + slot, mask=slot < slots, other=0)
    else:
        reached = tl.zeros([BLOCK_S], tl.int32)
    for t0 in range(begin, end, BLOCK_T):
        latest = batch * T + min(t0 + BLOCK_T, end) - 1
        if tl.load(first_block_ptr + latest) + tl.load(place_ptr + latest) // BLOCK >= lowest:  # else none sees them
            token = t0 + tl.arange(0, BLOCK_T)
            inside = token < end
            token += batch * T
            own = tl.load(place_ptr + token, mask=inside, other=0) // BLOCK
            first = tl.load(first_block_ptr + token, mask=inside, other=0)
            pair = (token * G + kv_head) * TOP
            found = tl.full([BLOCK_T, BLOCK_S], -1, tl.int32)  # the pair
            for i in tl.static_range(0, TOP):
                chosen = tl.load(index_ptr + pair + i, mask=inside, other=-1)
                wanted = (chosen >= 0) & (chosen <= own)
                if TOGETHER:
                    wanted = wanted & (is_near(chosen, own) == 0)
                at = tl.where(wanted, first + chosen, -1)
                found = tl.where(at[:, None] == slot[None, :], (pair + i)[:, None], found)
            there = (found >= 0).to(tl.int32)
            if PUT:
                before = reached[None, :] + tl.cumsum(there, 0) - 1
                tl.store(order_ptr + before, found, mask=found >= 0)
            reached += tl.sum(there, 0)
    if not PUT:
        tl.store(start_ptr + group * slots + slot, reached, mask=slot < slots)
