"""Pairs in their order, cut for persistent programs: what hopper_partial.py walks.

A run is an equal share of all pairs, in the order of nsa_inverse.py, an item what a run has of a block; program p takes
runs p, p + programs, and so on. All programs have as much to do whatever was chosen, and those that run together walk
the same chunk of tokens.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.nsa_inverse import ITEM_ROWS, SUMMED, Sorted, items_before, pieces_of
from zoo.kernels.nsa_piece import Piece

ITEM = 5  # numbers of an item
COUNTED = 512  # blocks of a program
INTEGERS = ["blocks", "runs", "chunks", "slots"]


@dataclass
class Runs:
    item: Tensor  # (at least the items there are, ITEM) int32: range of its pairs, batch row, kv head, first key
    begin: Tensor  # (count + 1,) int32 where each run's items begin
    count: int


def runs(piece: Piece, pairs: Sorted, programs: int) -> Runs:
    """So many that each of `programs` takes as many, of about ITEM_ROWS rows each."""
    blocks, count = pairs.blocks, programs * max(1, piece.pairs * piece.group // (programs * ITEM_ROWS["partial"]))
    items = min(blocks, piece.pairs) + count
    item, begin = pairs.bounds.new_empty((items, ITEM)), pairs.bounds.new_empty(count + 1)
    _cut[triton.cdiv(blocks, COUNTED),](
        pairs.order, pairs.bounds, piece.first_key, piece.first_block, item, begin, blocks, count, pairs.chunks,
        pairs.slots, G=piece.index.shape[2], TOP=piece.top, BLOCK=piece.block, ITEM=ITEM, BLOCK_N=COUNTED,
        SUMMED=SUMMED, num_warps=4,
    )  # fmt: skip
    return Runs(item, begin, count)


# --------------------------------------------------------------------------------------------------------- the kernels


@triton.jit(do_not_specialize=INTEGERS)
def _cut(
    order_ptr, bounds_ptr, first_key_ptr, first_block_ptr, item_ptr, begin_ptr, blocks, runs, chunks, slots,
    G: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr, ITEM: tl.constexpr, BLOCK_N: tl.constexpr,
    SUMMED: tl.constexpr,
):  # fmt: skip
    """The items of BLOCK_N blocks, and where the runs begin that begin among their pairs."""
    total = tl.load(bounds_ptr + blocks)
    each = tl.maximum(tl.cdiv(total, runs), 1)  # pairs of a run
    block0 = tl.program_id(0) * BLOCK_N
    block = block0 + tl.arange(0, BLOCK_N)
    begin = tl.load(bounds_ptr + block, mask=block < blocks, other=0)
    end = tl.load(bounds_ptr + block + 1, mask=block < blocks, other=0)
    number = pieces_of(begin, end, each, True)
    behind = items_before(bounds_ptr, block0, each, True, SUMMED) + tl.cumsum(number, 0)  # each block's items

    token = tl.load(order_ptr + begin, mask=number > 0, other=0).to(tl.int32) // (G * TOP)  # through the batch
    before = (block % slots - tl.load(first_block_ptr + token, mask=number > 0, other=0)) * BLOCK
    key0 = tl.load(first_key_ptr + token, mask=number > 0, other=0) + before
    head = block // slots // chunks
    for i in range(0, tl.max(number, 0)):
        there, run = i < number, begin // each + i
        first, item = tl.maximum(begin, run * each), behind - number + i
        at = item_ptr + item * ITEM
        tl.store(at, first, mask=there)
        tl.store(at + 1, tl.minimum(end, (run + 1) * each), mask=there)
        tl.store(at + 2, head // G, mask=there)
        tl.store(at + 3, head % G, mask=there)
        tl.store(at + 4, key0, mask=there)
        tl.store(begin_ptr + run, item, mask=there & (first == run * each))
    if block0 + BLOCK_N >= blocks:  # runs that have no pairs, and the end
        items = tl.max(behind, 0)
        for run0 in range(tl.cdiv(total, each), runs + 1, BLOCK_N):
            run = run0 + tl.arange(0, BLOCK_N)
            tl.store(begin_ptr + run, tl.zeros([BLOCK_N], tl.int32) + items, mask=run <= runs)
