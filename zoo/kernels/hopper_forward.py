"""Gated causal sliding-window attention, forward, for Hopper (sm_90), in Gluon.

    out_t = softmax_j(scale q_t.k_j + U_t - U_j) v_j   over  max(start_t, t - window + 1) <= j <= t      (SPEC.md 1.4)

An item is CONSUMERS x 64 consecutive rows of one head. A persistent grid walks the items; in each block one warp
produces (bulk copies of q, k and v, the gate's bias) and CONSUMERS warpgroups of 64 rows consume. Every warpgroup
passes over the tiles that its own rows don't see. Keys go from the newest tile to the oldest: a row meets itself first.

The bias. Only the key side matters (SPEC.md 0.1), up to a constant per row. The producer sums it up, with a carry from
tile to tile, and leaves it as three bf16 columns; one more k16 step of q k^T, against ones, adds it on the tensor core.

The reference of the softmax. A hopeful pass takes each row's maximum over its newest tile and never moves it: no
maximum, no rescaling in the loop. bf16 and fp32 have range for 64 log2 units and more above it, at full precision. A
row whose sum outgrows that (or is not a number) leaves lse = +inf, and its item is done again by a careful pass, the
usual online softmax. The result is right for any logits; fp16, whose range is short, takes the careful pass at once.
"""

import torch
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
    NOTHING,
    TILE,
    Problem,
    Schedule,
    bias_columns,
    ceil_div,
    copyable,
    descriptor,
    lane_sum,
    pointers,
    programs,
    send,
    start_ring,
    visible,
)  # fmt: skip
from zoo.kernels.units import LN2, LOG2E

OUTGROWN = gl.constexpr(2.0**64)  # sums beyond this are not trusted; products with values up to 2^63 still fit in fp32


@aggregate
class Channels:
    """Shared memory between producer and consumers, and the barriers that guard it."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    bias: gl.shared_memory_descriptor
    out: gl.shared_memory_descriptor
    q_ready: gl.shared_memory_descriptor
    q_free: gl.shared_memory_descriptor
    kv_ready: gl.shared_memory_descriptor
    kv_free: gl.shared_memory_descriptor
    spoiled: gl.shared_memory_descriptor  # (CONSUMERS, 1) int32: did the hopeful pass leave anything undone
    verdict: gl.shared_memory_descriptor  # all of `spoiled` is written
    decided: gl.shared_memory_descriptor  # everybody has read whether this item is done again
    lse: gl.tensor  # (B, T, H) fp32 in global memory

    @gluon.constexpr_function
    def __init__(self, q, k, v, bias, out, q_ready, q_free, kv_ready, kv_free, spoiled, verdict, decided, lse):
        self.q = q
        self.k = k
        self.v = v
        self.bias = bias
        self.out = out
        self.q_ready = q_ready
        self.q_free = q_free
        self.kv_ready = kv_ready
        self.kv_free = kv_free
        self.spoiled = spoiled
        self.verdict = verdict
        self.decided = decided
        self.lse = lse

    @gluon.jit
    def anything_spoiled(self, layout: gl.constexpr):
        """Waits until every consumer has written its flag. layout: 1-d, of the partition that asks."""
        mbarrier.wait(self.verdict, 0)
        flag = gl.zeros([1], gl.int32, layout)
        CONSUMERS: gl.constexpr = self.spoiled.shape[0]
        for c in gl.static_range(CONSUMERS):
            flag |= self.spoiled.index(c).load(layout)
        return gl.max(flag, 0) == 1

    @gluon.jit
    def agree(self, parity):
        """No partition goes on before all have read what an item's rows say: the first to finish overwrites it."""
        gl.thread_barrier()
        mbarrier.arrive(self.decided, count=1)
        mbarrier.wait(self.decided, parity)


# ------------------------------------------------------------------------------------------------ the producer


