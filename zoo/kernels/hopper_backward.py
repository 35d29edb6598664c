"""Gated causal sliding-window attention, backward, for Hopper (sm_90), in Gluon. Deterministic: no atomics.

    P_tj = exp(scale q_t.k_j + U_t - U_j - lse_t)        delta_t = out_t.dout_t - dlse_t
    dS_tj = P_tj (dout_t.v_j - delta_t)                  dU_j = sum_i dS_ji - sum_t dS_tj
    dq_t = scale sum_j dS_tj k_j      dk_j = scale sum_t dS_tj q_t      dv_j = sum_t P_tj dout_t

Two kernels of the forward's shape, one warp that produces and warpgroups of 64 rows that consume: hopper_dq.py, then
hopper_dkv.py. Both recompute P: seven products, one writer per element.
"""

import torch
from torch import Tensor

from zoo.kernels import gate as gates
from zoo.kernels.hopper_band import Schedule, ceil_div, copyable, descriptor, pointers, programs
from zoo.kernels.hopper_dkv import dkv_kernel
from zoo.kernels.hopper_dq import dq_kernel
from zoo.kernels.units import LOG2E

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
    kept: tuple[Tensor, Tensor] | None = None,
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
    key_side = lse.new_empty((B, H, N)) if gate else None
    (starts, ends), (firsts, lasts) = pointers(spans, lse), pointers(kept, lse)
    bounded = (spans is not None, kept is not None)
    scales = (scale * LOG2E.value, 1 / (scale * LOG2E.value), scale)
    sizes = (B, H, T, N, min(window or N, N))

    plan = dq_schedule or DQ_TABLE[D]
    blocks = ceil_div(ceil_div(N, 64) - (N - T) // 64, plan.consumers)
    items = blocks * B * H
    dq_kernel[(min(items, programs(q)),)](
        descriptor(q), descriptor(dout), descriptor(k), descriptor(v), descriptor(dq),
        dq, out, dout, suffix, total, starts, firsts, lse,
        lse if dlse is None else dlse.contiguous(), rows, *scales, *sizes, blocks, items,
        plan.consumers, D, H // G, plan.stages, bool(gate), *bounded, plan.in_shared, dlse is not None,
        plan.consumer_registers, plan.producer_registers, num_warps=4, maxnreg=plan.registers_at_launch,
    )  # fmt: skip

    plan = dkv_schedule or DKV_TABLE[D]
    blocks = ceil_div(ceil_div(N, 64), plan.consumers)
    items = blocks * B * G
    dkv_kernel[(min(items, programs(q) * (2 if plan.consumers == 1 else 1)),)](
        descriptor(k), descriptor(v), descriptor(q), descriptor(dout), descriptor(dk), descriptor(dv),
        suffix, total, starts, ends, firsts, lasts, rows, key_side if gate else rows, *scales, *sizes, blocks, items,
        plan.consumers, D, H // G, plan.stages, bool(gate), *bounded, plan.in_shared,
        plan.consumer_registers, plan.producer_registers, num_warps=4, maxnreg=plan.registers_at_launch,
    )  # fmt: skip
    if key_side is None:
        return dq, dk, dv, ()
    return dq, dk, dv, gates.prefix_backward(key_side, rows[2], gate, None if spans is None else spans[1])
