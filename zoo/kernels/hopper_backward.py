"""Gated causal sliding-window attention, backward, for Hopper (sm_90), in Gluon. Deterministic: no atomics.

    P_tj = exp(scale q_t.k_j + U_t - U_j - lse_t)        delta_t = out_t.dout_t - dlse_t
    dS_tj = P_tj (dout_t.v_j - delta_t)                  dU_j = sum_i dS_ji - sum_t dS_tj
    dq_t = scale sum_j dS_tj k_j      dk_j = scale sum_t dS_tj q_t      dv_j = sum_t P_tj dout_t

Two kernels of the forward's shape, one warp that produces and warpgroups of 64 rows that consume:
- dq: rows are queries, keys pass by. It also computes delta, and leaves lse, delta and the query side of dU for
- dk, dv, dU: rows are keys, the queries of all heads of the group pass by, so K and V are never repeated. What belongs
  to a query, U_t - lse_t and -delta_t, is added on the tensor core like the forward's bias: three bf16 columns each.
"""

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

from zoo.kernels import gate as gates
from zoo.kernels.hopper_band import (
    LOG2E, NOTHING, TILE, TILES_PER_CHUNK, Problem, Schedule, bias_columns, copyable, descriptor, lane_sum, programs, send, split_in_three, start_ring, visible,
)  # fmt: skip


@aggregate
class Channels:
    """Shared memory between producer and consumers, and the barriers that guard it.

    `held` and `held_too` stay with a consumer for an item (q and dout, or k and v); `passing` and `passing_too` go by
    (k and v, or q and dout) with `columns`, which the tensor core adds to the logits.
    """

    held: gl.shared_memory_descriptor
    held_too: gl.shared_memory_descriptor
    passing: gl.shared_memory_descriptor
    passing_too: gl.shared_memory_descriptor
    columns: gl.shared_memory_descriptor
    held_ready: gl.shared_memory_descriptor
    held_free: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, held, held_too, passing, passing_too, columns, held_ready, held_free, ready, free):
        self.held = held
        self.held_too = held_too
        self.passing = passing
        self.passing_too = passing_too
        self.columns = columns
        self.held_ready = held_ready
        self.held_free = held_free
        self.ready = ready
        self.free = free

    @gluon.jit
    def pass_on(self, ring):
        """Hands the tile in this slot back unseen. Waits first: an early arrival would count for its predecessor."""
        mbarrier.wait(self.ready.index(ring.slot), ring.parity)
        mbarrier.arrive(self.free.index(ring.slot), count=1)
        return ring.next()


