"""A piece's pairs in order where its blocks are few: counted, then placed, in two launches for the sort's dozen.

    _count  the pairs of each block
    _place  where each block's pairs begin, and the pairs, a block's by token

Blocks are counted as in nsa_inverse.py. A program looks for SLOTS neighbouring places of blocks among all that the
tokens of a chunk chose: work grows with pairs times places, which is why long pieces are sorted.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.nsa_piece import Piece, is_wanted

MOST_SLOTS = 256  # places of blocks of a row and head: 16,384 tokens with blocks of 64
MOST_BLOCKS = 1 << 15  # every program of _place adds up what stands before it
MOST_TOP = 64
SLOTS = 32
TOKENS = 64  # with 32 slots and 16 places a thread of 512 holds 64 numbers
SUMMED = 4096
INTEGERS = ["chunk", "chunks", "T", "slots", "blocks"]


def takes(piece: Piece, blocks: int) -> bool:
    return piece.slots <= MOST_SLOTS and blocks <= MOST_BLOCKS and piece.top <= MOST_TOP


def ordered_pairs(piece: Piece, chunk: int, chunks: int, blocks: int, far: bool) -> tuple[Tensor, Tensor]:
    """`order` and `bounds` of nsa_inverse.Sorted; far: without the pairs of the first, previous and own blocks."""
    batch, length, kv_heads, top = piece.index.shape
    number, bounds = piece.index.new_empty(blocks), piece.index.new_empty(blocks + 1)
    order = piece.index.new_empty(piece.pairs, dtype=torch.int64)
    arguments = (piece.index, piece.place, piece.first_block)
    sizes = (chunk, chunks, length, piece.slots)
    padded = triton.next_power_of_2(top)
    switches = {
        "G": kv_heads, "TOP": top, "BLOCK": piece.block, "FAR": far, "BLOCK_TOP": padded,
        "TOKENS": max(1, TOKENS * 16 // max(16, padded)), "SLOTS": SLOTS, "num_warps": 16,
    }  # fmt: skip
    grid = (batch * kv_heads * chunks, triton.cdiv(piece.slots, SLOTS))
    _count[grid](*arguments, number, *sizes, **switches)
    _place[grid](*arguments, number, bounds, order, *sizes, blocks, SUMMED=SUMMED, **switches)
    return order, bounds


# --------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def _chunk(place_ptr, first_block_ptr, chunk, chunks, T, slot0, G: tl.constexpr, BLOCK: tl.constexpr):
    """This program's (row of the batch, kv head, first token, one past the last); none where they see no such slot."""
    segment = tl.program_id(0)
    head, begin = segment // chunks, segment % chunks * chunk
    end = tl.minimum(begin + chunk, T)
    latest = head // G * T + end - 1  # what tokens see never falls
    reach = tl.load(first_block_ptr + latest) + tl.load(place_ptr + latest) // BLOCK
    return head // G, head % G, begin, tl.where(slot0 <= reach, end, begin)


@triton.jit
def _hits(
    index_ptr, place_ptr, first_block_ptr, pair, token, inside, slot,
    TOP: tl.constexpr, BLOCK: tl.constexpr, FAR: tl.constexpr, BLOCK_TOP: tl.constexpr,
):  # fmt: skip
    """(tokens, slots): where among its blocks a token chose a slot, counted from 1, or 0. `pair`: a token's first one.
    Lanes lie along the last dimension, warps along the one before: a thread has all blocks of a token."""
    i = tl.arange(0, BLOCK_TOP)
    own = tl.load(place_ptr + token, mask=inside, other=0) // BLOCK
    first = tl.load(first_block_ptr + token, mask=inside, other=0)
    chosen = tl.load(index_ptr + pair[None, :] + i[:, None], mask=inside[None, :] & (i < TOP)[:, None], other=-1)
    at = tl.where(is_wanted(chosen, own[None, :], FAR), first[None, :] + chosen, -1)
    return tl.max(tl.where(at[:, :, None] == slot[None, None, :], (i + 1)[:, None, None], 0), 0)


@triton.jit(do_not_specialize=INTEGERS[:4])
def _count(
    index_ptr, place_ptr, first_block_ptr, number_ptr, chunk, chunks, T, slots,
    G: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr, FAR: tl.constexpr, BLOCK_TOP: tl.constexpr,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    batch, kv_head, begin, end = _chunk(
        place_ptr, first_block_ptr, chunk, chunks, T, tl.program_id(1) * SLOTS, G, BLOCK
    )
    number = tl.zeros([SLOTS], tl.int32)
    for t0 in range(begin, end, TOKENS):
        t = t0 + tl.arange(0, TOKENS)
        token = batch * T + t
        pair = (token * G + kv_head) * TOP
        hits = _hits(index_ptr, place_ptr, first_block_ptr, pair, token, t < end, slot, TOP, BLOCK, FAR, BLOCK_TOP)
        number += tl.sum((hits > 0).to(tl.int32), 0)
    tl.store(number_ptr + tl.program_id(0) * slots + slot, number, mask=slot < slots)


@triton.jit(do_not_specialize=INTEGERS)
def _place(
    index_ptr, place_ptr, first_block_ptr, number_ptr, bounds_ptr, order_ptr, chunk, chunks, T, slots, blocks,
    G: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr, FAR: tl.constexpr, BLOCK_TOP: tl.constexpr,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    batch, kv_head, begin, end = _chunk(
        place_ptr, first_block_ptr, chunk, chunks, T, tl.program_id(1) * SLOTS, G, BLOCK
    )
    block0 = tl.program_id(0) * slots + tl.program_id(1) * SLOTS
    sums = tl.zeros([SUMMED], tl.int32)
    for other0 in range(0, block0, SUMMED):
        other = other0 + tl.arange(0, SUMMED)
        sums += tl.load(number_ptr + other, mask=other < block0, other=0)
    block = block0 + tl.arange(0, SLOTS)
    number = tl.load(number_ptr + block, mask=slot < slots, other=0)
    next_one = tl.sum(sums, 0) + tl.cumsum(number, 0)  # where each block's pairs end
    tl.store(bounds_ptr + block + 1, next_one, mask=slot < slots)
    tl.store(bounds_ptr + block, next_one - number, mask=(block == 0) & (slot < slots))
    next_one -= number
    for t0 in range(begin, end, TOKENS):
        t = t0 + tl.arange(0, TOKENS)
        token = batch * T + t
        pair = (token * G + kv_head) * TOP
        hits = _hits(index_ptr, place_ptr, first_block_ptr, pair, token, t < end, slot, TOP, BLOCK, FAR, BLOCK_TOP)
        there = (hits > 0).to(tl.int32)
        at = next_one[None, :] + tl.cumsum(there, 0) - 1
        tl.store(order_ptr + at, (pair[:, None] + hits - 1).to(tl.int64), mask=hits > 0)
        next_one += tl.sum(there, 0)
