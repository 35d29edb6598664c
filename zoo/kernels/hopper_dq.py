"""dq for Hopper, in Gluon: rows are queries, keys pass by (zoo/kernels/hopper_backward.py has the equations).

The kernel also computes delta, and leaves what the other one needs of each query: lse, delta, the query side of dU.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from zoo.kernels.hopper_band import TILE, Problem, bias_columns, lane_sum, send, start_ring, visible
from zoo.kernels.hopper_channels import announce, as_operand, load_held, load_passing, open_channels, score
from zoo.kernels.units import LOG2E


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
        count = newest - problem.oldest(tile, batch, head) + 1
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
                load_passing(channels, ring, k_desc, v_desc, [batch, key * TILE, head // problem.GROUP, 0])
                if problem.GATED:
                    carry += gain
                    bias = (carry + suffix) * bias_factor
                    suffix, gain = problem.load_suffix(
                        batch, head, key - 1, vector_layout
                    )  # on its way during the rest
                    channels.columns.index(ring.slot).store(bias_columns(bias, columns_layout))
                    fence_async_shared()
                announce(channels, ring, k_desc)
                ring = ring.next()
        parity = parity ^ 1


@gluon.jit
def dq_consume(
    C: gl.constexpr, problem, channels, dq_tiles, dq_desc, dq_ptr, out, dout, lse, dlse, rows, scale_log2, scale,
    WITH_DLSE: gl.constexpr,
):  # fmt: skip
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
    ahead = load_rows(C, problem, out, dout, lse, dlse, gl.program_id(0), row_layout, WITH_DLSE)
    for item in range(gl.program_id(0), problem.items, gl.num_programs(0)):
        batch, head, block_tile = problem.locate(item)
        next_item = gl.minimum(item + gl.num_programs(0), problem.items - 1)
        tile = block_tile + C
        block_newest = problem.newest(block_tile + problem.CONSUMERS - 1)
        block_oldest = problem.oldest(block_tile, batch, head)
        newest = problem.newest(tile)
        oldest = problem.oldest(tile, batch, head)
        inside = tile <= newest
        position = tile * TILE + gl.arange(0, TILE, layout=row_layout)
        first_visible, latest_start = problem.first_visible(batch, position)
        row = position - (problem.keys - problem.queries)
        mine = (row >= 0) & (row < problem.queries)
        outs, douts, lses, dlses, suffix, newer = ahead
        delta = gl.convert_layout(gl.sum(outs.to(gl.float32) * douts.to(gl.float32), 1), row_layout) - dlses
        lse2 = lses * LOG2E
        lse2 = gl.where(lse2 == float("-inf"), 0.0, lse2)  # a row without keys: every logit is masked
        at = rows + (batch * problem.heads + head).to(gl.int64) * problem.queries + row
        gl.store(at, lse2, mask=mine)
        gl.store(at + problem.rows_stride(), delta, mask=mine)
        shift = suffix + newer + lse2

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
            s = score(
                q,
                channels.passing.index(ring.slot),
                D,
                ones,
                channels.columns.index(ring.slot),
                problem.GATED,
                s_layout,
            )
            dp = score(
                do, channels.passing_too.index(ring.slot), D, ones, channels.columns.index(ring.slot), False, s_layout
            )
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
                s = score(
                    q,
                    channels.passing.index(ring.slot),
                    D,
                    ones,
                    channels.columns.index(ring.slot),
                    problem.GATED,
                    s_layout,
                )
                dq = warpgroup_mma(ds, channels.passing.index(slot).reshape([TILE, D]), dq, is_async=True)
                dp = score(
                    do,
                    channels.passing_too.index(ring.slot),
                    D,
                    ones,
                    channels.columns.index(ring.slot),
                    False,
                    s_layout,
                )
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
            ahead = load_rows(C, problem, out, dout, lse, dlse, next_item, row_layout, WITH_DLSE)
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
            ahead = load_rows(C, problem, out, dout, lse, dlse, next_item, row_layout, WITH_DLSE)
        parity = parity ^ 1
    tma.store_wait(0)


@gluon.jit
def load_rows(C: gl.constexpr, problem, out, dout, lse, dlse, item, row_layout: gl.constexpr, WITH_DLSE: gl.constexpr):
    """What consumer C needs of an item's rows, as it lies in memory; out and dout are contiguous (B,T,H,D).
    Nothing is computed, so nobody waits: it travels while the item before is finished."""
    D: gl.constexpr = problem.D
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    batch, head, block_tile = problem.locate(item)
    first = (block_tile + C) * TILE - (problem.keys - problem.queries)
    row = first + gl.arange(0, TILE, layout=gl.SliceLayout(1, wide))
    column = gl.arange(0, D, layout=gl.SliceLayout(0, wide))
    at = ((batch.to(gl.int64) * problem.queries + row) * problem.heads + head) * D
    at = gl.expand_dims(at, 1) + gl.expand_dims(column, 0)
    mask = gl.expand_dims((row >= 0) & (row < problem.queries), 1)
    outs = gl.load(out + at, mask=mask, other=0.0)
    douts = gl.load(dout + at, mask=mask, other=0.0)
    row = first + gl.arange(0, TILE, layout=row_layout)
    mine = (row >= 0) & (row < problem.queries)
    at = (batch.to(gl.int64) * problem.queries + row) * problem.heads + head
    dlses = gl.zeros([TILE], gl.float32, row_layout)
    if WITH_DLSE:
        dlses = gl.load(dlse + at, mask=mine, other=0.0)
    lses = gl.load(lse + at, mask=mine, other=0.0)
    newest = problem.newest(block_tile + problem.CONSUMERS - 1)
    suffix, newer = problem.load_row_bias(block_tile + C, newest, batch, head, problem.CONSUMERS - 1 - C, row_layout)
    return outs, douts, lses, dlses, suffix, newer


@gluon.jit(do_not_specialize=["batches", "heads", "queries", "keys", "window", "blocks", "items"])
def dq_kernel(
    q_desc, dout_desc, k_desc, v_desc, dq_desc, dq_ptr, out, dout, suffix, total, starts, firsts, lse, dlse, rows,
    scale_log2, bias_factor, scale,
    batches, heads, queries, keys, window, blocks, items,
    CONSUMERS: gl.constexpr, D: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr,
    BOUNDED: gl.constexpr, PRUNED: gl.constexpr, A_SHARED: gl.constexpr, WITH_DLSE: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    problem = Problem(batches, heads, queries, keys, window, blocks, items, starts, firsts, suffix, total,
                      CONSUMERS, D, GROUP, GATED, BOUNDED, PRUNED, A_SHARED)  # fmt: skip
    channels = open_channels(q_desc, k_desc, CONSUMERS, STAGES)
    dq_tiles = gl.allocate_shared_memory(dq_desc.dtype, [CONSUMERS, 1, TILE, 1, D], dq_desc.layout)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (dq_consume, (0, problem, channels, dq_tiles, dq_desc, dq_ptr, out, dout, lse, dlse, rows,
                scale_log2, scale, WITH_DLSE)),
            (dq_consume, (1, problem, channels, dq_tiles, dq_desc, dq_ptr, out, dout, lse, dlse, rows,
                scale_log2, scale, WITH_DLSE)),
            (dq_produce, (problem, channels, q_desc, dout_desc, k_desc, v_desc, bias_factor)),
        ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize([
            (dq_consume, (0, problem, channels, dq_tiles, dq_desc, dq_ptr, out, dout, lse, dlse, rows,
                scale_log2, scale, WITH_DLSE)),
            (dq_consume, (1, problem, channels, dq_tiles, dq_desc, dq_ptr, out, dout, lse, dlse, rows,
                scale_log2, scale, WITH_DLSE)),
            (dq_consume, (2, problem, channels, dq_tiles, dq_desc, dq_ptr, out, dout, lse, dlse, rows,
                scale_log2, scale, WITH_DLSE)),
            (dq_produce, (problem, channels, q_desc, dout_desc, k_desc, v_desc, bias_factor)),
        ], [4, 4, 1], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