@gluon.jit
def produce(problem, channels, q_desc, k_desc, v_desc, bias_factor, HOPEFUL: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    ring = start_ring(channels.k.shape[0])
    q_parity = gl.to_tensor(0)
    if HOPEFUL:
        ring, q_parity = produce_pass(problem, channels, q_desc, k_desc, v_desc, bias_factor, ring, q_parity, False)
        if channels.anything_spoiled(layout):
            produce_pass(problem, channels, q_desc, k_desc, v_desc, bias_factor, ring, q_parity, True)
    else:
        produce_pass(problem, channels, q_desc, k_desc, v_desc, bias_factor, ring, q_parity, False)


@gluon.jit
def produce_pass(problem, channels, q_desc, k_desc, v_desc, bias_factor, ring, q_parity, AGAIN: gl.constexpr):
    """Every item's (where AGAIN: every spoiled item's) queries and key tiles, newest first."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    parity = gl.to_tensor(0)
    for item in range(gl.program_id(0), problem.items, gl.num_programs(0)):
        batch, head, tile = problem.locate(item)
        wanted = gl.to_tensor(True)
        if AGAIN:
            wanted = is_spoiled(problem, channels.lse, batch, head, tile, layout)
            channels.agree(parity)
            parity = parity ^ 1
        if wanted:
            ring = produce_item(
                problem, channels, q_desc, k_desc, v_desc, bias_factor, ring, q_parity, batch, head, tile
            )
            q_parity = q_parity ^ 1
    return ring, q_parity


@gluon.jit
def produce_item(problem, channels, q_desc, k_desc, v_desc, bias_factor, ring, q_parity, batch, head, tile):
    CONSUMERS: gl.constexpr = problem.CONSUMERS
    q_bytes: gl.constexpr = q_desc.block_type.nbytes
    kv_bytes: gl.constexpr = 2 * k_desc.block_type.nbytes
    columns_layout: gl.constexpr = gl.BlockedLayout([1, 16], [32, 1], [1, 1], [1, 0])
    kv_head = head // problem.GROUP
    first_row = tile * TILE - (problem.keys - problem.queries)
    newest = problem.newest(tile + CONSUMERS - 1)
    count = newest - problem.oldest(tile, batch, head) + 1
    vector_layout: gl.constexpr = gl.SliceLayout(1, columns_layout)
    carry = gl.to_tensor(0.0)  # the totals of the chunks after this tile's, up to the newest
    gain = gl.to_tensor(0.0)
    suffix = gl.zeros([TILE], gl.float32, vector_layout)
    if problem.GATED:
        suffix, _ = problem.load_suffix(batch, head, newest, vector_layout)

    for i in range(gl.maximum(count, CONSUMERS)):
        # the consumer of the newest rows starts first: queries go out one consumer per tile
        for c in gl.static_range(CONSUMERS):
            if i == CONSUMERS - 1 - c:
                mbarrier.wait(channels.q_free.index(c), q_parity ^ 1)
                mbarrier.expect(channels.q_ready.index(c), q_bytes)
                tma.async_copy_global_to_shared(
                    q_desc, [batch, first_row + TILE * c, head, 0], channels.q_ready.index(c), channels.q.index(c)
                )
        if i < count:
            key = newest - i
            ready = channels.kv_ready.index(ring.slot)
            mbarrier.wait(channels.kv_free.index(ring.slot), ring.parity ^ 1)
            tma.async_copy_global_to_shared(k_desc, [batch, key * TILE, kv_head, 0], ready, channels.k.index(ring.slot))
            tma.async_copy_global_to_shared(v_desc, [batch, key * TILE, kv_head, 0], ready, channels.v.index(ring.slot))
            if problem.GATED:
                carry += gain
                bias = (carry + suffix) * bias_factor
                suffix, gain = problem.load_suffix(batch, head, key - 1, vector_layout)  # on its way during the rest
                channels.bias.index(ring.slot).store(bias_columns(bias, columns_layout))
                fence_async_shared()
            mbarrier.expect(ready, kv_bytes)  # also says that the bias is written
            ring = ring.next()
    return ring


# ------------------------------------------------------------------------------------------------ the consumers


@gluon.jit
def consume(C: gl.constexpr, problem, channels, out_desc, out, scale_log2, HOPEFUL: gl.constexpr):
    """Warpgroup C: rows 64 C .. 64 C + 63 of every item."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    ring = start_ring(channels.k.shape[0])
    q_parity = gl.to_tensor(0)
    if HOPEFUL:
        ring, q_parity, outgrown = consume_pass(
            C, problem, channels, out_desc, out, scale_log2, ring, q_parity, False, False
        )
        channels.spoiled.index(C).store(gl.full([1], gl.max(outgrown, 0), gl.int32, layout))
        gl.thread_barrier()
        mbarrier.arrive(channels.verdict, count=1)
        if channels.anything_spoiled(layout):
            consume_pass(C, problem, channels, out_desc, out, scale_log2, ring, q_parity, True, True)
    else:
        consume_pass(C, problem, channels, out_desc, out, scale_log2, ring, q_parity, True, False)
    tma.store_wait(0)


@gluon.jit
def consume_pass(C: gl.constexpr, problem, channels, out_desc, out, scale_log2, ring, q_parity,
                 CAREFUL: gl.constexpr, AGAIN: gl.constexpr):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    outgrown = gl.zeros([TILE], gl.int32, gl.SliceLayout(1, s_layout))
    parity = gl.to_tensor(0)
    for item in range(gl.program_id(0), problem.items, gl.num_programs(0)):
        batch, head, tile = problem.locate(item)
        wanted = gl.to_tensor(True)
        if AGAIN:
            wanted = is_spoiled(problem, channels.lse, batch, head, tile, layout)
            channels.agree(parity)
            parity = parity ^ 1
        if wanted:
            ring, bad = consume_item(
                C, problem, channels, out_desc, out, scale_log2, ring, q_parity, batch, head, tile, CAREFUL
            )
            q_parity = q_parity ^ 1
            outgrown |= bad
    return ring, q_parity, outgrown


@gluon.jit
def consume_item(C: gl.constexpr, problem, channels, out_desc, out, scale_log2, ring, q_parity, batch, head, block_tile,
                 CAREFUL: gl.constexpr):  # fmt: skip
    D: gl.constexpr = problem.D
    dtype: gl.constexpr = out_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    ones = gl.full([TILE, 16], 1.0, gl.bfloat16, q_layout)

    tile = block_tile + C
    block_newest = problem.newest(block_tile + problem.CONSUMERS - 1)
    block_oldest = problem.oldest(block_tile, batch, head)
    newest = problem.newest(tile)
    oldest = problem.oldest(tile, batch, head)
    inside = tile <= newest  # else all rows lie past the last key: nothing to do but to pass everything on

    position = tile * TILE + gl.arange(0, TILE, layout=row_layout)
    first_visible, latest_start = problem.first_visible(batch, position)
    own_suffix, newer = problem.load_row_bias(tile, block_newest, batch, head, problem.CONSUMERS - 1 - C, row_layout)
    own_bias = own_suffix + newer

    for _ in range(gl.where(inside, block_newest - newest, block_newest - block_oldest + 1)):
        ring = pass_on(channels, ring)
    bad = gl.zeros([TILE], gl.int32, row_layout)
    mbarrier.wait(channels.q_ready.index(C), q_parity)
    if inside:
        if problem.A_SHARED:
            q = channels.q.index(C).reshape([TILE, D])
        else:
            q = channels.q.index(C).reshape([TILE, D]).load(q_layout)
            fence_async_shared()
            mbarrier.arrive(channels.q_free.index(C), count=1)

        # the newest tile: always an edge, and the reference of the softmax
        mbarrier.wait(channels.kv_ready.index(ring.slot), ring.parity)
        s = warpgroup_mma_wait(0, deps=(logits(q, ones, channels, ring.slot, problem, s_layout),))
        s = gl.where(visible(newest * TILE, position, first_visible, s_layout), s * scale_log2, float("-inf"))
        m = gl.maximum(gl.max(s, 1), NOTHING)
        p = gl.exp2(s - gl.expand_dims(m, 1))
        total = lane_sum(p, 64)
        p = gl.convert_layout(p.to(dtype), p_layout)
        o = gl.zeros([TILE, D], gl.float32, o_layout)

        clear = gl.maximum(tile * TILE + TILE - problem.window, latest_start)  # a tile from here on has no left edge
        for i in range(newest - oldest):
            slot = ring.slot
            ring = ring.next()
            mbarrier.wait(channels.kv_ready.index(ring.slot), ring.parity)
            s = logits(q, ones, channels, ring.slot, problem, s_layout)
            o = warpgroup_mma(p, channels.v.index(slot).reshape([TILE, D]), o, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            first = (newest - 1 - i) * TILE
            if first < clear:
                s = gl.where(visible(first, position, first_visible, s_layout), s, float("-inf"))
            if CAREFUL:
                m_new = gl.maximum(m, gl.max(s, 1) * scale_log2)
                alpha = gl.exp2(m - m_new)
                m = m_new
                total *= gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, total.type.layout)), 1)
            e = gl.exp2(s * scale_log2 - gl.expand_dims(m, 1))
            total += lane_sum(e, 64)
            # a left side in registers is listed too: ptxas has been seen to overwrite one that was still wanted
            if problem.A_SHARED:
                o, p = warpgroup_mma_wait(0, deps=(o, p))
            else:
                o, p, q = warpgroup_mma_wait(0, deps=(o, p, q))
            p = gl.convert_layout(e.to(dtype), p_layout)
            mbarrier.arrive(channels.kv_free.index(slot), count=1)
            if CAREFUL:
                o *= gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, o_layout)), 1)

        if problem.A_SHARED:
            mbarrier.arrive(channels.q_free.index(C), count=1)
        o = warpgroup_mma(p, channels.v.index(ring.slot).reshape([TILE, D]), o, is_async=True)
        o = warpgroup_mma_wait(0, deps=(o,))
        ring = pass_on(channels, ring)

        # the row sums, the log-sum-exp in nats without the tile's anchor, the output
        total = gl.convert_layout(gl.sum(total, 1), row_layout)
        lse = gl.where(total > 0.0, (m + gl.log2(total) - own_bias) * LN2, float("-inf"))
        if not CAREFUL:
            row = position - (problem.keys - problem.queries)
            bad = gl.where((total < OUTGROWN) | (row < 0) | (row >= problem.queries), 0, 1)
            lse = gl.where(bad == 1, float("inf"), lse)
        store_lse(problem, channels, lse, position, batch, head)
        inverse = gl.convert_layout(gl.where(total > 0.0, 1.0 / total, 0.0), gl.SliceLayout(1, o_layout))
        o = (o * gl.expand_dims(inverse, 1)).to(dtype)
        first_row = tile * TILE - (problem.keys - problem.queries)
        send(o, channels.out.index(C), out_desc, out, problem, batch, first_row, head)
        for _ in range(oldest - block_oldest):
            ring = pass_on(channels, ring)
    else:
        mbarrier.arrive(channels.q_free.index(C), count=1)
    return ring, bad


