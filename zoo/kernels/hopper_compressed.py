"""Attention over compressed blocks on Hopper (sm_90), forward, in Gluon (zoo/kernels/nsa.py says what it is).

The portable kernel's plan (zoo/kernels/nsa_compressed.py) on warpgroups: rows stay, keys and values pass by, an online
softmax. The output leaves by way of the queries' place, while the next item's queries are there already.
`forward_program` serves other geometries too: hopper_near.py.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from zoo.kernels.hopper_band import (
    NOTHING,
    TILE,
    Schedule,
    copyable,
    descriptor,
    lane_sum,
    programs,
    start_ring,
)
from zoo.kernels.hopper_rows import HELD, Rows, locate, open_channels, packed, produce, product, send
from zoo.kernels.units import LOG2E

# by head dim
FORWARD = {64: Schedule(3, 4, True, 160, 32), 128: Schedule(3, 3, True, 160, 32)}


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
    for item in range(gl.program_id(0), rows.items, gl.num_programs(0)):
        batch, kv_head, token = locate(rows, item)
        walk = rows.walk(item, batch, kv_head, token)
        token += C * rows.TOKENS
        looked = rows.look(batch, kv_head, token + row // rows.GROUP)

        at = channels.wait_held(C, number)
        q = channels.held.index(at).reshape([TILE, D])
        mbarrier.wait(channels.ready.index(ring.slot), ring.parity)
        s = product(q, channels.passing.index(ring.slot), D, s_layout)
        channels.give_up_last(C, number)
        s = warpgroup_mma_wait(0, deps=(s,))
        sight = rows.sight(*looked)
        if walk.ragged:
            s = rows.mask(s, walk.begin, sight, s_layout)
        m = gl.maximum(gl.max(s, 1) * scale_log2, NOTHING)
        p = gl.exp2(s * scale_log2 - gl.expand_dims(m, 1))
        total = lane_sum(p, 64)
        p = gl.convert_layout(p.to(dtype), p_layout)
        o = gl.zeros([TILE, D], gl.float32, o_layout)
        key0 = walk.then
        for _ in range(walk.count - 1):
            before = ring.slot
            ring = ring.next()
            mbarrier.wait(channels.ready.index(ring.slot), ring.parity)
            s = product(q, channels.passing.index(ring.slot), D, s_layout)
            o = warpgroup_mma(p, channels.passing_too.index(before).reshape([TILE, D]), o, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            if walk.needs_mask(key0):
                s = rows.mask(s, key0, sight, s_layout)
            key0 += TILE
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
        lse = gl.where(total > 0.0, m + gl.log2(total), float("-inf"))
        rows.keep_lse(lse_ptr, batch, kv_head, token, row, lse)
        inverse = gl.convert_layout(gl.where(total > 0.0, 1.0 / total, 0.0), gl.SliceLayout(1, o_layout))
        o, p = warpgroup_mma_wait(0, deps=(o, p))
        ring = channels.pass_on(ring)
        o = (o * gl.expand_dims(inverse, 1)).to(dtype)
        send(o, channels.held.index(at), out_desc, rows, batch, kv_head, token)  # the queries' place, done with
        number += 1
    tma.store_wait(0)


@gluon.jit
def forward_program(
    rows, q_desc, k_desc, v_desc, out_desc, lse, scale_log2, STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    channels = open_channels(q_desc, k_desc, rows.CONSUMERS, STAGES, HELD, False, False)
    if rows.CONSUMERS == 2:
        gl.warp_specialize([
            (forward_consume, (0, rows, channels, out_desc, lse, scale_log2)),
            (forward_consume, (1, rows, channels, out_desc, lse, scale_log2)),
            (produce, (rows, channels, q_desc, q_desc, k_desc, v_desc, False)),
        ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
    else:
        gl.static_assert(rows.CONSUMERS == 3)
        gl.warp_specialize([
            (forward_consume, (0, rows, channels, out_desc, lse, scale_log2)),
            (forward_consume, (1, rows, channels, out_desc, lse, scale_log2)),
            (forward_consume, (2, rows, channels, out_desc, lse, scale_log2)),
            (produce, (rows, channels, q_desc, q_desc, k_desc, v_desc, False)),
        ], [4, 4, 1], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


@gluon.jit(do_not_specialize=["tokens", "slots", "groups", "pairs", "items"])
def forward_kernel(
    q_desc, k_desc, v_desc, out_desc, place, first, lse, scale_log2, tokens, slots, groups, pairs, items,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, STRIDE: gl.constexpr, RATIO: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    rows = Rows(tokens, slots, groups, pairs, items, place, first, GROUP, D, BLOCK, STRIDE, RATIO, CONSUMERS)
    forward_program(
        rows, q_desc, k_desc, v_desc, out_desc, lse, scale_log2, STAGES, CONSUMER_REGISTERS, PRODUCER_REGISTERS
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
