"""Attention over compressed blocks on Hopper (sm_90), backward, in Gluon. Deterministic: no atomics.

dq_kernel    rows stay, keys and values pass by: the forward's walk again
dkv_kernel   slots stay, rows pass by, a share of those that see them at a time; the shares are added in order
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from zoo.kernels.hopper_band import NOTHING, TILE, Schedule, copyable, descriptor, programs, start_ring
from zoo.kernels.hopper_dkv import query_columns
from zoo.kernels.hopper_rows import HELD, Rows, locate, open_channels, packed, produce, product, send
from zoo.kernels.nsa_compressed import row_numbers, seen_by
from zoo.kernels.units import LOG2E

# by head dim
DQ = {64: Schedule(2, 4, True, 224, 56), 128: Schedule(2, 3, True, 224, 56)}
DKV = {64: Schedule(2, 4, True, 232, 40), 128: Schedule(2, 3, True, 232, 40)}


# ------------------------------------------------------------------------------------------------ dq


@gluon.jit
def dq_consume(C: gl.constexpr, rows, channels, dq_desc, row_lse, delta, scale_log2, scale):
    """Warpgroup C: rows 64 C .. 64 C + 63 of every item. row_lse is in log2 units, +inf for a row that sees nothing."""
    D: gl.constexpr = rows.D
    dtype: gl.constexpr = dq_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    ring = start_ring(channels.passing.shape[0])
    number = gl.to_tensor(0)
    row = gl.arange(0, TILE, layout=row_layout)
    lse_ahead, delta_ahead = load_numbers(C, rows, row_lse, delta, gl.program_id(0), row)
    for item in range(gl.program_id(0), rows.items, gl.num_programs(0)):
        batch, kv_head, token = locate(rows, item)
        walk = rows.walk(item, batch, kv_head, token)
        token += C * rows.TOKENS
        next_item = gl.minimum(item + gl.num_programs(0), rows.items - 1)
        looked = rows.look(batch, kv_head, token + row // rows.GROUP)
        lse = lse_ahead
        delta_rows = delta_ahead
        lse_ahead, delta_ahead = load_numbers(C, rows, row_lse, delta, next_item, row)

        at = channels.wait_held(C, number)
        q = channels.held.index(at).reshape([TILE, D])
        do = channels.held_too.index(at).reshape([TILE, D])
        mbarrier.wait(channels.ready.index(ring.slot), ring.parity)
        s = product(q, channels.passing.index(ring.slot), D, s_layout)
        dp = product(do, channels.passing_too.index(ring.slot), D, s_layout)
        channels.give_up_last(C, number)
        s = warpgroup_mma_wait(1, deps=(s,))
        sight = rows.sight(*looked)
        if walk.ragged:
            s = rows.mask(s, walk.begin, sight, s_layout)
        p = gl.exp2(s * scale_log2 - gl.expand_dims(lse, 1))
        dp = warpgroup_mma_wait(0, deps=(dp,))
        ds = gl.convert_layout((p * (dp - gl.expand_dims(delta_rows, 1))).to(dtype), ds_layout)
        dq = gl.zeros([TILE, D], gl.float32, o_layout)
        key0 = walk.then
        for _ in range(walk.count - 1):
            before = ring.slot
            ring = ring.next()
            mbarrier.wait(channels.ready.index(ring.slot), ring.parity)
            s = product(q, channels.passing.index(ring.slot), D, s_layout)
            dq = warpgroup_mma(ds, channels.passing.index(before).reshape([TILE, D]), dq, is_async=True)
            dp = product(do, channels.passing_too.index(ring.slot), D, s_layout)
            s = warpgroup_mma_wait(2, deps=(s,))
            if walk.needs_mask(key0):
                s = rows.mask(s, key0, sight, s_layout)
            key0 += TILE
            p = gl.exp2(s * scale_log2 - gl.expand_dims(lse, 1))
            dq, dp, ds = warpgroup_mma_wait(0, deps=(dq, dp, ds))
            mbarrier.arrive(channels.free.index(before), count=1)
            ds = gl.convert_layout((p * (dp - gl.expand_dims(delta_rows, 1))).to(dtype), ds_layout)
        dq = warpgroup_mma(ds, channels.passing.index(ring.slot).reshape([TILE, D]), dq, is_async=True)
        dq, ds = warpgroup_mma_wait(0, deps=(dq, ds))
        ring = channels.pass_on(ring)
        send((dq * scale).to(dtype), channels.held.index(at), dq_desc, rows, batch, kv_head, token)
        number += 1
    tma.store_wait(0)


@gluon.jit
def load_numbers(C: gl.constexpr, rows, row_lse, delta, item, row):
    """lse and delta of consumer C's rows of an item, as they lie in memory."""
    batch, kv_head, token = locate(rows, item)
    at, inside = rows.numbers(batch, kv_head, token + C * rows.TOKENS, row)
    return gl.load(row_lse + at, mask=inside, other=float("inf")), gl.load(delta + at, mask=inside, other=0.0)


