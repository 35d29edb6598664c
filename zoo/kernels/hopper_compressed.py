"""Attention over compressed blocks on Hopper (sm_90), forward and backward, in Gluon (zoo/kernels/nsa.py says what).

The portable kernels' plan (zoo/kernels/nsa_compressed.py), on warpgroups as in zoo/kernels/hopper_forward.py: one warp
produces by bulk copies, CONSUMERS warpgroups of 64 rows consume. A row is a (token, query head) pair of one key/value
head; 64 consecutive ones are a box of 64 / GROUP tokens and GROUP heads, which the copy engine packs by itself.

    forward_kernel   rows stay, keys and values pass by: online softmax
    dq_kernel        the forward's walk again
    dkv_kernel       slots stay, rows pass by, a share of those that see them at a time; the shares are added in order

Every barrier is counted by hand: `number` is an item's place among those of its program. Deterministic: no atomics.
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

from zoo.kernels.hopper_band import (
    ELEMENTS,
    LN2,
    LOG2E,
    NOTHING,
    TILE,
    Schedule,
    copyable,
    descriptor,
    lane_sum,
    programs,
    start_ring,
)
from zoo.kernels.hopper_dkv import query_columns
from zoo.kernels.nsa_compressed import STEP_ROWS, row_numbers, seen_by

# by head dim
FORWARD = {64: Schedule(3, 4, True, 160, 32), 128: Schedule(3, 3, True, 160, 32)}
DQ = {64: Schedule(2, 4, True, 224, 56), 128: Schedule(2, 3, True, 224, 56)}
DKV = {64: Schedule(2, 4, True, 232, 40), 128: Schedule(2, 3, True, 232, 40)}
HELD = gl.constexpr(2)  # places of a consumer for what stays: one item's is fetched while the other's is used


def takes(q: Tensor, k: Tensor, scale: float) -> bool:
    """Whether these kernels do such a call: rows of 64 / group tokens; a maximum that is taken before the scale; more
    than one step of decoding."""
    group = q.shape[2] // k.shape[2]
    return q.shape[0] * k.shape[1] > 0 and q.shape[1] * group > STEP_ROWS and 64 % group == 0 and scale > 0


# ------------------------------------------------------------------------------------------------ who sees what


@aggregate
class Rows:
    """Sizes of one launch; which rows an item holds and which slots they see."""

    tokens: gl.tensor
    slots: gl.tensor
    groups: gl.tensor  # key/value heads
    pairs: gl.tensor  # of a batch row and a key/value head
    items: gl.tensor
    place: gl.tensor  # (B,T) int32
    first: gl.tensor  # (B,T) int32
    GROUP: gl.constexpr
    D: gl.constexpr
    BLOCK: gl.constexpr
    STRIDE: gl.constexpr
    RATIO: gl.constexpr
    CONSUMERS: gl.constexpr
    TOKENS: gl.constexpr  # of 64 rows

    @gluon.constexpr_function
    def __init__(self, tokens, slots, groups, pairs, items, place, first,
                 GROUP, D, BLOCK, STRIDE, RATIO, CONSUMERS):  # fmt: skip
        self.tokens = tokens
        self.slots = slots
        self.groups = groups
        self.pairs = pairs
        self.items = items
        self.place = place
        self.first = first
        self.GROUP = gl.constexpr(GROUP)
        self.D = gl.constexpr(D)
        self.BLOCK = gl.constexpr(BLOCK)
        self.STRIDE = gl.constexpr(STRIDE)
        self.RATIO = gl.constexpr(RATIO)
        self.CONSUMERS = gl.constexpr(CONSUMERS)
        self.TOKENS = gl.constexpr(64 // GROUP)

    @gluon.jit
    def locate(self, item):
        """(batch row, key/value head, first token); the latest tokens first, they see most."""
        pair = item % self.pairs
        tile = (self.items - 1 - item) // self.pairs
        return pair // self.groups, pair % self.groups, tile * (self.CONSUMERS * self.TOKENS)

    @gluon.jit
    def look(self, batch, token):
        """place and first_block of a token or tokens, as they lie in memory; beyond the last, the last one's."""
        at = batch * self.tokens + gl.minimum(token, self.tokens - 1)
        return gl.load(self.place + at), gl.load(self.first + at)

    @gluon.jit
    def peek(self, item):
        """What `walk` needs of an item, loaded but not looked at."""
        batch, _, token = self.locate(item)
        place, first = self.look(batch, token)
        last_place, last_first = self.look(batch, token + (self.CONSUMERS * self.TOKENS - 1))
        return place, first, last_place, last_first

    @gluon.jit
    def low(self, first):
        return first * self.RATIO

    @gluon.jit
    def high(self, place, first):
        """One past the last slot that a token sees."""
        seen = gl.where(place + 1 >= self.BLOCK, (place + 1 - self.BLOCK) // self.STRIDE + 1, 0)
        return gl.minimum(first * self.RATIO + seen, self.slots)

    @gluon.jit
    def walk(self, place, first, last_place, last_first):
        """(first tile of slots, tiles, at least one, latest low, earliest high). The bounds never fall."""
        begin = self.low(first) // TILE
        count = gl.maximum((self.high(last_place, last_first) + (TILE - 1)) // TILE - begin, 1)
        return begin, count, self.low(last_first), self.high(place, first)

    @gluon.jit
    def numbers(self, batch, kv_head, token, row):
        """Where rows' numbers lie in a (B,T,H), and which of them exist. row: counted from `token`."""
        own = token + row // self.GROUP
        at = (batch.to(gl.int64) * self.tokens + own) * (self.groups * self.GROUP) + kv_head * self.GROUP
        return at + row % self.GROUP, own < self.tokens


@gluon.jit
def mask_rows(s, first_slot, low, high, layout: gl.constexpr):
    """s (rows, slots) with -inf where a row doesn't see a slot."""
    slot = first_slot + gl.expand_dims(gl.arange(0, TILE, layout=gl.SliceLayout(0, layout)), 0)
    seen = (slot >= gl.expand_dims(low, 1)) & (slot < gl.expand_dims(high, 1))
    return gl.where(seen, s, float("-inf"))


# ------------------------------------------------------------------------------------------------ the channels


@aggregate
class Channels:
    """Shared memory between producer and consumers, and the barriers that guard it. `held` and `held_too` stay with a
    consumer for an item, HELD places each; `passing` and `passing_too` go by, dkv's with `columns`."""

    held: gl.shared_memory_descriptor
    held_too: gl.shared_memory_descriptor
    passing: gl.shared_memory_descriptor
    passing_too: gl.shared_memory_descriptor
    columns: gl.shared_memory_descriptor
    held_ready: gl.shared_memory_descriptor
    held_free: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    PLACES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, held, held_too, passing, passing_too, columns, held_ready, held_free, ready, free, PLACES):
        self.held = held
        self.held_too = held_too
        self.passing = passing
        self.passing_too = passing_too
        self.columns = columns
        self.held_ready = held_ready
        self.held_free = held_free
        self.ready = ready
        self.free = free
        self.PLACES = gl.constexpr(PLACES)

    @gluon.jit
    def hold(self, c: gl.constexpr, number, desc, desc_too, where, BOTH: gl.constexpr):
        """Consumer c's operands of item `number`, once the item before the last has given its place up."""
        at = c * self.PLACES + number % self.PLACES
        nbytes: gl.constexpr = (2 if BOTH else 1) * desc.block_type.nbytes
        if self.PLACES == 2:  # given up when the next item begins, so the very first time is nobody's
            mbarrier.wait(self.held_free.index(at), ((number + 3) // 2) % 2)
        else:
            mbarrier.wait(self.held_free.index(at), (number + 1) % 2)
        mbarrier.expect(self.held_ready.index(at), nbytes)
        tma.async_copy_global_to_shared(desc, where, self.held_ready.index(at), self.held.index(at))
        if BOTH:
            tma.async_copy_global_to_shared(desc_too, where, self.held_ready.index(at), self.held_too.index(at))

    @gluon.jit
    def wait_held(self, C: gl.constexpr, number):
        at = C * self.PLACES + number % self.PLACES
        mbarrier.wait(self.held_ready.index(at), (number // self.PLACES) % 2)
        return at

    @gluon.jit
    def give_up_last(self, C: gl.constexpr, number):
        """The place of the item before `number`: what it sent from there is on its way."""
        tma.store_wait(0)
        mbarrier.arrive(self.held_free.index(C * self.PLACES + (number + 1) % self.PLACES), count=1)

    @gluon.jit
    def fetch(self, ring, desc, desc_too, where):
        """Once the slot is free. `announce` must follow."""
        ready = self.ready.index(ring.slot)
        mbarrier.wait(self.free.index(ring.slot), ring.parity ^ 1)
        tma.async_copy_global_to_shared(desc, where, ready, self.passing.index(ring.slot))
        tma.async_copy_global_to_shared(desc_too, where, ready, self.passing_too.index(ring.slot))

    @gluon.jit
    def announce(self, ring, desc):
        nbytes: gl.constexpr = 2 * desc.block_type.nbytes
        mbarrier.expect(self.ready.index(ring.slot), nbytes)

    @gluon.jit
    def pass_on(self, ring):
        """Hands the tile in this slot back unseen. Waits first: an early arrival would count for its predecessor."""
        mbarrier.wait(self.ready.index(ring.slot), ring.parity)
        mbarrier.arrive(self.free.index(ring.slot), count=1)
        return ring.next()


@gluon.jit
def open_channels(held_desc, passing_desc, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PLACES: gl.constexpr,
                  BOTH: gl.constexpr, COLUMNS: gl.constexpr):  # fmt: skip
    """BOTH: two operands are held. COLUMNS: dkv's."""
    dtype: gl.constexpr = held_desc.dtype
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    one: gl.constexpr = held_desc.block_type.shape
    other: gl.constexpr = passing_desc.block_type.shape
    N: gl.constexpr = CONSUMERS * PLACES
    held = gl.allocate_shared_memory(dtype, [N, one[0], one[1], one[2], one[3]], held_desc.layout)
    held_too = held
    if BOTH:
        held_too = gl.allocate_shared_memory(dtype, [N, one[0], one[1], one[2], one[3]], held_desc.layout)
    passing = gl.allocate_shared_memory(dtype, [STAGES, other[0], other[1], other[2], other[3]], passing_desc.layout)
    passing_too = gl.allocate_shared_memory(
        dtype, [STAGES, other[0], other[1], other[2], other[3]], passing_desc.layout
    )
    held_ready = gl.allocate_shared_memory(gl.int64, [N, 1], barrier)
    columns = held_ready
    if COLUMNS:
        columns = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, 16], gl.NVMMASharedLayout(32, 16, 2))
    channels = Channels(
        held, held_too, passing, passing_too, columns, held_ready,
        gl.allocate_shared_memory(gl.int64, [N, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier), PLACES,
    )  # fmt: skip
    for n in gl.static_range(N):
        mbarrier.init(channels.held_ready.index(n), count=1)
        mbarrier.init(channels.held_free.index(n), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(channels.ready.index(s), count=1)
        mbarrier.init(channels.free.index(s), count=CONSUMERS)
    return channels


@gluon.jit
def product(a, tile, D: gl.constexpr, layout: gl.constexpr):
    """a tile^T, (64, 64), in flight."""
    s = gl.zeros([TILE, TILE], gl.float32, layout)
    return warpgroup_mma(a, tile.reshape([TILE, D]).permute((1, 0)), s, use_acc=False, is_async=True)


@gluon.jit
def send(value, tile, desc, rows, batch, kv_head, token):
    """64 rows of a contiguous (B,T,H,D), by way of `tile`, which the copy reads until tma.store_wait."""
    tile.reshape([TILE, rows.D]).store(value)
    fence_async_shared()
    if token < rows.tokens:
        tma.async_copy_shared_to_global(desc, [batch, token, kv_head * rows.GROUP, 0], tile)


@gluon.jit
def produce(rows, channels, q_desc, too_desc, k_desc, v_desc, BOTH: gl.constexpr):
    """For the kernels whose rows stay: every item's rows, then its slots, ascending."""
    ring = start_ring(channels.passing.shape[0])
    number = gl.to_tensor(0)
    place, first, last_place, last_first = rows.peek(gl.program_id(0))
    for item in range(gl.program_id(0), rows.items, gl.num_programs(0)):
        batch, kv_head, token = rows.locate(item)
        begin, count, _, _ = rows.walk(place, first, last_place, last_first)
        place, first, last_place, last_first = rows.peek(gl.minimum(item + gl.num_programs(0), rows.items - 1))
        CONSUMERS: gl.constexpr = rows.CONSUMERS
        for c in gl.static_range(CONSUMERS):
            where = [batch, token + c * rows.TOKENS, kv_head * rows.GROUP, 0]
            channels.hold(c, number, q_desc, too_desc, where, BOTH)
        for i in range(count):
            channels.fetch(ring, k_desc, v_desc, [batch, (begin + i) * TILE, kv_head, 0])
            channels.announce(ring, k_desc)
            ring = ring.next()
        number += 1


# ------------------------------------------------------------------------------------------------ forward


@gluon.jit
def forward_consume(C: gl.constexpr, rows, channels, out_desc, lse_ptr, scale_log2):
    """Warpgroup C: rows 64 C .. 64 C + 63 of every item."""
    D: gl.constexpr = rows.D
    dtype: gl.constexpr = out_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    ring = start_ring(channels.passing.shape[0])
    number = gl.to_tensor(0)
    row = gl.arange(0, TILE, layout=row_layout)
    place, first, last_place, last_first = rows.peek(gl.program_id(0))
    for item in range(gl.program_id(0), rows.items, gl.num_programs(0)):
        batch, kv_head, token = rows.locate(item)
        token += C * rows.TOKENS
        begin, count, last_low, first_high = rows.walk(place, first, last_place, last_first)
        place, first, last_place, last_first = rows.peek(gl.minimum(item + gl.num_programs(0), rows.items - 1))
        own_place, own_first = rows.look(batch, token + row // rows.GROUP)

        at = channels.wait_held(C, number)
        q = channels.held.index(at).reshape([TILE, D])
        mbarrier.wait(channels.ready.index(ring.slot), ring.parity)
        s = product(q, channels.passing.index(ring.slot), D, s_layout)
        channels.give_up_last(C, number)
        s = warpgroup_mma_wait(0, deps=(s,))
        slot0 = begin * TILE
        low, high = rows.low(own_first), rows.high(own_place, own_first)
        if (slot0 < last_low) | (slot0 + TILE > first_high):
            s = mask_rows(s, slot0, low, high, s_layout)
        m = gl.maximum(gl.max(s, 1) * scale_log2, NOTHING)
        p = gl.exp2(s * scale_log2 - gl.expand_dims(m, 1))
        total = lane_sum(p, 64)
        p = gl.convert_layout(p.to(dtype), p_layout)
        o = gl.zeros([TILE, D], gl.float32, o_layout)
        for _ in range(count - 1):
            before = ring.slot
            ring = ring.next()
            slot0 += TILE
            mbarrier.wait(channels.ready.index(ring.slot), ring.parity)
            s = product(q, channels.passing.index(ring.slot), D, s_layout)
            o = warpgroup_mma(p, channels.passing_too.index(before).reshape([TILE, D]), o, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            if (slot0 < last_low) | (slot0 + TILE > first_high):
                s = mask_rows(s, slot0, low, high, s_layout)
            m_new = gl.maximum(m, gl.max(s, 1) * scale_log2)
            alpha = gl.exp2(m - m_new)
            m = m_new
            total *= gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, total.type.layout)), 1)
            e = gl.exp2(s * scale_log2 - gl.expand_dims(m, 1))
            total += lane_sum(e, 64)
            # a left side in registers is listed too: ptxas has been seen to overwrite one that was still wanted
            o, p = warpgroup_mma_wait(0, deps=(o, p))
            p = gl.convert_layout(e.to(dtype), p_layout)
            mbarrier.arrive(channels.free.index(before), count=1)
            o *= gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, o_layout)), 1)
        o = warpgroup_mma(p, channels.passing_too.index(ring.slot).reshape([TILE, D]), o, is_async=True)
        total = gl.convert_layout(gl.sum(total, 1), row_layout)
        lse = gl.where(total > 0.0, (m + gl.log2(total)) * LN2, float("-inf"))
        where, inside = rows.numbers(batch, kv_head, token, row)
        gl.store(lse_ptr + where, lse, mask=inside)
        inverse = gl.convert_layout(gl.where(total > 0.0, 1.0 / total, 0.0), gl.SliceLayout(1, o_layout))
        o, p = warpgroup_mma_wait(0, deps=(o, p))
        ring = channels.pass_on(ring)
        o = (o * gl.expand_dims(inverse, 1)).to(dtype)
        send(o, channels.held.index(at), out_desc, rows, batch, kv_head, token)  # the queries' place, done with
        number += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tokens", "slots", "groups", "pairs", "items"])
def forward_kernel(
    q_desc, k_desc, v_desc, out_desc, place, first, lse, scale_log2, tokens, slots, groups, pairs, items,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, STRIDE: gl.constexpr, RATIO: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    rows = Rows(tokens, slots, groups, pairs, items, place, first, GROUP, D, BLOCK, STRIDE, RATIO, CONSUMERS)
    channels = open_channels(q_desc, k_desc, CONSUMERS, STAGES, HELD, False, False)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (forward_consume, (0, rows, channels, out_desc, lse, scale_log2)),
            (forward_consume, (1, rows, channels, out_desc, lse, scale_log2)),
            (produce, (rows, channels, q_desc, q_desc, k_desc, v_desc, False)),
        ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize([
            (forward_consume, (0, rows, channels, out_desc, lse, scale_log2)),
            (forward_consume, (1, rows, channels, out_desc, lse, scale_log2)),
            (forward_consume, (2, rows, channels, out_desc, lse, scale_log2)),
            (produce, (rows, channels, q_desc, q_desc, k_desc, v_desc, False)),
        ], [4, 4, 1], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


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
    place, first, last_place, last_first = rows.peek(gl.program_id(0))
    lse_ahead, delta_ahead = load_numbers(C, rows, row_lse, delta, gl.program_id(0), row)
    for item in range(gl.program_id(0), rows.items, gl.num_programs(0)):
        batch, kv_head, token = rows.locate(item)
        token += C * rows.TOKENS
        next_item = gl.minimum(item + gl.num_programs(0), rows.items - 1)
        begin, count, last_low, first_high = rows.walk(place, first, last_place, last_first)
        place, first, last_place, last_first = rows.peek(next_item)
        own_place, own_first = rows.look(batch, token + row // rows.GROUP)
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
        slot0 = begin * TILE
        low, high = rows.low(own_first), rows.high(own_place, own_first)
        if (slot0 < last_low) | (slot0 + TILE > first_high):
            s = mask_rows(s, slot0, low, high, s_layout)
        p = gl.exp2(s * scale_log2 - gl.expand_dims(lse, 1))
        dp = warpgroup_mma_wait(0, deps=(dp,))
        ds = gl.convert_layout((p * (dp - gl.expand_dims(delta_rows, 1))).to(dtype), ds_layout)
        dq = gl.zeros([TILE, D], gl.float32, o_layout)
        for _ in range(count - 1):
            before = ring.slot
            ring = ring.next()
            slot0 += TILE
            mbarrier.wait(channels.ready.index(ring.slot), ring.parity)
            s = product(q, channels.passing.index(ring.slot), D, s_layout)
            dq = warpgroup_mma(ds, channels.passing.index(before).reshape([TILE, D]), dq, is_async=True)
            dp = product(do, channels.passing_too.index(ring.slot), D, s_layout)
            s = warpgroup_mma_wait(2, deps=(s,))
            if (slot0 < last_low) | (slot0 + TILE > first_high):
                s = mask_rows(s, slot0, low, high, s_layout)
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
    batch, kv_head, token = rows.locate(item)
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
                place, begins = rows.look(batch, i * rows.TOKENS + row // rows.GROUP)
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


# ------------------------------------------------------------------------------------------------ the launchers


def packed(x: Tensor, group: int) -> TensorDescriptor:
    """Bulk copies of 64 rows of (B,T,H,D): 64 / group tokens of `group` heads."""
    block = [1, 64 // group, group, x.shape[3]]
    return TensorDescriptor(
        x, list(x.shape), list(x.stride()), block, gl.NVMMASharedLayout.get_default_for(block, ELEMENTS[x.dtype])
    )


def attend(q: Tensor, k: Tensor, v: Tensor, places: Any, geometry: Any, scale: float) -> tuple[Tensor, Tensor]:
    """out like q and natural-log lse (B,T,H) float32, of a call that `takes` accepts. bf16 or fp16, D 64 or 128."""
    batch, length, heads, dim = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((batch, length, heads), dtype=torch.float32)
    q, k, v = (copyable(x) for x in (q, k, v))
    plan, group = FORWARD[dim], heads // k.shape[2]
    pairs = batch * k.shape[2]
    items = triton.cdiv(length, plan.consumers * 64 // group) * pairs
    forward_kernel[(min(items, programs(q)),)](
        packed(q, group), descriptor(k), descriptor(v), packed(out, group), places.place, places.first_block, lse,
        scale * LOG2E.value, length, k.shape[1], k.shape[2], pairs, items, group, dim,
        geometry.block, geometry.stride, geometry.ratio, plan.consumers, plan.stages,
        plan.consumer_registers, plan.producer_registers, num_warps=4, maxnreg=plan.registers_at_launch,
    )  # fmt: skip
    return out, lse


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
        descriptor(k), descriptor(v), packed(q, group), packed(dout, group), *spots,
        begin, full, rest, end, row_lse, delta, dk, dv, scale_log2, 1 / scale_log2, scale, tiles, shares, length, k.shape[1], kv_heads, pairs, items,
        *shape, plan.consumers, plan.stages,
        plan.consumer_registers, plan.producer_registers, num_warps=4, maxnreg=plan.registers_at_launch,
    )  # fmt: skip
    return dq, dk.sum(0).to(k.dtype), dv.sum(0).to(v.dtype)