@gluon.jit
def is_spoiled(problem, lse, batch, head, tile, layout: gl.constexpr):
    """Has the hopeful pass left any of the item's rows undone?"""
    lane = gl.arange(0, 256, layout=layout)
    row = tile * TILE - (problem.keys - problem.queries) + lane
    inside = (row >= 0) & (row < problem.queries) & (lane < problem.CONSUMERS * TILE)
    at = lse + (batch.to(gl.int64) * problem.queries + row) * problem.heads + head
    return gl.max(gl.where(gl.load(at, mask=inside, other=0.0) == float("inf"), 1, 0), 0) == 1


@gluon.jit
def pass_on(channels, ring):
    """Hands the tile in this slot back, seen or not. Waits for it: an early arrival would count for its predecessor."""
    mbarrier.wait(channels.kv_ready.index(ring.slot), ring.parity)
    mbarrier.arrive(channels.kv_free.index(ring.slot), count=1)
    return ring.next()


@gluon.jit
def logits(q, ones, channels, slot, problem, layout: gl.constexpr):
    """q k^T + bias over the scale, (64, 64), in flight."""
    s = gl.zeros([TILE, TILE], gl.float32, layout)
    k = channels.k.index(slot).reshape([TILE, problem.D]).permute((1, 0))
    if problem.GATED:
        s = warpgroup_mma(ones, channels.bias.index(slot).permute((1, 0)), s, use_acc=False, is_async=True)
        return warpgroup_mma(q, k, s, is_async=True)
    else:
        return warpgroup_mma(q, k, s, use_acc=False, is_async=True)