@gluon.jit(do_not_specialize=["tokens", "slots", "groups", "pairs", "items"])
def dq_kernel(
    q_desc, dout_desc, k_desc, v_desc, dq_desc, place, first, row_lse, delta, scale_log2, scale,
    tokens, slots, groups, pairs, items,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, STRIDE: gl.constexpr, RATIO: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    gl.static_assert(CONSUMERS == 2)
    rows = Rows(tokens, slots, groups, pairs, items, place, first, GROUP, D, BLOCK, STRIDE, RATIO, CONSUMERS)
    channels = open_channels(q_desc, k_desc, CONSUMERS, STAGES, HELD, True, False)
    gl.warp_specialize([
        (dq_consume, (0, rows, channels, dq_desc, row_lse, delta, scale_log2, scale)),
        (dq_consume, (1, rows, channels, dq_desc, row_lse, delta, scale_log2, scale)),
        (produce, (rows, channels, q_desc, dout_desc, k_desc, v_desc, True)),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


# ------------------------------------------------------------------------------------------------ dk and dv


@aggregate
class Shares:
    """Which tiles of 64 rows a tile of slots meets, and which of them an item takes: its share, all alike."""

    begin: gl.tensor  # (B, tiles) int32: the first token that sees anything of the tile
    full: gl.tensor  # the first that sees its end
    rest: gl.tensor  # the first that doesn't see its beginning any more
    end: gl.tensor  # the first that sees nothing of it any more
    tiles: gl.tensor
    shares: gl.tensor

    @gluon.constexpr_function
    def __init__(self, begin, full, rest, end, tiles, shares):
        self.begin = begin
        self.full = full
        self.rest = rest
        self.end = end
        self.tiles = tiles
        self.shares = shares

    @gluon.jit
    def locate(self, rows, item):
        """(share, batch row, key/value head, first tile of slots). The earliest slots first, most rows see them."""
        share = item // rows.pairs % self.shares
        pair = item % rows.pairs
        tile = item // rows.pairs // self.shares * rows.CONSUMERS
        return share, pair // rows.groups, pair % rows.groups, tile

    @gluon.jit
    def seen_by(self, rows, batch, tile, last_tile):
        """[first, last) tiles of rows that see anything of the tiles of slots `tile` .. `last_tile`."""
        base = batch * self.tiles
        first = gl.load(self.begin + base + tile) // rows.TOKENS
        last = (gl.load(self.end + base + last_tile) + (rows.TOKENS - 1)) // rows.TOKENS
        return first, gl.maximum(last, first)

    @gluon.jit
    def range(self, rows, share, batch, tile):
        """[first, last) tiles of rows of an item."""
        first, last = self.seen_by(rows, batch, tile, tile + (rows.CONSUMERS - 1))
        count = last - first
        return first + count * share // self.shares, first + count * (share + 1) // self.shares


@gluon.jit
def dkv_produce(rows, shares, channels, k_desc, v_desc, q_desc, dout_desc, row_lse, delta, bias_factor):
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [32, 1], [1, 1], [1, 0])
    row = gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))
    CONSUMERS: gl.constexpr = rows.CONSUMERS
    ring = start_ring(channels.passing.shape[0])
    number = gl.to_tensor(0)
    for item in range(gl.program_id(0), rows.items, gl.num_programs(0)):
        share, batch, kv_head, tile = shares.locate(rows, item)
        first, last = shares.range(rows, share, batch, tile)
        for c in gl.static_range(CONSUMERS):
            channels.hold(c, number, k_desc, v_desc, [batch, (tile + c) * TILE, kv_head, 0], True)
        lse, d = load_columns(rows, row_lse, delta, batch, kv_head, first, row)
        for i in range(first, last):
            channels.fetch(ring, q_desc, dout_desc, [batch, i * rows.TOKENS, kv_head * rows.GROUP, 0])
            columns = query_columns(gl.maximum(-lse, NOTHING) * bias_factor, -d, layout)
            lse, d = load_columns(rows, row_lse, delta, batch, kv_head, i + 1, row)  # on its way during the rest
            channels.columns.index(ring.slot).store(columns)
            fence_async_shared()
            channels.announce(ring, q_desc)  # also says that the columns are written
            ring = ring.next()
        number += 1


