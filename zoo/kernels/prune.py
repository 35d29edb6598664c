"""The tiles that pruning keeps, in Triton (rule, proof and rounding: zoo/ops/prune.py).

    _measure   one tile of one key head reads k, and q and the gate of its query heads, once: the largest |k|, |q| and
               |q| |k|, and what the gate forgot
    _limits    one query head: what the tiles after each one forgot, and what those before a query tile must exceed to
               be dropped, the largest of all query tiles from there on
    _search    where the two cross, for each tile as queries and as keys

Both of `_limits` fall along the tiles, so a tile's neighbours that see it or that it sees are found by halving; and as
they are integers, the two searches answer one question from both sides and always agree.

Shapes: reach (B,G,tiles) and largest, product (B,H,tiles) float32; forgot, since, limit (B,H,tiles) int64, in units.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import EPS, FORGOTTEN, KEPT_TILE, ROUNDING, UNITS
from zoo.kernels.gate import log_decay_at
from zoo.kernels.launch import on_device, rows_contiguous, strides_of
from zoo.kernels.tiles import load_tile
from zoo.kernels.units import LN2

SCANNED = 1024  # tiles of a step along a head, at most
SEARCHED = 64  # tiles of a program


def kept_tiles(
    q: Tensor, k: Tensor, gate: tuple[Tensor, ...], *, window: int | None, scale: float, prune: float
) -> tuple[Tensor, Tensor]:
    """As `zoo.ops.prune.kept_tiles`."""
    batch, length, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    q, k, first_gate, last_gate = (rows_contiguous(x) for x in (q, k, gate[0], gate[-1]))
    tiles = triton.cdiv(keys, KEPT_TILE)
    reach = q.new_empty((batch, kv_heads, tiles), dtype=torch.float32)
    largest, product = (q.new_empty((batch, heads, tiles), dtype=torch.float32) for _ in range(2))
    forgot, since, limit = (q.new_empty((batch, heads, tiles), dtype=torch.int64) for _ in range(3))
    first, last = (q.new_empty((batch, kv_heads, tiles), dtype=torch.int32) for _ in range(2))
    least = -math.log(prune / min(keys, keys if window is None else window))
    group = heads // kv_heads
    with on_device(q):
        _measure[tiles * batch * kv_heads,](
            q, k, first_gate, last_gate, reach, largest, product, forgot,
            *strides_of(q, k), *first_gate.stride()[:2], *last_gate.stride()[:2], length, keys, heads,
            GROUP=group, D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), TILE=KEPT_TILE, EPS=EPS,
            ACTIVATE=len(gate) == 2, UNITS=UNITS, FORGOTTEN=FORGOTTEN,
        )  # fmt: skip
        _limits[batch * heads,](
            reach, largest, product, forgot, since, limit, tiles, abs(scale) * ROUNDING * UNITS,
            least * ROUNDING * UNITS, GROUP=group, BLOCK=min(SCANNED, max(128, triton.next_power_of_2(tiles))),
        )  # fmt: skip
        _search[triton.cdiv(tiles, SEARCHED) * batch * kv_heads,](
            since, limit, first, last, tiles, tiles.bit_length(), GROUP=group, BLOCK=SEARCHED, num_warps=2
        )
    return first, last


@triton.jit
def _norm(x):
    """Of each row, in float32."""
    x = x.to(tl.float32)
    return tl.sqrt(tl.sum(x * x, 1))


@triton.jit(do_not_specialize=["T", "N"])
def _measure(
    q_ptr, k_ptr, first_ptr, second_ptr, reach_ptr, largest_ptr, product_ptr, forgot_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_fb, stride_ft, stride_sb, stride_st,
    T, N, H, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, EPS: tl.constexpr,
    ACTIVATE: tl.constexpr, UNITS: tl.constexpr, FORGOTTEN: tl.constexpr,
):  # fmt: skip
    """One tile of one key head; the heads of a token, neighbours in memory, run side by side. Positions that hold no
    query count as queries of norm 0."""
    tiles, kv_heads, offset = tl.cdiv(N, TILE), H // GROUP, N - T
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    tile = tl.program_id(0) // kv_heads % tiles
    batch = (tl.program_id(0) // kv_heads // tiles).to(tl.int64)
    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
    k_norm = _norm(load_tile(k_base, tile * TILE, 0, N, stride_kt, TILE, D, BLOCK_D))
    token = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_base = q_ptr + batch * stride_qb + head * stride_qh - tl.cast(offset, tl.int64) * stride_qt
        q_norm = _norm(load_tile(q_base, tile * TILE, offset, N, stride_qt, TILE, D, BLOCK_D))
        decay = log_decay_at(
            first_ptr + batch * stride_fb, second_ptr + batch * stride_sb, token * stride_ft + head,
            token * stride_st + head, token < N, EPS, ACTIVATE,
        )  # fmt: skip
        at = (batch * H + head) * tiles + tile
        tl.store(largest_ptr + at, tl.max(q_norm, 0))
        tl.store(product_ptr + at, tl.max(q_norm * k_norm, 0))
        forgot = tl.minimum(tl.sum(decay, 0) * -LN2, FORGOTTEN * 1.0)
        tl.store(forgot_ptr + at, (forgot * UNITS).to(tl.int64))
    tl.store(reach_ptr + (batch * kv_heads + kv_head) * tiles + tile, tl.max(k_norm, 0))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["tiles"])
def _limits(
    reach_ptr, largest_ptr, product_ptr, forgot_ptr, since_ptr, limit_ptr, tiles, scale, least,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One query head, its newest tiles first. scale and least are in units and enlarged by ROUNDING."""
    row = tl.program_id(0).to(tl.int64)
    reach_ptr += row // GROUP * tiles
    block = tl.arange(0, BLOCK)
    reaches = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, tiles, BLOCK):
        reaches = tl.maximum(reaches, tl.load(reach_ptr + begin + block, mask=begin + block < tiles, other=0.0))
    reach = tl.max(reaches, 0)
    carry = tl.full([], 0, tl.int64)
    highest = tl.full([], 0, tl.int64)
    steps = tl.cdiv(tiles, BLOCK)
    for step in range(0, steps):
        tile = (steps - 1 - step) * BLOCK + block
        inside = tile < tiles
        at = row * tiles + tile
        forgot = tl.load(forgot_ptr + at, mask=inside, other=0)
        largest = tl.load(largest_ptr + at, mask=inside, other=0.0)
        need = tl.ceil((reach * largest + tl.load(product_ptr + at, mask=inside, other=0.0)) * scale + least)
        most = 2305843009213693952.0  # 2^61
        need = tl.where(need < most, need, most).to(tl.int64)  # also where it is not a number: nothing is dropped then
        through = tl.cumsum(forgot, 0, reverse=True) + carry
        limit = tl.where(inside, through + need, 0)
        limit = tl.maximum(tl.associative_scan(limit, 0, _larger, reverse=True), highest)
        tl.store(since_ptr + at, through - forgot, mask=inside)
        tl.store(limit_ptr + at, limit, mask=inside)
        carry += tl.sum(forgot, 0)
        highest = tl.maximum(highest, tl.max(limit, 0))


