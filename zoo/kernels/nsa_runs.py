"""Pairs in their order, cut for persistent programs: what hopper_partial.py walks.

    _touched  into how many items the runs cut each block's pairs
    _cut      the items: a block's pairs of one run

A run is an equal share of all pairs, in the order of nsa_inverse.py; program p takes runs p, p + programs, and so on.
All programs have as much to do whatever was chosen, and those that run together walk the same chunk of tokens.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.nsa_inverse import ITEM_ROWS, Piece, Sorted

ITEM = 5  # numbers of an item
COUNTED = 256  # of a program
INTEGERS = ["blocks", "runs", "chunks", "slots"]


@dataclass
class Runs:
    item: Tensor  # (at least the items there are, ITEM) int32: range of its pairs, batch row, kv head, first key
    begin: Tensor  # (count + 1,) int32 where each run's items begin
    count: int


def runs(piece: Piece, pairs: Sorted, programs: int) -> Runs:
    """So many that each of `programs` takes as many, of about ITEM_ROWS rows each."""
    blocks, count = pairs.blocks, programs * max(1, piece.pairs * piece.group // (programs * ITEM_ROWS["partial"]))
    number = pairs.bounds.new_empty(blocks)
    _touched[triton.cdiv(blocks, COUNTED),](pairs.bounds, number, blocks, count, BLOCK_N=COUNTED, num_warps=4)
    first = pairs.bounds.new_zeros(blocks + 1)
    torch.cumsum(number, 0, dtype=torch.int32, out=first[1:])
    items = min(blocks, piece.pairs) + count
    item, begin = pairs.bounds.new_empty((items, ITEM)), pairs.bounds.new_empty(count + 1)
    _cut[triton.cdiv(items, COUNTED),](
        pairs.order, pairs.bounds, first, piece.first_key, piece.first_block, item, begin, blocks, count,
        pairs.chunks, pairs.slots, G=piece.index.shape[2], TOP=piece.top, BLOCK=piece.block, ITEM=ITEM,
        BLOCK_N=COUNTED, num_warps=4,
    )  # fmt: skip
    return Runs(item, begin, count)


# --------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def _each(bounds_ptr, blocks, runs):
    """Pairs of a run, at least one."""
    return tl.maximum(tl.cdiv(tl.load(bounds_ptr + blocks), runs), 1)


@triton.jit(do_not_specialize=INTEGERS)
def _touched(bounds_ptr, number_ptr, blocks, runs, BLOCK_N: tl.constexpr):
    block = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    each = _each(bounds_ptr, blocks, runs)
    begin = tl.load(bounds_ptr + block, mask=block < blocks, other=0)
    end = tl.load(bounds_ptr + block + 1, mask=block < blocks, other=0)
    number = tl.where(begin < end, (end - 1) // each - begin // each + 1, 0)
    tl.store(number_ptr + block, number, mask=block < blocks)


@triton.jit
def _holder(begin_ptr, x, blocks):
    """The last block that begins at x or before: the one that holds x, if any does."""
    low = x * 0
    high = low + blocks
    left = blocks
    while left > 1:
        middle = (low + high) // 2
        below = tl.load(begin_ptr + middle) <= x
        low, high = tl.where(below, middle, low), tl.where(below, high, middle)
        left = (left + 1) // 2
    return low


@triton.jit(do_not_specialize=INTEGERS)
def _cut(
    order_ptr, bounds_ptr, first_ptr, first_key_ptr, first_block_ptr, item_ptr, begin_ptr, blocks, runs, chunks, slots,
    G: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr, ITEM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Item and run of each number, as far as there are any."""
    number = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total, each = tl.load(bounds_ptr + blocks), _each(bounds_ptr, blocks, runs)
    items = tl.load(first_ptr + blocks)

    there = number < items
    block = _holder(first_ptr, tl.where(there, number, 0), blocks)
    begin, end = tl.load(bounds_ptr + block), tl.load(bounds_ptr + block + 1)
    run = begin // each + (number - tl.load(first_ptr + block))
    first, last = tl.maximum(begin, run * each), tl.minimum(end, (run + 1) * each)
    token = tl.load(order_ptr + first, mask=there, other=0).to(tl.int32) // (G * TOP)  # through the batch
    before = (block % slots - tl.load(first_block_ptr + token, mask=there, other=0)) * BLOCK
    key0 = tl.load(first_key_ptr + token, mask=there, other=0) + before
    head = block // slots // chunks
    item_ptr += number * ITEM
    tl.store(item_ptr, first, mask=there)
    tl.store(item_ptr + 1, last, mask=there)
    tl.store(item_ptr + 2, head // G, mask=there)
    tl.store(item_ptr + 3, head % G, mask=there)
    tl.store(item_ptr + 4, key0, mask=there)

    pair = number * each
    block = _holder(bounds_ptr, tl.where(pair < total, pair, 0), blocks)
    begin = tl.load(first_ptr + block) + number - tl.load(bounds_ptr + block) // each
    tl.store(begin_ptr + number, tl.where(pair < total, begin, items), mask=number <= runs)
