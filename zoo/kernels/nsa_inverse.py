"""From the queries' blocks to the blocks' queries: the index that zoo/kernels/nsa_selected.py walks.

    inverse  a piece's pairs sorted by block (nsa_count.py, or torch's stable radix sort of the keys that _keys writes),
             cut into items by _list; nsa_runs.py cuts them in another way

An item is at most so many pairs of one block, of tokens of one chunk: items run chunk by chunk, so that the query rows
that they gather are still in L2.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import nsa_count
from zoo.kernels.nsa_piece import Piece, is_wanted

ITEM_ROWS = {"partial": 4096, "grads": 8192}  # of an item at most: its block is read once for all of them
CHUNKS = {"partial": 15, "grads": 4}  # of a piece's tokens at most; 15: 65,536 tokens with 4 kv heads have short keys
SHORT_KEYS = 1 << 16  # blocks and a place for what is none, in 16 bits: half the passes of a sort
CHUNK_TOKENS = 256  # at least
KEYS = 1024  # of a program
LISTED = 1024  # blocks of a program
SUMMED = 4096  # of those before them, at once
INTEGERS = ["pairs", "chunk", "chunks", "T", "slots", "blocks", "lowest"]


@dataclass
class Sorted:
    """The blocks are counted ((row * G + kv head) * chunks + chunk) * slots + place."""

    order: Tensor  # (pairs,) int64, sorted by block, those of one block by token; at its end what nobody needs
    bounds: Tensor  # (blocks + 1,) int32 where each block's pairs begin in `order`
    blocks: int
    chunks: int
    slots: int


@dataclass
class Items(Sorted):
    begin: Tensor  # (blocks + 1,) int32 where each block's items begin
    block: Tensor  # (count,) int32 of each item; `blocks` where there are fewer
    each: int  # pairs of an item at most: item i of a block begins i * each pairs after it
    count: int

    def arguments(self) -> tuple[Tensor | int, ...]:
        """Of `item_of`."""
        return self.order, self.bounds, self.begin, self.block, self.each, self.blocks, self.chunks, self.slots


def sorted_pairs(piece: Piece, kernel: str) -> Sorted:
    """For "partial" without the pairs of the first, previous and own blocks."""
    batch, length, kv_heads, top = piece.index.shape
    chunk = max(CHUNK_TOKENS, triton.cdiv(length, CHUNKS[kernel]))
    chunks = triton.cdiv(length, chunk)
    blocks = batch * kv_heads * chunks * piece.slots
    if nsa_count.takes(piece, blocks):
        order, bounds = nsa_count.ordered_pairs(piece, chunk, chunks, blocks, kernel == "partial")
        return Sorted(order, bounds, blocks, chunks, piece.slots)
    short = blocks < SHORT_KEYS
    key, lowest = piece.index.new_empty(piece.pairs, dtype=torch.int16 if short else torch.int32), -(1 << 15) * short
    _keys[triton.cdiv(piece.pairs, KEYS),](
        piece.index, piece.place, piece.first_block, key, piece.pairs, chunk, chunks, length, piece.slots, blocks,
        lowest, G=kv_heads, TOP=top, BLOCK=piece.block, FAR=kernel == "partial", BLOCK_P=KEYS, num_warps=4,
    )  # fmt: skip
    key, order = torch.sort(key, stable=True)
    block = torch.arange(lowest, lowest + blocks + 1, dtype=key.dtype, device=key.device)
    bounds = torch.searchsorted(key, block, out_int32=True)
    return Sorted(order, bounds, blocks, chunks, piece.slots)


def inverse(piece: Piece, kernel: str) -> Items:
    pairs = sorted_pairs(piece, kernel)
    blocks, each = pairs.blocks, max(1, ITEM_ROWS[kernel] // piece.group)
    count = min(blocks, piece.pairs) + piece.pairs // each  # at least the items there are
    begin, block = pairs.bounds.new_empty(blocks + 1), pairs.bounds.new_empty(count)
    _list[triton.cdiv(blocks, LISTED),](
        pairs.bounds, begin, block, each, blocks, count, BLOCK_N=LISTED, SUMMED=SUMMED, num_warps=4
    )
    return Items(pairs.order, pairs.bounds, blocks, pairs.chunks, pairs.slots, begin, block, each, count)


# --------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def pieces_of(begin, end, each, RUNS: tl.constexpr):
    """Into how many items a block's pairs [begin, end) are cut: `each` pairs from its first on, or with RUNS at the
    multiples of `each`."""
    if RUNS:
        number = tl.where(begin < end, (end - 1) // each - begin // each + 1, 0)
    else:
        number = tl.cdiv(end - begin, each)
    return number


@triton.jit
def items_before(bounds_ptr, block0, each, RUNS: tl.constexpr, SUMMED: tl.constexpr):
    """Of the blocks before block0. Every program adds them up for itself: a launch less than a scan."""
    sums = tl.zeros([SUMMED], tl.int32)
    for other0 in range(0, block0, SUMMED):
        other = other0 + tl.arange(0, SUMMED)
        begin = tl.load(bounds_ptr + other, mask=other < block0, other=0)
        end = tl.load(bounds_ptr + other + 1, mask=other < block0, other=0)
        sums += pieces_of(begin, end, each, RUNS)
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=["each", "blocks", "count"])
def _list(
    bounds_ptr, begin_ptr, block_ptr, each, blocks, count, BLOCK_N: tl.constexpr, SUMMED: tl.constexpr
):  # fmt: skip
    """Where each block's items begin, and each item's block."""
    block0 = tl.program_id(0) * BLOCK_N
    block = block0 + tl.arange(0, BLOCK_N)
    there = block < blocks
    begin = tl.load(bounds_ptr + block, mask=there, other=0)
    number = pieces_of(begin, tl.load(bounds_ptr + block + 1, mask=there, other=0), each, False)
    last = items_before(bounds_ptr, block0, each, False, SUMMED) + tl.cumsum(number, 0)
    first = last - number
    tl.store(begin_ptr + block, first, mask=there)
    for i in range(0, tl.max(number, 0)):
        tl.store(block_ptr + first + i, block, mask=i < number)
    if block0 + BLOCK_N >= blocks:
        items = tl.max(last, 0)
        tl.store(begin_ptr + blocks, items)
        for item0 in range(items, count, BLOCK_N):
            item = item0 + tl.arange(0, BLOCK_N)
            tl.store(block_ptr + item, tl.zeros([BLOCK_N], tl.int32) + blocks, mask=item < count)


@triton.jit
def item_of(
    order_ptr, bounds_ptr, begin_ptr, block_ptr, each, blocks, chunks, slots, first_key_ptr, first_block_ptr,
    G: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """This program's item: (range of its pairs in the order, possibly empty, row of the batch, kv head, its block's
    first key, and that key's place in its document)."""
    item = tl.program_id(0)
    block = tl.load(block_ptr + item)
    there = block < blocks
    first = tl.load(bounds_ptr + block, mask=there, other=0)
    first += (item - tl.load(begin_ptr + block, mask=there, other=0)) * each
    last = tl.minimum(first + each, tl.load(bounds_ptr + block + 1, mask=there, other=0))
    last = tl.where(there, last, first)
    token = tl.load(order_ptr + first, mask=first < last, other=0).to(tl.int32) // (G * TOP)  # through the batch
    before = (block % slots - tl.load(first_block_ptr + token)) * BLOCK
    head = block // slots // chunks
    key0 = tl.load(first_key_ptr + token) + before
    return first, last, tl.cast(head // G, tl.int64), tl.cast(head % G, tl.int64), key0, before


@triton.jit(do_not_specialize=INTEGERS)
def _keys(
    index_ptr, place_ptr, first_block_ptr, key_ptr, pairs, chunk, chunks, T, slots, blocks, lowest,
    G: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr, FAR: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The block of each pair, counted from `lowest`; for a pair that is none, the one after the last."""
    pair = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pair < pairs
    token = pair // (G * TOP)
    chosen = tl.load(index_ptr + pair, mask=inside, other=-1)
    place = tl.load(place_ptr + token, mask=inside, other=0)
    slot = tl.load(first_block_ptr + token, mask=inside, other=0) + chosen
    block = ((token // T * G + pair // TOP % G) * chunks + token % T // chunk) * slots + slot
    key = tl.where(is_wanted(chosen, place // BLOCK, FAR), block, blocks)
    tl.store(key_ptr + pair, (key + lowest).to(key_ptr.dtype.element_ty), mask=inside)