@gluon.jit
def load_columns(rows, row_lse, delta, batch, kv_head, tile, row):
    """lse and delta of a tile of rows; a row that doesn't exist has an lse so high that no slot has weight."""
    at, inside = rows.numbers(batch, kv_head, tile * rows.TOKENS, row)
    return gl.load(row_lse + at, mask=inside, other=float("inf")), gl.load(delta + at, mask=inside, other=0.0)


@gluon.jit
def dkv_consume(C: gl.constexpr, rows, shares, channels, dk_ptr, dv_ptr, scale_log2, scale, dtype: gl.constexpr):
    """Warpgroup C: the C-th tile of slots of every item. Matrices are held transposed, (slots, rows)."""
    D: gl.constexpr = rows.D
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    column = gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(0, a_layout)), 0)
    nothing = gl.full([TILE, 16], 0.0, gl.bfloat16, a_layout)
    one = gl.full([TILE, 16], 1.0, gl.bfloat16, a_layout)
    for_reference = gl.where(column < 3, one, nothing)
    for_delta = gl.where((column >= 3) & (column < 6), one, nothing)
    ring = start_ring(channels.passing.shape[0])
    number = gl.to_tensor(0)
    for item in range(gl.program_id(0), rows.items, gl.num_programs(0)):
        share, batch, kv_head, tile = shares.locate(rows, item)
        item_first, item_last = shares.range(rows, share, batch, tile)
        tile += C
        first, last = shares.seen_by(rows, batch, tile, tile)
        first = gl.minimum(gl.maximum(first, item_first), item_last)
        last = gl.maximum(gl.minimum(last, item_last), first)
        clear_first = (gl.load(shares.full + batch * shares.tiles + tile) + (rows.TOKENS - 1)) // rows.TOKENS
        clear_last = gl.load(shares.rest + batch * shares.tiles + tile) // rows.TOKENS

        at = channels.wait_held(C, number)
        k = channels.held.index(at).reshape([TILE, D])
        v = channels.held_too.index(at).reshape([TILE, D])
        dk = gl.zeros([TILE, D], gl.float32, o_layout)
        dv = gl.zeros([TILE, D], gl.float32, o_layout)
        for _ in range(first - item_first):
            ring = channels.pass_on(ring)
        for i in range(first, last):
            mbarrier.wait(channels.ready.index(ring.slot), ring.parity)
            q = channels.passing.index(ring.slot)
            do = channels.passing_too.index(ring.slot)
            columns = channels.columns.index(ring.slot).permute((1, 0))
            s = gl.zeros([TILE, TILE], gl.float32, s_layout)
            s = warpgroup_mma(for_reference, columns, s, use_acc=False, is_async=True)
            s = warpgroup_mma(k, q.reshape([TILE, D]).permute((1, 0)), s, is_async=True)
            dp = gl.zeros([TILE, TILE], gl.float32, s_layout)
            dp = warpgroup_mma(for_delta, columns, dp, use_acc=False, is_async=True)
            dp = warpgroup_mma(v, do.reshape([TILE, D]).permute((1, 0)), dp, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            if (i < clear_first) | (i >= clear_last):
                row = gl.arange(0, TILE, layout=gl.SliceLayout(0, s_layout))
                place, begins = rows.look(batch, kv_head, i * rows.TOKENS + row // rows.GROUP)
                slot = tile * TILE + gl.expand_dims(gl.arange(0, TILE, layout=gl.SliceLayout(1, s_layout)), 1)
                low, high = rows.low(begins), rows.high(place, begins)
                seen = (slot >= gl.expand_dims(low, 0)) & (slot < gl.expand_dims(high, 0))
                s = gl.where(seen, s, float("-inf"))
            e = gl.exp2(s * scale_log2)
            p = gl.convert_layout(e.to(dtype), p_layout)
            dv = warpgroup_mma(p, do.reshape([TILE, D]), dv, is_async=True)
            dp = warpgroup_mma_wait(1, deps=(dp,))
            ds = gl.convert_layout((e * dp).to(dtype), p_layout)
            dk = warpgroup_mma(ds, q.reshape([TILE, D]), dk, is_async=True)
            dk, dv, p, ds = warpgroup_mma_wait(0, deps=(dk, dv, p, ds))
            mbarrier.arrive(channels.free.index(ring.slot), count=1)
            ring = ring.next()
        for _ in range(item_last - last):
            ring = channels.pass_on(ring)
        mbarrier.arrive(channels.held_free.index(at), count=1)
        batches = rows.pairs // rows.groups
        slot = tile * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, o_layout))
        where = (((share * batches + batch).to(gl.int64) * rows.slots + slot) * rows.groups + kv_head) * D
        where = gl.expand_dims(where, 1) + gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, o_layout)), 0)
        inside = gl.expand_dims(slot < rows.slots, 1)
        gl.store(dk_ptr + where, dk * scale, mask=inside)
        gl.store(dv_ptr + where, dv, mask=inside)
        number += 1