@gluon.jit
def store_lse(problem, channels, lse, position, batch, head):
    row = position - (problem.keys - problem.queries)
    at = channels.lse + (batch.to(gl.int64) * problem.queries + row) * problem.heads + head
    gl.store(at, lse, mask=(row >= 0) & (row < problem.queries))


# ------------------------------------------------------------------------------------------------ the kernel


@gluon.jit(do_not_specialize=["batches", "heads", "queries", "keys", "window", "blocks", "items"])
def forward_kernel(
    q_desc, k_desc, v_desc, out_desc, out, suffix, total, starts, firsts, lse, scale_log2, bias_factor,
    batches, heads, queries, keys, window, blocks, items,
    CONSUMERS: gl.constexpr, D: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr,
    BOUNDED: gl.constexpr, PRUNED: gl.constexpr, A_SHARED: gl.constexpr, HOPEFUL: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    problem = Problem(batches, heads, queries, keys, window, blocks, items, starts, firsts, suffix, total,
                      CONSUMERS, D, GROUP, GATED, BOUNDED, PRUNED, A_SHARED)  # fmt: skip
    channels = Channels(
        gl.allocate_shared_memory(dtype, [CONSUMERS, 1, TILE, 1, D], q_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, TILE, 1, D], k_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, TILE, 1, D], v_desc.layout),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, 16], gl.NVMMASharedLayout(32, 16, 2)),
        gl.allocate_shared_memory(dtype, [CONSUMERS, 1, TILE, 1, D], out_desc.layout),
        gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
        gl.allocate_shared_memory(gl.int32, [CONSUMERS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(gl.int64, [1], barrier),
        gl.allocate_shared_memory(gl.int64, [1], barrier),
        lse,
    )
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(channels.q_ready.index(c), count=1)
        mbarrier.init(channels.q_free.index(c), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(channels.kv_ready.index(s), count=1)
        mbarrier.init(channels.kv_free.index(s), count=CONSUMERS)
    mbarrier.init(channels.verdict, count=CONSUMERS)
    mbarrier.init(channels.decided, count=CONSUMERS + 1)

    if CONSUMERS == 2:
        gl.warp_specialize([
            (consume, (0, problem, channels, out_desc, out, scale_log2, HOPEFUL)),
            (consume, (1, problem, channels, out_desc, out, scale_log2, HOPEFUL)),
            (produce, (problem, channels, q_desc, k_desc, v_desc, bias_factor, HOPEFUL)),
        ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize([
            (consume, (0, problem, channels, out_desc, out, scale_log2, HOPEFUL)),
            (consume, (1, problem, channels, out_desc, out, scale_log2, HOPEFUL)),
            (consume, (2, problem, channels, out_desc, out, scale_log2, HOPEFUL)),
            (produce, (problem, channels, q_desc, k_desc, v_desc, bias_factor, HOPEFUL)),
        ], [4, 4, 1], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


# by head dim
TABLE = {64: Schedule(3, 4, False, 160, 32), 128: Schedule(3, 3, True, 160, 32)}


def window_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: tuple[Tensor, ...],
    *,
    window: int | None,
    scale: float,
    spans: tuple[Tensor, Tensor] | None,
    kept: tuple[Tensor, Tensor] | None = None,
    schedule: Schedule | None = None,
    hopeful: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """out like q and natural-log lse (B,T,H) float32, as zoo.kernels.window.window_forward. bf16 or fp16, D 64 or 128.

    `schedule` overrides the table, `hopeful` the choice of the first pass.
    """
    B, T, H, D = q.shape
    N, G = k.shape[1:3]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((B, T, H), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    q, k, v = (copyable(x) for x in (q, k, v))
    suffix, total = gates.prefix(gate) if gate else (lse, lse)
    starts, _ = pointers(spans, lse)
    firsts, _ = pointers(kept, lse)
    plan = schedule or TABLE[D]
    blocks = ceil_div(ceil_div(N, 64) - (N - T) // 64, plan.consumers)
    items = blocks * B * H
    scale_log2 = scale * LOG2E.value
    forward_kernel[(min(items, programs(q)),)](
        descriptor(q), descriptor(k), descriptor(v), descriptor(out), out, suffix, total, starts, firsts, lse,
        scale_log2, 1 / scale_log2, B, H, T, N, min(window or N, N), blocks, items,
        plan.consumers, D, H // G, plan.stages, bool(gate), spans is not None, kept is not None, plan.in_shared,
        q.dtype == torch.bfloat16 if hopeful is None else hopeful, plan.consumer_registers, plan.producer_registers,
        num_warps=4, maxnreg=plan.registers_at_launch,
    )  # fmt: skip
    return out, lse