@gluon.jit
def open_channels(held_desc, passing_desc, CONSUMERS: gl.constexpr, STAGES: gl.constexpr):
    dtype: gl.constexpr = held_desc.dtype
    D: gl.constexpr = held_desc.block_type.shape[3]
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    channels = Channels(
        gl.allocate_shared_memory(dtype, [CONSUMERS, 1, TILE, 1, D], held_desc.layout),
        gl.allocate_shared_memory(dtype, [CONSUMERS, 1, TILE, 1, D], held_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, TILE, 1, D], passing_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, TILE, 1, D], passing_desc.layout),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, 16], gl.NVMMASharedLayout(32, 16, 2)),
        gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
    )
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(channels.held_ready.index(c), count=1)
        mbarrier.init(channels.held_free.index(c), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(channels.ready.index(s), count=1)
        mbarrier.init(channels.free.index(s), count=CONSUMERS)
    return channels


@gluon.jit
def load_held(channels, c: gl.constexpr, desc, desc_too, where, parity):
    nbytes: gl.constexpr = 2 * desc.block_type.nbytes
    mbarrier.wait(channels.held_free.index(c), parity ^ 1)
    mbarrier.expect(channels.held_ready.index(c), nbytes)
    tma.async_copy_global_to_shared(desc, where, channels.held_ready.index(c), channels.held.index(c))
    tma.async_copy_global_to_shared(desc_too, where, channels.held_ready.index(c), channels.held_too.index(c))


@gluon.jit
def load_passing(channels, ring, desc, desc_too, where):
    """Once the slot is free. `announce` must follow."""
    ready = channels.ready.index(ring.slot)
    mbarrier.wait(channels.free.index(ring.slot), ring.parity ^ 1)
    tma.async_copy_global_to_shared(desc, where, ready, channels.passing.index(ring.slot))
    tma.async_copy_global_to_shared(desc_too, where, ready, channels.passing_too.index(ring.slot))


@gluon.jit
def announce(channels, ring, desc):
    """The slot is ready when the bytes of both tiles have come; what was written to it before this call, at once."""
    nbytes: gl.constexpr = 2 * desc.block_type.nbytes
    mbarrier.expect(channels.ready.index(ring.slot), nbytes)


@gluon.jit
def as_operand(tile, D: gl.constexpr, A_SHARED: gl.constexpr, layout: gl.constexpr):
    """A resident left-hand side: in registers where they suffice, which halves what a product reads from shared memory."""
    if A_SHARED:
        return tile.reshape([TILE, D])
    else:
        return tile.reshape([TILE, D]).load(layout)


@gluon.jit
def score(a, tile, D: gl.constexpr, ones, columns, ADD: gl.constexpr, layout: gl.constexpr):
    """a tile^T (+ ones columns^T), (64, 64), in flight."""
    s = gl.zeros([TILE, TILE], gl.float32, layout)
    b = tile.reshape([TILE, D]).permute((1, 0))
    if ADD:
        s = warpgroup_mma(ones, columns.permute((1, 0)), s, use_acc=False, is_async=True)
        return warpgroup_mma(a, b, s, is_async=True)
    else:
        return warpgroup_mma(a, b, s, use_acc=False, is_async=True)


# ------------------------------------------------------------------------------------------------ dq


@gluon.jit
def dq_produce(problem, channels, q_desc, dout_desc, k_desc, v_desc, bias_factor):
    CONSUMERS: gl.constexpr = problem.CONSUMERS
    columns_layout: gl.constexpr = gl.BlockedLayout([1, 16], [32, 1], [1, 1], [1, 0])
    vector_layout: gl.constexpr = gl.SliceLayout(1, columns_layout)
    ring = start_ring(channels.passing.shape[0])
    parity = gl.to_tensor(0)
    for item in range(gl.program_id(0), problem.items, gl.num_programs(0)):
        batch, head, tile = problem.locate(item)
        first_row = tile * TILE - (problem.keys - problem.queries)
        newest = problem.newest(tile + CONSUMERS - 1)
        count = newest - problem.oldest(tile, batch) + 1
        carry = gl.to_tensor(0.0)  # the totals of the chunks after this tile's, up to the newest
        gain = gl.to_tensor(0.0)
        suffix = gl.zeros([TILE], gl.float32, vector_layout)
        if problem.GATED:
            suffix, _ = problem.load_suffix(batch, head, newest, vector_layout)
        for i in range(gl.maximum(count, CONSUMERS)):
            for c in gl.static_range(CONSUMERS):
                if i == CONSUMERS - 1 - c:
                    load_held(channels, c, q_desc, dout_desc, [batch, first_row + TILE * c, head, 0], parity)
            if i < count:
                key = newest - i
                load_passing(channels, ring, k_desc, v_desc, [batch, key * TILE, head // problem.group, 0])
                if problem.GATED:
                    carry += gain
                    bias = (carry + suffix) * bias_factor
                    suffix, gain = problem.load_suffix(batch, head, key - 1, vector_layout)  # on its way during the rest
                    channels.columns.index(ring.slot).store(bias_columns(bias, columns_layout))
                    fence_async_shared()
                announce(channels, ring, k_desc)
                ring = ring.next()
        parity = parity ^ 1


@gluon.jit
def dq_consume(C: gl.constexpr, problem, channels, dq_tiles, dq_desc, dq_ptr, out, dout, lse, dlse, rows, scale_log2, scale, WITH_DLSE: gl.constexpr):  # fmt: skip
    """Warpgroup C: 64 queries of every item. rows (3,B,H,T) fp32 gets lse in log2 units, delta, and sum_j dS_tj."""
    D: gl.constexpr = problem.D
    dtype: gl.constexpr = dq_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    ones = gl.full([TILE, 16], 1.0, gl.bfloat16, q_layout)
    ring = start_ring(channels.passing.shape[0])
    parity = gl.to_tensor(0)
    for item in range(gl.program_id(0), problem.items, gl.num_programs(0)):
        batch, head, block_tile = problem.locate(item)
        tile = block_tile + C
        block_newest = problem.newest(block_tile + problem.CONSUMERS - 1)
        block_oldest = problem.oldest(block_tile, batch)
        newest = problem.newest(tile)
        oldest = problem.oldest(tile, batch)
        inside = tile <= newest
        position = tile * TILE + gl.arange(0, TILE, layout=row_layout)
        first_visible, latest_start = problem.first_visible(batch, position)
        shift = gl.zeros([TILE], gl.float32, row_layout)
        if problem.GATED:
            shift = problem.row_bias(tile, block_newest, batch, head, position, problem.CONSUMERS - 1 - C)
        row = position - (problem.keys - problem.queries)
        mine = (row >= 0) & (row < problem.queries)
        delta = row_products(problem, out, dout, batch, head, tile, row_layout)
        at = (batch.to(gl.int64) * problem.queries + row) * problem.heads + head
        if WITH_DLSE:
            delta -= gl.load(dlse + at, mask=mine, other=0.0)
        lse2 = gl.load(lse + at, mask=mine, other=0.0) * LOG2E
        lse2 = gl.where(lse2 == float("-inf"), 0.0, lse2)  # a row without keys: every logit is masked
        at = rows + (batch * problem.heads + head).to(gl.int64) * problem.queries + row
        gl.store(at, lse2, mask=mine)
        gl.store(at + problem.rows_stride(), delta, mask=mine)
        shift += lse2

        for _ in range(gl.where(inside, block_newest - newest, block_newest - block_oldest + 1)):
            ring = channels.pass_on(ring)
        mbarrier.wait(channels.held_ready.index(C), parity)
        if inside:
            q = as_operand(channels.held.index(C), D, problem.A_SHARED, q_layout)
            do = as_operand(channels.held_too.index(C), D, problem.A_SHARED, q_layout)
            if not problem.A_SHARED:
                fence_async_shared()
                mbarrier.arrive(channels.held_free.index(C), count=1)
            dq = gl.zeros([TILE, D], gl.float32, o_layout)
            clear = gl.maximum(tile * TILE + TILE - problem.window, latest_start)

            mbarrier.wait(channels.ready.index(ring.slot), ring.parity)
            s = score(q, channels.passing.index(ring.slot), D, ones, channels.columns.index(ring.slot), problem.GATED, s_layout)
            dp = score(do, channels.passing_too.index(ring.slot), D, ones, channels.columns.index(ring.slot), False, s_layout)
            s = warpgroup_mma_wait(1, deps=(s,))
            s = gl.where(visible(newest * TILE, position, first_visible, s_layout), s, float("-inf"))
            p = gl.exp2(s * scale_log2 - gl.expand_dims(shift, 1))
            dp = warpgroup_mma_wait(0, deps=(dp,))
            ds = p * (dp - gl.expand_dims(delta, 1))
            gathered = lane_sum(ds, 64)
            ds = gl.convert_layout(ds.to(dtype), ds_layout)
            for i in range(newest - oldest):
                slot = ring.slot
                ring = ring.next()
                mbarrier.wait(channels.ready.index(ring.slot), ring.parity)
                s = score(q, channels.passing.index(ring.slot), D, ones, channels.columns.index(ring.slot), problem.GATED, s_layout)
                dq = warpgroup_mma(ds, channels.passing.index(slot).reshape([TILE, D]), dq, is_async=True)
                dp = score(do, channels.passing_too.index(ring.slot), D, ones, channels.columns.index(ring.slot), False, s_layout)
                s = warpgroup_mma_wait(2, deps=(s,))
                first = (newest - 1 - i) * TILE
                if first < clear:
                    s = gl.where(visible(first, position, first_visible, s_layout), s, float("-inf"))
                p = gl.exp2(s * scale_log2 - gl.expand_dims(shift, 1))
                if problem.A_SHARED:
                    dq, dp, ds = warpgroup_mma_wait(0, deps=(dq, dp, ds))
                else:
                    dq, dp, ds, q, do = warpgroup_mma_wait(0, deps=(dq, dp, ds, q, do))
                mbarrier.arrive(channels.free.index(slot), count=1)
                e = p * (dp - gl.expand_dims(delta, 1))
                if problem.GATED:
                    gathered += lane_sum(e, 64)
                ds = gl.convert_layout(e.to(dtype), ds_layout)

            if problem.A_SHARED:
                mbarrier.arrive(channels.held_free.index(C), count=1)
            dq = warpgroup_mma(ds, channels.passing.index(ring.slot).reshape([TILE, D]), dq, is_async=True)
            dq = warpgroup_mma_wait(0, deps=(dq,))
            ring = channels.pass_on(ring)
            if problem.GATED:
                gl.store(at + 2 * problem.rows_stride(), gl.convert_layout(gl.sum(gathered, 1), row_layout), mask=mine)
            first_row = tile * TILE - (problem.keys - problem.queries)
            send((dq * scale).to(dtype), dq_tiles.index(C), dq_desc, dq_ptr, problem, batch, first_row, head)
            for _ in range(oldest - block_oldest):
                ring = channels.pass_on(ring)
        else:
            mbarrier.arrive(channels.held_free.index(C), count=1)
        parity = parity ^ 1
    tma.store_wait(0)


@gluon.jit
def row_products(problem, out, dout, batch, head, tile, layout: gl.constexpr):
    """delta: sum over d of out times dout, (64,) fp32. Both are contiguous (B,T,H,D)."""
    D: gl.constexpr = problem.D
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    row = tile * TILE - (problem.keys - problem.queries) + gl.arange(0, TILE, layout=gl.SliceLayout(1, wide))
    column = gl.arange(0, D, layout=gl.SliceLayout(0, wide))
    at = ((batch.to(gl.int64) * problem.queries + row) * problem.heads + head) * D
    at = gl.expand_dims(at, 1) + gl.expand_dims(column, 0)
    mask = gl.expand_dims((row >= 0) & (row < problem.queries), 1)
    a = gl.load(out + at, mask=mask, other=0.0).to(gl.float32)
    b = gl.load(dout + at, mask=mask, other=0.0).to(gl.float32)
    return gl.convert_layout(gl.sum(a * b, 1), layout)


@gluon.jit(do_not_specialize=["batches", "heads", "group", "queries", "keys", "window", "blocks", "items"])
def dq_kernel(
    q_desc, dout_desc, k_desc, v_desc, dq_desc, dq_ptr, out, dout, suffix, total, starts, lse, dlse, rows, scale_log2, bias_factor, scale,
    batches, heads, group, queries, keys, window, blocks, items,
    CONSUMERS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr, BOUNDED: gl.constexpr,
    A_SHARED: gl.constexpr, WITH_DLSE: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    problem = Problem(batches, heads, group, queries, keys, window, blocks, items, starts, suffix, total,
                      CONSUMERS, D, GATED, BOUNDED, A_SHARED)  # fmt: skip
    channels = open_channels(q_desc, k_desc, CONSUMERS, STAGES)
    dq_tiles = gl.allocate_shared_memory(dq_desc.dtype, [CONSUMERS, 1, TILE, 1, D], dq_desc.layout)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (dq_consume, (0, problem, channels, dq_tiles, dq_desc, dq_ptr, out, dout, lse, dlse, rows, scale_log2, scale, WITH_DLSE)),
            (dq_consume, (1, problem, channels, dq_tiles, dq_desc, dq_ptr, out, dout, lse, dlse, rows, scale_log2, scale, WITH_DLSE)),
            (dq_produce, (problem, channels, q_desc, dout_desc, k_desc, v_desc, bias_factor)),
        ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize([
            (dq_consume, (0, problem, channels, dq_tiles, dq_desc, dq_ptr, out, dout, lse, dlse, rows, scale_log2, scale, WITH_DLSE)),
            (dq_consume, (1, problem, channels, dq_tiles, dq_desc, dq_ptr, out, dout, lse, dlse, rows, scale_log2, scale, WITH_DLSE)),
            (dq_consume, (2, problem, channels, dq_tiles, dq_desc, dq_ptr, out, dout, lse, dlse, rows, scale_log2, scale, WITH_DLSE)),
            (dq_produce, (problem, channels, q_desc, dout_desc, k_desc, v_desc, bias_factor)),
        ], [4, 4, 1], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


# ------------------------------------------------------------------------------------------------ dk, dv, dU


@gluon.jit
def last_queries(problem, ends, batch, key):
    """The newest position that sees each key; before the key itself where none does (padding)."""
    last = gl.minimum(key + problem.window, problem.keys) - 1
    if problem.BOUNDED:
        at = batch.to(gl.int64) * problem.keys + gl.minimum(key, problem.keys - 1)
        last = gl.minimum(last, gl.load(ends + at) - 1)
        last = gl.where(gl.load(problem.starts + at) > key, -1, last)
    return last


@gluon.jit
def newest_query(problem, ends, batch, tile):
    """The newest query tile that sees anything of key tile `tile`."""
    key = gl.minimum(tile * TILE + TILE, problem.keys) - 1
    last = gl.minimum(key + problem.window, problem.keys) - 1
    if problem.BOUNDED:
        last = gl.minimum(last, gl.load(ends + batch.to(gl.int64) * problem.keys + key) - 1)
    return gl.maximum(last, key) // TILE


@gluon.jit
def dkv_produce(problem, channels, k_desc, v_desc, q_desc, dout_desc, ends, rows, bias_factor):
    CONSUMERS: gl.constexpr = problem.CONSUMERS
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [32, 1], [1, 1], [1, 0])
    offset = problem.keys - problem.queries
    ring = start_ring(channels.passing.shape[0])
    parity = gl.to_tensor(0)
    for item in range(gl.program_id(0), problem.items, gl.num_programs(0)):
        batch, kv_head, tile = locate_keys(problem, item)
        oldest = gl.maximum(tile, offset // TILE)
        last_tile = gl.minimum(tile + CONSUMERS - 1, (problem.keys - 1) // TILE)
        count = gl.maximum(newest_query(problem, ends, batch, last_tile) - oldest + 1, 1)
        for member in range(problem.group):
            head = kv_head * problem.group + member
            carry = gl.to_tensor(0.0)  # the totals of the chunks after the item's first, up to this tile's
            if problem.GATED:
                _, total = problem.gate_rows(batch, head)
                for chunk in range(tile // TILES_PER_CHUNK, oldest // TILES_PER_CHUNK):
                    carry += gl.load(total + chunk + 1)
            lse, suffix, delta, gain = load_rows(problem, rows, batch, head, oldest, gl.SliceLayout(1, layout))
            for i in range(gl.maximum(count, CONSUMERS)):
                if member == 0:
                    for c in gl.static_range(CONSUMERS):
                        if i == c:
                            load_held(channels, c, k_desc, v_desc, [batch, (tile + c) * TILE, kv_head, 0], parity)
                if i < count:
                    query = oldest + i
                    load_passing(channels, ring, q_desc, dout_desc, [batch, query * TILE - offset, head, 0])
                    columns = query_columns((carry - suffix - lse) * bias_factor, -delta, layout)
                    carry += gain
                    lse, suffix, delta, gain = load_rows(problem, rows, batch, head, query + 1, gl.SliceLayout(1, layout))
                    channels.columns.index(ring.slot).store(columns)
                    fence_async_shared()
                    announce(channels, ring, q_desc)
                    ring = ring.next()
        parity = parity ^ 1


@gluon.jit
def load_rows(problem, rows, batch, head, tile, layout: gl.constexpr):
    """Of a tile's queries: lse, suffix, delta, and what the carry gains from this tile to the next. Where there is no
    query, an lse so high that no key has weight."""
    position = tile * TILE + gl.arange(0, TILE, layout=layout)
    row = position - (problem.keys - problem.queries)
    mine = (row >= 0) & (row < problem.queries)
    at = rows + (batch * problem.heads + head).to(gl.int64) * problem.queries + row
    lse = gl.load(at, mask=mine, other=-NOTHING)
    delta = gl.load(at + problem.rows_stride(), mask=mine, other=0.0)
    suffix = gl.zeros([TILE], gl.float32, layout)
    gain = gl.to_tensor(0.0)
    if problem.GATED:
        suffixes, total = problem.gate_rows(batch, head)
        suffix = gl.load(suffixes + position, mask=mine, other=0.0)
        entering = ((tile + 1) % TILES_PER_CHUNK == 0) & ((tile + 1) * TILE < problem.keys)
        gain = gl.load(total + (tile + 1) // TILES_PER_CHUNK, mask=entering, other=0.0)
    return lse, suffix, delta, gain


@gluon.jit
def locate_keys(problem, item):
    """Batch row, key head, first tile of an item of keys."""
    row = item // problem.blocks
    kv_heads = problem.heads // problem.group
    return row // kv_heads, row % kv_heads, item % problem.blocks * problem.CONSUMERS


@gluon.jit
def query_columns(reference, negative_delta, layout: gl.constexpr):
    """(64, 16) bf16: three pieces of each query's reference, then three of its -delta."""
    high, middle, low = split_in_three(negative_delta)
    column = gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(0, layout)), 0)
    columns = bias_columns(reference, layout)
    columns = gl.where(column == 3, gl.expand_dims(high, 1), columns)
    columns = gl.where(column == 4, gl.expand_dims(middle, 1), columns)
    return gl.where(column == 5, gl.expand_dims(low, 1), columns)


@gluon.jit
def load_keys(C: gl.constexpr, problem, rows, batch, head, block_tile, key, layout: gl.constexpr):
    """Of a consumer's keys, for one query head: the bias, with the item's first chunk as anchor, and the query side of dU."""
    own = gl.zeros([TILE], gl.float32, layout)
    side = gl.zeros([TILE], gl.float32, layout)
    if problem.GATED:
        suffix, total = problem.gate_rows(batch, head)
        inside = key < problem.keys
        own += gl.load(suffix + key, mask=inside, other=0.0)
        chunk = block_tile // TILES_PER_CHUNK
        last = gl.minimum(block_tile + C, (problem.keys - 1) // TILE) // TILES_PER_CHUNK
        for newer in gl.static_range((C + TILES_PER_CHUNK - 1) // TILES_PER_CHUNK):
            own -= gl.load(total + chunk + 1 + newer, mask=chunk + 1 + newer <= last, other=0.0)
        row = key - (problem.keys - problem.queries)
        at = rows + 2 * problem.rows_stride() + (batch * problem.heads + head).to(gl.int64) * problem.queries + row
        side += gl.load(at, mask=inside & (row >= 0), other=0.0)
    return own, side


@gluon.jit
def dkv_consume(C: gl.constexpr, problem, channels, dk_tiles, dv_tiles, dk_desc, dv_desc, ends, rows, dprefix, scale_log2, scale):
    """Warpgroup C: 64 keys of every item. dprefix (B,H,N) fp32, nats: the key side, and the query side from `rows`."""
    D: gl.constexpr = problem.D
    dtype: gl.constexpr = dk_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    column = gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(0, a_layout)), 0)
    for_reference = gl.where(column < 3, gl.full([TILE, 16], 1.0, gl.bfloat16, a_layout), 0.0)
    for_delta = gl.where((column >= 3) & (column < 6), gl.full([TILE, 16], 1.0, gl.bfloat16, a_layout), 0.0)
    offset = problem.keys - problem.queries
    ring = start_ring(channels.passing.shape[0])
    parity = gl.to_tensor(0)
    for item in range(gl.program_id(0), problem.items, gl.num_programs(0)):
        batch, kv_head, block_tile = locate_keys(problem, item)
        tile = block_tile + C
        block_oldest = gl.maximum(block_tile, offset // TILE)
        last_tile = gl.minimum(block_tile + problem.CONSUMERS - 1, (problem.keys - 1) // TILE)
        block_newest = gl.maximum(newest_query(problem, ends, batch, last_tile), block_oldest)
        oldest = gl.minimum(gl.maximum(tile, block_oldest), block_newest + 1)
        newest = gl.minimum(newest_query(problem, ends, batch, gl.minimum(tile, last_tile)), block_newest)
        newest = gl.where(tile <= last_tile, gl.maximum(newest, oldest - 1), oldest - 1)
        key = tile * TILE + gl.arange(0, TILE, layout=row_layout)
        last = last_queries(problem, ends, batch, key)
        clear = gl.min(last, 0)  # a query tile up to here has no far edge

        own, side = load_keys(C, problem, rows, batch, kv_head * problem.group, block_tile, key, row_layout)
        mbarrier.wait(channels.held_ready.index(C), parity)
        k = as_operand(channels.held.index(C), D, problem.A_SHARED, a_layout)
        v = as_operand(channels.held_too.index(C), D, problem.A_SHARED, a_layout)
        if not problem.A_SHARED:
            fence_async_shared()
            mbarrier.arrive(channels.held_free.index(C), count=1)
        dk = gl.zeros([TILE, D], gl.float32, o_layout)
        dv = gl.zeros([TILE, D], gl.float32, o_layout)
        for member in range(problem.group):
            head = kv_head * problem.group + member
            gathered = gl.zeros([TILE, TILE], gl.float32, s_layout)
            gathered = lane_sum(gathered, 64)
            for _ in range(oldest - block_oldest):
                ring = channels.pass_on(ring)
            for i in range(newest - oldest + 1):
                mbarrier.wait(channels.ready.index(ring.slot), ring.parity)
                columns = channels.columns.index(ring.slot)
                s = score(k, channels.passing.index(ring.slot), D, for_reference, columns, True, s_layout)
                dp = score(v, channels.passing_too.index(ring.slot), D, for_delta, columns, True, s_layout)
                s = warpgroup_mma_wait(1, deps=(s,))
                first = (oldest + i) * TILE
                if (first < tile * TILE + TILE) | (first + TILE - 1 > clear):
                    query = first + gl.expand_dims(gl.arange(0, TILE, layout=gl.SliceLayout(0, s_layout)), 0)
                    seen = (query >= gl.expand_dims(key, 1)) & (query <= gl.expand_dims(last, 1))
                    s = gl.where(seen, s, float("-inf"))
                e = gl.exp2(s * scale_log2 + gl.expand_dims(own, 1))
                p = gl.convert_layout(e.to(dtype), p_layout)
                dv = warpgroup_mma(p, channels.passing_too.index(ring.slot).reshape([TILE, D]), dv, is_async=True)
                if problem.A_SHARED:
                    dp = warpgroup_mma_wait(1, deps=(dp,))
                else:  # a left side in registers is listed too: ptxas has been seen to overwrite one that was still wanted
                    dp, k, v = warpgroup_mma_wait(1, deps=(dp, k, v))
                e *= dp
                gathered += lane_sum(e, 64)
                ds = gl.convert_layout(e.to(dtype), p_layout)
                dk = warpgroup_mma(ds, channels.passing.index(ring.slot).reshape([TILE, D]), dk, is_async=True)
                dk, dv, p, ds = warpgroup_mma_wait(0, deps=(dk, dv, p, ds))
                mbarrier.arrive(channels.free.index(ring.slot), count=1)
                ring = ring.next()
            for _ in range(block_newest - gl.maximum(newest, oldest - 1)):
                ring = channels.pass_on(ring)
            if problem.GATED:
                side -= gl.convert_layout(gl.sum(gathered, 1), row_layout)
                at = dprefix + (batch * problem.heads + head).to(gl.int64) * problem.keys + key
                gl.store(at, side, mask=key < problem.keys)
                if member + 1 < problem.group:
                    own, side = load_keys(C, problem, rows, batch, head + 1, block_tile, key, row_layout)

        if not problem.A_SHARED:
            tma.store_wait(0)
        dk_tiles.index(C).reshape([TILE, D]).store((dk * scale).to(dtype))
        dv_tiles.index(C).reshape([TILE, D]).store(dv.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(dk_desc, [batch, tile * TILE, kv_head, 0], dk_tiles.index(C))
        tma.async_copy_shared_to_global(dv_desc, [batch, tile * TILE, kv_head, 0], dv_tiles.index(C))
        if problem.A_SHARED:  # k and v gave their place to dk and dv
            tma.store_wait(0)
            mbarrier.arrive(channels.held_free.index(C), count=1)
        parity = parity ^ 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["batches", "heads", "group", "queries", "keys", "window", "blocks", "items"])
def dkv_kernel(
    k_desc, v_desc, q_desc, dout_desc, dk_desc, dv_desc, suffix, total, starts, ends, rows, dprefix, scale_log2, bias_factor, scale,
    batches, heads, group, queries, keys, window, blocks, items,
    CONSUMERS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr, BOUNDED: gl.constexpr,
    A_SHARED: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    problem = Problem(batches, heads, group, queries, keys, window, blocks, items, starts, suffix, total,
                      CONSUMERS, D, GATED, BOUNDED, A_SHARED)  # fmt: skip
    channels = open_channels(k_desc, q_desc, CONSUMERS, STAGES)
    if A_SHARED:
        dk_tiles = channels.held
        dv_tiles = channels.held_too
    else:
        dk_tiles = gl.allocate_shared_memory(dk_desc.dtype, [CONSUMERS, 1, TILE, 1, D], dk_desc.layout)
        dv_tiles = gl.allocate_shared_memory(dv_desc.dtype, [CONSUMERS, 1, TILE, 1, D], dv_desc.layout)
    if CONSUMERS == 1:
        gl.warp_specialize([
            (dkv_consume, (0, problem, channels, dk_tiles, dv_tiles, dk_desc, dv_desc, ends, rows, dprefix, scale_log2, scale)),
            (dkv_produce, (problem, channels, k_desc, v_desc, q_desc, dout_desc, ends, rows, bias_factor)),
        ], [1], [PRODUCER_REGISTERS])  # fmt: skip
    else:
        gl.static_assert(CONSUMERS == 2)
        gl.warp_specialize([
            (dkv_consume, (0, problem, channels, dk_tiles, dv_tiles, dk_desc, dv_desc, ends, rows, dprefix, scale_log2, scale)),
            (dkv_consume, (1, problem, channels, dk_tiles, dv_tiles, dk_desc, dv_desc, ends, rows, dprefix, scale_log2, scale)),
            (dkv_produce, (problem, channels, k_desc, v_desc, q_desc, dout_desc, ends, rows, bias_factor)),
        ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


# ------------------------------------------------------------------------------------------------ the launcher

# by head dim
DQ_TABLE = {64: Schedule(3, 4, True, 160, 32), 128: Schedule(2, 3, True, 224, 56)}
DKV_TABLE = {64: Schedule(2, 4, False, 232, 40), 128: Schedule(2, 3, True, 232, 40)}


def window_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    gate: tuple[Tensor, ...],
    *,
    window: int | None,
    scale: float,
    spans: tuple[Tensor, Tensor] | None,
    dq_schedule: Schedule | None = None,
    dkv_schedule: Schedule | None = None,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """dq, dk, dv and the gradients of `gate`, as zoo.kernels.window.window_backward. bf16 or fp16, D 64 or 128."""
    B, T, H, D = q.shape
    N, G = k.shape[1:3]
    if q.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), tuple(torch.zeros_like(x) for x in gate)
    q, k, v = (copyable(x) for x in (q, k, v))
    out, dout, lse = copyable(out.contiguous()), copyable(dout.contiguous()), lse.contiguous()
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    suffix, total = gates.prefix(gate) if gate else (lse, lse)
    rows = lse.new_empty((3, B, H, T))
    dprefix = lse.new_empty((B, H, N)) if gate else None
    starts, ends = (lse, lse) if spans is None else (x.contiguous() for x in spans)
    scales = (scale * LOG2E.value, 1 / (scale * LOG2E.value), scale)
    sizes = (B, H, H // G, T, N, min(window or N, N))

    plan = dq_schedule or DQ_TABLE[D]
    blocks = triton.cdiv(triton.cdiv(N, 64) - (N - T) // 64, plan.consumers)
    items = blocks * B * H
    dq_kernel[(min(items, programs(q)),)](
        descriptor(q), descriptor(dout), descriptor(k), descriptor(v), descriptor(dq),
        dq, out, dout, suffix, total, starts, lse, lse if dlse is None else dlse.contiguous(), rows, *scales, *sizes, blocks, items,
        plan.consumers, D, plan.stages, bool(gate), spans is not None, plan.in_shared, dlse is not None,
        plan.consumer_registers, plan.producer_registers, num_warps=4, maxnreg=plan.registers_at_launch,
    )  # fmt: skip

    plan = dkv_schedule or DKV_TABLE[D]
    blocks = triton.cdiv(triton.cdiv(N, 64), plan.consumers)
    items = blocks * B * G
    dkv_kernel[(min(items, programs(q) * (2 if plan.consumers == 1 else 1)),)](
        descriptor(k), descriptor(v), descriptor(q), descriptor(dout), descriptor(dk), descriptor(dv),
        suffix, total, starts, ends, rows, dprefix if gate else rows, *scales, *sizes, blocks, items,
        plan.consumers, D, plan.stages, bool(gate), spans is not None, plan.in_shared,
        plan.consumer_registers, plan.producer_registers, num_warps=4, maxnreg=plan.registers_at_launch,
    )  # fmt: skip
    if not gate:
        return dq, dk, dv, ()
    return dq, dk, dv, gates.prefix_backward(dprefix, gate, None if spans is None else spans[1])