@triton.jit
def _above(falling_ptr, tiles, steps, value, STRICTLY: tl.constexpr):
    """How many of the `tiles` falling numbers lie above each value, or not below it."""
    low = tl.zeros_like(value).to(tl.int32)
    high = low + tiles
    for _ in range(steps):
        middle = (low + high) // 2
        number = tl.load(falling_ptr + middle, mask=middle < high, other=0)
        if STRICTLY:
            above = number > value
        else:
            above = number >= value
        above = above & (middle < high)
        low, high = tl.where(above, middle + 1, low), tl.where(above, high, middle)
    return low


@triton.jit(do_not_specialize=["tiles", "steps"])
def _search(
    since_ptr, limit_ptr, first_tile_ptr, last_tile_ptr, tiles, steps, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK tiles of one key head: what all of its query heads drop, and nobody keeps. 2^steps > tiles."""
    blocks = tl.cdiv(tiles, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    tile = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = tile < tiles
    first = tile
    last = tl.zeros([BLOCK], tl.int32)
    for member in range(GROUP):
        since = since_ptr + (row * GROUP + member) * tiles
        limit = limit_ptr + (row * GROUP + member) * tiles
        dropped = _above(since, tiles, steps, tl.load(limit + tile, mask=inside, other=0), True)
        keeping = _above(limit, tiles, steps, tl.load(since + tile, mask=inside, other=0), False)
        first, last = tl.minimum(first, dropped), tl.maximum(last, keeping)
    tl.store(first_tile_ptr + row * tiles + tile, first, mask=inside)
    tl.store(last_tile_ptr + row * tiles + tile, last, mask=inside)
