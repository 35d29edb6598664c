"""Which keys of its first, previous and own block a query sees: of those that it chose (zoo/kernels/nsa_selected.py).

    sees    the rule, inside a kernel
    _walks  for hopper_near.py: the tiles of keys that each item walks, and what each query sees of them

A query sees two ranges of keys: of its first block, and from its previous one to itself. Where the two meet they become
one, and otherwise a block at least lies between them: a tile as long as a block never shows a query both.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.nsa_piece import Piece

LOADED = 4096  # places of chosen blocks that a program of _walks holds: a vector of loads a thread, and then some
WALK = 6  # numbers of an item
INTEGERS = ["T", "N", "tiles", "pairs"]


@dataclass
class Walks:
    """Items are counted (last tile of tokens - tile) * pairs + pair, where a pair is batch row * G + kv head."""

    item: Tensor  # (items, WALK) int32, as hopper_rows.Walk
    query: Tensor  # (4,B,G,T) int32: of its first block [first, first_high), of the others [low, high)
    items: int
    pairs: int


def walks(piece: Piece, tokens: int) -> Walks:
    """Of items of `tokens` neighbouring queries of a key/value head, and tiles as long as a block."""
    batch, length, kv_heads, top = piece.index.shape
    tiles, pairs = triton.cdiv(length, tokens), batch * kv_heads
    item = piece.index.new_empty((tiles * pairs, WALK))
    query = piece.index.new_empty((4, batch, kv_heads, length))
    padded, padded_top = triton.next_power_of_2(tokens), triton.next_power_of_2(top)
    each = max(1, LOADED // (padded * padded_top))
    _walks[triton.cdiv(tiles, each) * pairs,](
        piece.index, piece.place, piece.first_key, item, query, length, piece.keys_total, tiles, pairs,
        G=kv_heads, TOP=top, BLOCK=piece.block, BLOCK_TOP=padded_top, TOKENS=tokens, BLOCK_T=padded, EACH=each,
        WALK=WALK, num_warps=4,
    )  # fmt: skip
    return Walks(item, query, tiles * pairs, pairs)


# --------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def _chose(chosen, block):
    """1 where a row of `chosen` holds the row's block, 0 elsewhere and where there is no such block."""
    return tl.max(((chosen == block[:, None]) & (chosen >= 0)).to(tl.int32), 1)


@triton.jit
def sees(chosen, place, first_key, BLOCK: tl.constexpr):
    """(first_high, low, high): a query that chose these blocks sees keys from first_key on before first_high, and from
    low on before high."""
    own = place // BLOCK
    first_high = first_key + tl.minimum(place + 1, _chose(chosen, own * 0) * BLOCK)
    low = first_key + (own - _chose(chosen, own - 1)) * BLOCK
    high = tl.where(_chose(chosen, own) > 0, first_key + place + 1, first_key + own * BLOCK)
    return first_high, low, high


@triton.jit(do_not_specialize=INTEGERS)
def _walks(
    index_ptr, place_ptr, first_key_ptr, item_ptr, query_ptr, T, N, tiles, pairs,
    G: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_TOP: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr, EACH: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """EACH items of a pair. Their walk is that of `_near`: the first block of the first query's document, and from that
    query's previous block to the last query; where these would meet, only the second range."""
    pair, tile0 = tl.program_id(0) % pairs, tl.program_id(0) // pairs * EACH
    batch, kv_head = tl.cast(pair // G, tl.int64), pair % G
    place_ptr += batch * T
    first_key_ptr += batch * T
    each = tl.arange(0, EACH * BLOCK_T)
    t = (tile0 + each // BLOCK_T) * TOKENS + each % BLOCK_T
    inside = (each % BLOCK_T < TOKENS) & (t < T)
    place = tl.load(place_ptr + t, mask=inside, other=0)
    first_key = tl.load(first_key_ptr + t, mask=inside, other=0)
    i = tl.arange(0, BLOCK_TOP)
    choice = ((batch * T + t) * G + kv_head) * TOP
    chosen = tl.load(index_ptr + choice[:, None] + i[None, :], mask=inside[:, None] & (i < TOP)[None, :], other=-1)
    first_high, low, high = sees(chosen, place, first_key, BLOCK)
    low = tl.where(low <= first_high, first_key, low)
    first_high, high = tl.minimum(first_high, N), tl.minimum(high, N)
    query_ptr += tl.cast(pair, tl.int64) * T + t
    plane = tl.cast(pairs, tl.int64) * T
    tl.store(query_ptr, first_key, mask=inside)
    tl.store(query_ptr + plane, first_high, mask=inside)
    tl.store(query_ptr + 2 * plane, low, mask=inside)
    tl.store(query_ptr + 3 * plane, high, mask=inside)

    tile = tile0 + tl.arange(0, EACH)
    exists = tile < tiles
    earliest, latest = tile * TOKENS, tl.minimum(tile * TOKENS + (TOKENS - 1), T - 1)
    start = tl.load(first_key_ptr + earliest, mask=exists, other=0)
    previous = start + tl.maximum(tl.load(place_ptr + earliest, mask=exists, other=0) // BLOCK - 1, 0) * BLOCK
    beyond = tl.load(first_key_ptr + latest, mask=exists, other=0) + tl.load(place_ptr + latest, mask=exists, other=0)
    beyond = tl.minimum(beyond + 1, N)
    apart = previous > start
    last_low, first_end = _greatest(low, inside, EACH, BLOCK_T), _least(high, inside, EACH, BLOCK_T)
    last_first = _greatest(first_key, inside, EACH, BLOCK_T)
    first_first_high = _least(first_high, inside, EACH, BLOCK_T)
    whole = tl.where(
        apart,
        (last_first <= start) & (first_first_high >= start + BLOCK),
        (last_low <= previous) & (first_end >= previous + BLOCK),
    )
    item_ptr += ((tiles - 1 - tile) * pairs + pair) * WALK
    tl.store(item_ptr, tl.where(apart, start, previous), mask=exists)
    tl.store(item_ptr + 1, tl.where(apart, previous, previous + BLOCK), mask=exists)
    count = apart.to(tl.int32) + (beyond - previous + (BLOCK - 1)) // BLOCK
    tl.store(item_ptr + 2, tl.maximum(count, 1), mask=exists)
    tl.store(item_ptr + 3, 1 - whole.to(tl.int32), mask=exists)
    tl.store(item_ptr + 4, last_low, mask=exists)
    tl.store(item_ptr + 5, first_end, mask=exists)


@triton.jit
def _greatest(x, inside, EACH: tl.constexpr, BLOCK_T: tl.constexpr):
    """Of each item's queries."""
    return tl.max(tl.reshape(tl.where(inside, x, 0), [EACH, BLOCK_T]), 1)


@triton.jit
def _least(x, inside, EACH: tl.constexpr, BLOCK_T: tl.constexpr):
    return tl.min(tl.reshape(tl.where(inside, x, 0x7FFFFFFF), [EACH, BLOCK_T]), 1)