@gluon.jit(do_not_specialize=["tiles", "shares", "tokens", "slots", "groups", "pairs", "items"])
def dkv_kernel(
    k_desc, v_desc, q_desc, dout_desc, place, first, begin, full, rest, end, row_lse, delta, dk_ptr, dv_ptr,
    scale_log2, bias_factor, scale, tiles, shares, tokens, slots, groups, pairs, items,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, STRIDE: gl.constexpr, RATIO: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    gl.static_assert(CONSUMERS == 2)
    dtype: gl.constexpr = q_desc.dtype
    rows = Rows(tokens, slots, groups, pairs, items, place, first, GROUP, D, BLOCK, STRIDE, RATIO, CONSUMERS)
    parts = Shares(begin, full, rest, end, tiles, shares)
    channels = open_channels(k_desc, q_desc, CONSUMERS, STAGES, 1, True, True)
    gl.warp_specialize([
        (dkv_consume, (0, rows, parts, channels, dk_ptr, dv_ptr, scale_log2, scale, dtype)),
        (dkv_consume, (1, rows, parts, channels, dk_ptr, dv_ptr, scale_log2, scale, dtype)),
        (dkv_produce, (rows, parts, channels, k_desc, v_desc, q_desc, dout_desc, row_lse, delta, bias_factor)),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


def compressed_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    places: Any,
    geometry: Any,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, of a call that `takes` accepts."""
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    group, pairs = heads // kv_heads, batch * kv_heads
    q, k, v, dout = (copyable(x) for x in (q, k, v, dout.contiguous()))
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    row_lse, delta = row_numbers(dout, dlse, out.contiguous(), lse)
    scale_log2 = scale * LOG2E.value
    spots = (places.place, places.first_block)
    shape = (group, dim, geometry.block, geometry.stride, geometry.ratio)

    plan = DQ[dim]
    items = triton.cdiv(length, plan.consumers * 64 // group) * pairs
    dq_kernel[(min(items, programs(q)),)](
        packed(q, group), packed(dout, group), descriptor(k), descriptor(v), packed(dq, group), *spots, row_lse, delta,
        scale_log2, scale, length, k.shape[1], kv_heads, pairs, items, *shape, plan.consumers, plan.stages,
        plan.consumer_registers, plan.producer_registers, num_warps=4, maxnreg=plan.registers_at_launch,
    )  # fmt: skip

    plan = DKV[dim]
    blocks = triton.cdiv(k.shape[1], 64 * plan.consumers)
    shares = triton.cdiv(programs(q), pairs)
    items = blocks * shares * pairs
    tiles = blocks * plan.consumers
    (begin, end), (full, rest) = (seen_by(places, geometry, tiles, 64, whole=whole) for whole in (False, True))
    dk, dv = (q.new_empty((shares, *k.shape), dtype=torch.float32) for _ in range(2))
    dkv_kernel[(min(items, programs(q)),)](
        descriptor(k), descriptor(v), packed(q, group), packed(dout, group), *spots, begin, full, rest, end,
        row_lse, delta, dk, dv, scale_log2, 1 / scale_log2, scale, tiles, shares,
        length, k.shape[1], kv_heads, pairs, items, *shape, plan.consumers, plan.stages,
        plan.consumer_registers, plan.producer_registers, num_warps=4, maxnreg=plan.registers_at_launch,
    )  # fmt: skip
    return dq, dk.sum(0).to(k.dtype), dv.sum(0).to(v.dtype)
