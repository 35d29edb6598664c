"""dk, dv and dU for Hopper, in Gluon: rows are keys, queries pass by (equations: zoo/kernels/hopper_backward.py).

The queries of all heads of a group pass by, so K and V are never repeated. What belongs to a query, U_t - lse_t and
-delta_t, is added on the tensor core like the forward's bias: three bf16 columns each.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from zoo.kernels.hopper_band import (
    NOTHING,
    TILE,
    TILES_PER_CHUNK,
    Problem,
    bias_columns,
    lane_sum,
    split_in_three,
    start_ring,
)
from zoo.kernels.hopper_channels import announce, as_operand, load_held, load_passing, open_channels, score


@gluon.jit
def within(distance, reach):
    """0 <= distance < reach in one comparison, negative numbers being large unsigned ones. reach >= 0."""
    return distance.to(gl.uint32, bitcast=True) < reach.to(gl.uint32, bitcast=True)


@gluon.jit
def last_queries(problem, ends, batch, key):
    """The newest position that sees each key, of the tiles that keep it; before the key itself where none does
    (padding)."""
    last = gl.minimum(key + problem.window, problem.keys) - 1
    if problem.BOUNDED:
        at = batch.to(gl.int64) * problem.keys + gl.minimum(key, problem.keys - 1)
        last = gl.minimum(last, gl.load(ends + at) - 1)
        last = gl.where(gl.load(problem.starts + at) > key, -1, last)
    return last


@gluon.jit
def newest_query(problem, ends, lasts, batch, kv_head, tile):
    """The newest query tile that sees anything of key tile `tile`."""
    key = gl.minimum(tile * TILE + TILE, problem.keys) - 1
    last = gl.minimum(key + problem.window, problem.keys) - 1
    if problem.BOUNDED:
        last = gl.minimum(last, gl.load(ends + batch.to(gl.int64) * problem.keys + key) - 1)
    newest = gl.maximum(last, key) // TILE
    if problem.PRUNED:
        newest = gl.minimum(newest, problem.kept(lasts, tile, batch, kv_head) - 1)
    return newest


@gluon.jit
def dkv_produce(problem, channels, k_desc, v_desc, q_desc, dout_desc, ends, lasts, rows, bias_factor):
    CONSUMERS: gl.constexpr = problem.CONSUMERS
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [32, 1], [1, 1], [1, 0])
    offset = problem.keys - problem.queries
    ring = start_ring(channels.passing.shape[0])
    parity = gl.to_tensor(0)
    for item in range(gl.program_id(0), problem.items, gl.num_programs(0)):
        batch, kv_head, tile = locate_keys(problem, item)
        oldest = gl.maximum(tile, offset // TILE)
        last_tile = gl.minimum(tile + CONSUMERS - 1, (problem.keys - 1) // TILE)
        count = gl.maximum(newest_query(problem, ends, lasts, batch, kv_head, last_tile) - oldest + 1, 1)
        for member in range(problem.GROUP):
            head = kv_head * problem.GROUP + member
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
                    lse, suffix, delta, gain = load_rows(
                        problem, rows, batch, head, query + 1, gl.SliceLayout(1, layout)
                    )
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
    kv_heads = problem.heads // problem.GROUP
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
def fetch_suffix(problem, own, batch, head, tile):
    """Copies the suffixes of a tile of keys to shared memory, behind everybody's back: a value held in a register from
    one item to the next is spilled, and a spill waits for its load. Behind the last key its own once more."""
    suffixes, _ = problem.gate_rows(batch, head)
    lane = gl.arange(0, TILE, layout=gl.BlockedLayout([1], [32], [4], [0]))
    async_copy.async_copy_global_to_shared(own, suffixes + gl.minimum(tile * TILE + lane, problem.keys - 1))
    async_copy.commit_group()


@gluon.jit
def dkv_consume(C: gl.constexpr, problem, channels, dk_tiles, dv_tiles, own_tiles, dk_desc, dv_desc, ends, lasts,
                key_side, scale_log2, scale):  # fmt: skip
    """Warpgroup C: 64 keys of every item. key_side (B,H,N) fp32, nats, gets the key side of dU, -sum_t dS_tj."""
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
    batch, kv_head, block_tile = locate_keys(problem, gl.program_id(0))
    # an item's keys lie in one chunk, the anchor of their bias, which is then their suffix
    gl.static_assert(TILES_PER_CHUNK % problem.CONSUMERS == 0)
    if problem.GATED:
        fetch_suffix(problem, own_tiles.index(C), batch, kv_head * problem.GROUP, block_tile + C)
    for item in range(gl.program_id(0), problem.items, gl.num_programs(0)):
        next_batch, next_kv_head, next_tile = locate_keys(
            problem, gl.minimum(item + gl.num_programs(0), problem.items - 1)
        )
        tile = block_tile + C
        block_oldest = gl.maximum(block_tile, offset // TILE)
        last_tile = gl.minimum(block_tile + problem.CONSUMERS - 1, (problem.keys - 1) // TILE)
        block_newest = gl.maximum(newest_query(problem, ends, lasts, batch, kv_head, last_tile), block_oldest)
        oldest = gl.minimum(gl.maximum(tile, block_oldest), block_newest + 1)
        newest = gl.minimum(
            newest_query(problem, ends, lasts, batch, kv_head, gl.minimum(tile, last_tile)), block_newest
        )
        newest = gl.where(tile <= last_tile, gl.maximum(newest, oldest - 1), oldest - 1)
        key = tile * TILE + gl.arange(0, TILE, layout=row_layout)
        last = last_queries(problem, ends, batch, key)
        if problem.BOUNDED:
            clear = gl.min(last, 0)  # a query tile up to here has no far edge
        else:
            clear = gl.minimum(tile * TILE + problem.window, problem.keys) - 1
        reach = gl.maximum(last - key + 1, 0)

        mbarrier.wait(channels.held_ready.index(C), parity)
        k = as_operand(channels.held.index(C), D, problem.A_SHARED, a_layout)
        v = as_operand(channels.held_too.index(C), D, problem.A_SHARED, a_layout)
        if not problem.A_SHARED:
            fence_async_shared()
            mbarrier.arrive(channels.held_free.index(C), count=1)
        dk = gl.zeros([TILE, D], gl.float32, o_layout)
        dv = gl.zeros([TILE, D], gl.float32, o_layout)
        for member in range(problem.GROUP):
            head = kv_head * problem.GROUP + member
            gathered = gl.zeros([TILE, TILE], gl.float32, s_layout)
            gathered = lane_sum(gathered, 64)
            own = gl.zeros([TILE], gl.float32, row_layout)
            if problem.GATED:  # the next head's or item's travels meanwhile
                async_copy.wait_group(0)
                own = own_tiles.index(C).load(row_layout)
                more = member + 1 < problem.GROUP
                next_head = gl.where(more, head + 1, next_kv_head * problem.GROUP)
                fetch_suffix(
                    problem,
                    own_tiles.index(C),
                    gl.where(more, batch, next_batch),
                    next_head,
                    gl.where(more, block_tile, next_tile) + C,
                )
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
                    query = gl.expand_dims(gl.arange(0, TILE, layout=gl.SliceLayout(0, s_layout)), 0)
                    seen = within(query + gl.expand_dims(first - key, 1), gl.expand_dims(reach, 1))
                    s = gl.where(seen, s, float("-inf"))
                e = gl.exp2(s * scale_log2 + gl.expand_dims(own, 1))
                p = gl.convert_layout(e.to(dtype), p_layout)
                dv = warpgroup_mma(p, channels.passing_too.index(ring.slot).reshape([TILE, D]), dv, is_async=True)
                if problem.A_SHARED:
                    dp = warpgroup_mma_wait(1, deps=(dp,))
                else:  # a left side in registers is listed too: ptxas has overwritten one that was still wanted
                    dp, k, v = warpgroup_mma_wait(1, deps=(dp, k, v))
                e *= dp
                ds = gl.convert_layout(e.to(dtype), p_layout)
                dk = warpgroup_mma(ds, channels.passing.index(ring.slot).reshape([TILE, D]), dk, is_async=True)
                if problem.GATED:
                    gathered += lane_sum(e, 64)  # while the tensor core works
                dk, dv, p, ds = warpgroup_mma_wait(0, deps=(dk, dv, p, ds))
                mbarrier.arrive(channels.free.index(ring.slot), count=1)
                ring = ring.next()
            for _ in range(block_newest - gl.maximum(newest, oldest - 1)):
                ring = channels.pass_on(ring)
            if problem.GATED:
                at = key_side + (batch * problem.heads + head).to(gl.int64) * problem.keys + key
                gl.store(at, -gl.convert_layout(gl.sum(gathered, 1), row_layout), mask=key < problem.keys)

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
        batch, kv_head, block_tile = next_batch, next_kv_head, next_tile
    if problem.GATED:
        async_copy.wait_group(0)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["batches", "heads", "queries", "keys", "window", "blocks", "items"])
def dkv_kernel(
    k_desc, v_desc, q_desc, dout_desc, dk_desc, dv_desc, suffix, total, starts, ends, firsts, lasts, rows, key_side,
    scale_log2, bias_factor, scale,
    batches, heads, queries, keys, window, blocks, items,
    CONSUMERS: gl.constexpr, D: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr,
    BOUNDED: gl.constexpr, PRUNED: gl.constexpr, A_SHARED: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    problem = Problem(batches, heads, queries, keys, window, blocks, items, starts, firsts, suffix, total,
                      CONSUMERS, D, GROUP, GATED, BOUNDED, PRUNED, A_SHARED)  # fmt: skip
    channels = open_channels(k_desc, q_desc, CONSUMERS, STAGES)
    if A_SHARED:
        dk_tiles = channels.held
        dv_tiles = channels.held_too
    else:
        dk_tiles = gl.allocate_shared_memory(dk_desc.dtype, [CONSUMERS, 1, TILE, 1, D], dk_desc.layout)
        dv_tiles = gl.allocate_shared_memory(dv_desc.dtype, [CONSUMERS, 1, TILE, 1, D], dv_desc.layout)
    own_tiles = gl.allocate_shared_memory(gl.float32, [CONSUMERS, TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    if CONSUMERS == 1:
        gl.warp_specialize([
            (dkv_consume, (0, problem, channels, dk_tiles, dv_tiles, own_tiles, dk_desc, dv_desc, ends, lasts, key_side,
                scale_log2, scale)),
            (dkv_produce, (problem, channels, k_desc, v_desc, q_desc, dout_desc, ends, lasts, rows, bias_factor)),
        ], [1], [PRODUCER_REGISTERS])  # fmt: skip
    else:
        gl.static_assert(CONSUMERS == 2)
        gl.warp_specialize([
            (dkv_consume, (0, problem, channels, dk_tiles, dv_tiles, own_tiles, dk_desc, dv_desc, ends, lasts, key_side,
                scale_log2, scale)),
            (dkv_consume, (1, problem, channels, dk_tiles, dv_tiles, own_tiles, dk_desc, dv_desc, ends, lasts, key_side,
                scale_log2, scale)),
            (dkv_produce, (problem, channels, k_desc, v_desc, q_desc, dout_desc, ends, lasts, rows, bias_factor)),
        ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
