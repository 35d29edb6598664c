"""One token's attention over a ring of keys in Triton, split along the keys (flash decoding, Dao et al. 2023).

Memory-bound: every live key and value is read once, and nothing else of size. A program takes one key/value head of one
row and a share of the slots; its H/G query heads (padded to the 16 rows of a tensor-core product) share what it reads.
With more than one share a second kernel merges the partial results by their log-sum-exp.

Shapes: q, out (B,1,H,D); k, v (B,S,G,D); decay (B,S,H) float32; live (B,) int32.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.launch import on_device, rows_contiguous
from zoo.kernels.units import LOG2E


@dataclass(frozen=True)
class Steps:
    """Slots per step, warps, and steps whose loads are on their way at once (one fewer than `stages`). What counts is
    bytes in flight on a multiprocessor, in several programs: one that begins or ends leaves the bus to the others.
    Rings are split along the keys up to so many `programs`, and never to more: shares are to be merged."""

    slots: int
    warps: int
    stages: int
    programs: int


STEPS = Steps(64, 4, 3, 528)


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, live: Tensor, scale: float, steps: Steps = STEPS
) -> Tensor:
    """out like q; a row with live = 0 gives 0. Checked tensors; k and v may have any strides but the last."""
    batch, _, heads, dim = q.shape
    slots, kv_heads = k.shape[1], k.shape[2]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    group, block_d = heads // kv_heads, max(16, triton.next_power_of_2(dim))
    shares = max(1, min(triton.cdiv(slots, 2 * steps.slots), steps.programs // (batch * kv_heads)))
    per_share = triton.cdiv(triton.cdiv(slots, shares), steps.slots) * steps.slots
    shares = max(1, triton.cdiv(slots, per_share))
    partial = q.new_empty((shares, batch, heads, dim), dtype=torch.float32) if shares > 1 else None
    partial_lse = q.new_empty((shares, batch, heads), dtype=torch.float32) if shares > 1 else None
    decay_strides = (0, 0, 0) if decay is None else decay.stride()
    with on_device(q):
        _share[(batch * kv_heads, shares)](
            q, k, v, decay, live, out, partial, partial_lse, scale, slots, per_share, batch, heads,
            q.stride(0), q.stride(2), *k.stride()[:3], *v.stride()[:3], *decay_strides,
            GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), D=dim, BLOCK_D=block_d, BLOCK_S=steps.slots,
            GATED=decay is not None, MERGED=shares == 1, num_warps=steps.warps, num_stages=steps.stages,
        )  # fmt: skip
        if shares > 1:
            _merge[(batch * heads,)](
                partial, partial_lse, out, shares, batch * heads, D=dim, BLOCK_D=block_d,
                SHARES=triton.next_power_of_2(shares), num_warps=4,
            )  # fmt: skip
    return out


@triton.jit
def _share(
    q_ptr, k_ptr, v_ptr, decay_ptr, live_ptr, out_ptr, partial_ptr, partial_lse_ptr, scale, slots, per_share, B, H,
    stride_qb, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_db, stride_ds, stride_dh,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    GATED: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """One key/value head of one row over slots [share * per_share, (share + 1) * per_share)."""
    program, share = tl.program_id(0), tl.program_id(1)
    kv_heads = H // GROUP
    batch, kv_head = tl.cast(program // kv_heads, tl.int64), program % kv_heads
    live = tl.load(live_ptr + batch)
    first, last = share * per_share, min((share + 1) * per_share, live)
    member, column, step = tl.arange(0, ROWS), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    head = kv_head * GROUP + member
    is_head, is_column = member < GROUP, column < D

    q = tl.load(
        q_ptr + batch * stride_qb + head[:, None] * stride_qh + column[None, :],
        mask=is_head[:, None] & is_column[None, :],
        other=0.0,
    )
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i in range(0, (tl.maximum(last - first, 0) + BLOCK_S - 1) // BLOCK_S):
        slot = first + i * BLOCK_S + step
        is_live = slot < last
        inside = is_live[:, None]
        if D != BLOCK_D:
            inside = inside & is_column[None, :]
        far = tl.cast(slot, tl.int64)
        k = tl.load(k_ptr + far[:, None] * stride_ks + column[None, :], mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        if GATED:
            place = decay_ptr + batch * stride_db + far[None, :] * stride_ds + head[:, None] * stride_dh
            s += tl.load(place, mask=is_live[None, :] & is_head[:, None], other=0.0) * LOG2E
        s = tl.where(is_live[None, :], s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1))  # finite: a step begins at a live slot
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_ptr + far[:, None] * stride_vs + column[None, :], mask=inside, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top

    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    row = batch * H + head
    mask = is_head[:, None] & is_column[None, :]
    if MERGED:
        tl.store(out_ptr + row[:, None] * D + column[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        row += share * tl.cast(B, tl.int64) * H
        tl.store(partial_ptr + row[:, None] * D + column[None, :], out, mask=mask)
        seen = total > 0
        lse = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), -float("inf"))
        tl.store(partial_lse_ptr + row, lse, mask=is_head)


@triton.jit
def _merge(
    partial_ptr, partial_lse_ptr, out_ptr, shares, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """One head of one row: the shares weighted by 2 ** (lse - top)."""
    row = tl.cast(tl.program_id(0), tl.int64)
    share, column = tl.arange(0, SHARES), tl.arange(0, BLOCK_D)
    place = share * tl.cast(rows, tl.int64) + row
    lse = tl.load(partial_lse_ptr + place, mask=share < shares, other=-float("inf"))
    top = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(top == -float("inf"), 0.0, top))
    weight /= tl.where(top == -float("inf"), 1.0, tl.sum(weight, 0))
    mask = (share < shares)[:, None] & (column < D)[None, :]
    partial = tl.load(partial_ptr + place[:, None] * D + column[None, :], mask=mask, other=0.0)
    out = tl.sum(partial * weight[:, None], 0)
    tl.store(out_ptr + row * D + column, out.to(out_ptr.dtype.element_ty), mask=column < D)
