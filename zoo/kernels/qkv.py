"""Queries, keys and values made ready for attention: token shift, RMS norm and rotary positions in one pass, in Triton.

One kernel for q, k and v alike, with switches that vanish at compile time (SPEC.md 3.1, 3.2):

    m_t = keep_t x_t + (1 - keep_t) x_{t-1}        u_t = m_t / rms(m_t)        y_t = rotate(weight * u_t)

A program owns a run of tokens of one row, all heads; everything between load and store is float32. The backward pass
computes m and u again from x. Token t's gradient needs that of m_{t+1}: it is computed twice, once for each token of
the pair, from what the caches hold anyway. Gradients of the norm's weight are summed per program, then by torch: no
atomics, the same bits every time.

Shapes: x, y (B, T, H, D), D even; keep (B, T, H) float32, before its sigmoid; weight (S, H * D), or (S, D) for a norm
of each head, for B / S rows each; cos, sin (B or 1, T, D / 2) float32; starts (T,) bool, where nothing is shifted in.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1024  # of one half of the heads in a tile: 8 to each of the threads below; more spill in the backward
WARPS = 4
RUN = 32  # tokens to a program


def part_forward(
    x: Tensor, keep: Tensor | None, weight: Tensor | None, table: tuple[Tensor, Tensor] | None,
    starts: Tensor | None, per_head: bool, eps: float,
) -> Tensor:  # fmt: skip
    """y, contiguous, of x's dtype."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        call = _Call(x, keep, weight, table, starts, per_head, eps)
        _forward[call.grid](*call.inputs, y, *call.sizes, **call.switches)
    return y


def part_backward(
    grad: Tensor, x: Tensor, keep: Tensor | None, weight: Tensor | None, table: tuple[Tensor, Tensor] | None,
    starts: Tensor | None, per_head: bool, eps: float, out: Tensor,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Writes the gradient of x to `out` (B, T, H, D), heads contiguous; returns those of keep and weight."""
    grad = grad.contiguous()
    keep_grad = None if keep is None else torch.empty(keep.shape, dtype=keep.dtype, device=keep.device)
    call = _Call(x, keep, weight, table, starts, per_head, eps)
    runs, batch = call.grid
    partial = x.new_empty((batch, runs, *x.shape[2:]), dtype=torch.float32) if weight is not None else None
    if x.numel():
        _backward[call.grid](
            *call.inputs, grad, out, keep_grad, partial, *out.stride()[:2], *call.sizes, **call.switches
        )
    if weight is None or partial is None:
        return keep_grad, None
    stacked = partial.unflatten(0, (weight.shape[0], -1)).flatten(1, 2)  # (S, programs, H, D)
    total = stacked.sum(dim=(1, 2)) if per_head else stacked.sum(dim=1).flatten(1)
    return keep_grad, total.to(weight.dtype)


class _Call:
    """What both directions pass to their kernel."""

    def __init__(
        self, x: Tensor, keep: Tensor | None, weight: Tensor | None, table: tuple[Tensor, Tensor] | None,
        starts: Tensor | None, per_head: bool, eps: float,
    ):  # fmt: skip
        batch, tokens, heads, dim = x.shape
        cos, sin = (None, None) if table is None else (part.contiguous() for part in table)
        shared = cos is None or cos.shape[0] == 1
        keep_strides = (0, 0) if keep is None else keep.stride()[:2]
        stack = 1 if weight is None else weight.shape[0]
        heads_2, half_2 = triton.next_power_of_2(heads), triton.next_power_of_2(dim // 2)
        self.grid = (triton.cdiv(tokens, RUN), batch)
        self.inputs: tuple[Any, ...] = (
            x, keep, None if weight is None else weight.contiguous(), cos, sin, starts,
        )  # fmt: skip
        self.sizes: tuple[Any, ...] = (
            *x.stride()[:2], *keep_strides, 0 if shared else tokens, max(1, batch // stack), tokens, heads, eps,
        )  # fmt: skip
        self.switches: dict[str, Any] = {
            "D": dim, "SHIFT": keep is not None, "NORM": weight is not None, "PER_HEAD": per_head,
            "ROTATE": cos is not None, "CUT": starts is not None,
            "TOKENS": min(RUN, max(1, ELEMENTS // (heads_2 * half_2))), "HEADS": heads_2, "HALF": half_2, "RUN": RUN,
            "num_warps": WARPS,
        }  # fmt: skip


@triton.jit
def _pair(x_ptr, starts_ptr, stride_t, token, at, alive, T, SHIFT: tl.constexpr, CUT: tl.constexpr):
    """One half of the heads: x of the token itself, and what is shifted in."""
    own = tl.load(x_ptr + token[:, None, None] * stride_t + at, mask=alive, other=0.0).to(tl.float32)
    if SHIFT:
        shifted = token > 0
        if CUT:
            shifted = shifted & (tl.load(starts_ptr + token, mask=(token >= 0) & (token < T), other=1) == 0)
        before = tl.load(
            x_ptr + (token - 1)[:, None, None] * stride_t + at, mask=alive & shifted[:, None, None], other=0.0
        ).to(tl.float32)
    else:
        before = own
    return own, before


@triton.jit
def _keep(keep_ptr, stride_kt, token, head, T, H):
    inside = (token < T)[:, None] & (head < H)[None, :]
    keep = tl.load(keep_ptr + token[:, None] * stride_kt + head[None, :], mask=inside, other=0.0)
    return tl.sigmoid(keep.to(tl.float32))[:, :, None]


@triton.jit
def _mean(x, y, H, D: tl.constexpr, PER_HEAD: tl.constexpr):
    """Over the whole token, or each head, of two halves: (TOKENS, 1 or HEADS, 1)."""
    total = tl.sum(x + y, 2)
    if PER_HEAD:
        mean = (total / D)[:, :, None]
    else:
        mean = (tl.sum(total, 1) / (H * D))[:, None, None]
    return mean


@triton.jit
def _angles(cos_ptr, sin_ptr, place, lane, inside, HALF_D: tl.constexpr):
    at = place[:, None] * HALF_D + lane[None, :]
    mask = inside[:, None] & (lane < HALF_D)[None, :]
    cos = tl.load(cos_ptr + at, mask=mask, other=0.0)[:, None, :]
    sin = tl.load(sin_ptr + at, mask=mask, other=0.0)[:, None, :]
    return cos, sin


@triton.jit(do_not_specialize=["table_rows", "rows_each", "T"])
def _forward(
    x_ptr, keep_ptr, weight_ptr, cos_ptr, sin_ptr, starts_ptr, y_ptr,
    stride_b, stride_t, stride_kb, stride_kt, table_rows, rows_each, T, H, eps,
    D: tl.constexpr, SHIFT: tl.constexpr, NORM: tl.constexpr, PER_HEAD: tl.constexpr, ROTATE: tl.constexpr,
    CUT: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    run, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    HALF_D: tl.constexpr = D // 2
    head, lane = tl.arange(0, HEADS), tl.arange(0, HALF)
    real = ((head < H)[:, None] & (lane < HALF_D)[None, :])[None]
    at = (head[:, None] * D + lane[None, :])[None]
    x_ptr += batch * stride_b
    if NORM:
        weight_at = lane[None, None, :] if PER_HEAD else at
        weight_ptr += batch // rows_each * (D if PER_HEAD else H * D)
        weight_a = tl.load(weight_ptr + weight_at, mask=real, other=0.0).to(tl.float32)
        weight_b = tl.load(weight_ptr + weight_at + HALF_D, mask=real, other=0.0).to(tl.float32)
    for step in range(0, RUN // TOKENS):
        token = run * RUN + step * TOKENS + tl.arange(0, TOKENS)
        alive = real & (token < T)[:, None, None]
        a, before_a = _pair(x_ptr, starts_ptr, stride_t, token, at, alive, T, SHIFT, CUT)
        b, before_b = _pair(x_ptr, starts_ptr, stride_t, token, at + HALF_D, alive, T, SHIFT, CUT)
        if SHIFT:
            keep = _keep(keep_ptr + batch * stride_kb, stride_kt, token, head, T, H)
            a = keep * a + (1 - keep) * before_a
            b = keep * b + (1 - keep) * before_b
        if NORM:
            scale = tl.rsqrt(_mean(a * a, b * b, H, D, PER_HEAD) + eps)
            a = a * scale * weight_a
            b = b * scale * weight_b
        if ROTATE:
            cos, sin = _angles(cos_ptr, sin_ptr, batch * table_rows + token, lane, token < T, HALF_D)
            a, b = a * cos - b * sin, a * sin + b * cos
        out_ptr = y_ptr + (batch * T + token)[:, None, None] * (H * D) + at
        tl.store(out_ptr, a.to(y_ptr.dtype.element_ty), mask=alive)
        tl.store(out_ptr + HALF_D, b.to(y_ptr.dtype.element_ty), mask=alive)


@triton.jit
def _mixed_gradient(
    x_ptr, keep_ptr, cos_ptr, sin_ptr, starts_ptr, grad_ptr, weight_a, weight_b,
    stride_t, stride_kt, token, head, lane, at, real, T, H, eps,
    D: tl.constexpr, SHIFT: tl.constexpr, NORM: tl.constexpr, PER_HEAD: tl.constexpr, ROTATE: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """Of tokens: both halves of d m and of d weight; what keep weighs against each other, summed with d m; and keep.
    Zero for a token past the end."""
    HALF_D: tl.constexpr = D // 2
    alive = real & (token < T)[:, None, None]
    a, before_a = _pair(x_ptr, starts_ptr, stride_t, token, at, alive, T, SHIFT, CUT)
    b, before_b = _pair(x_ptr, starts_ptr, stride_t, token, at + HALF_D, alive, T, SHIFT, CUT)
    grad_at = grad_ptr + token[:, None, None] * (H * D) + at
    da = tl.load(grad_at, mask=alive, other=0.0).to(tl.float32)
    db = tl.load(grad_at + HALF_D, mask=alive, other=0.0).to(tl.float32)
    if ROTATE:
        cos, sin = _angles(cos_ptr, sin_ptr, token, lane, token < T, HALF_D)
        da, db = da * cos + db * sin, db * cos - da * sin
    if SHIFT:
        keep = _keep(keep_ptr, stride_kt, token, head, T, H)
        apart_a, apart_b = a - before_a, b - before_b
        a = before_a + keep * apart_a
        b = before_b + keep * apart_b
    weight_da, weight_db = da, db
    if NORM:
        scale = tl.rsqrt(_mean(a * a, b * b, H, D, PER_HEAD) + eps)
        a, b = a * scale, b * scale
        weight_da, weight_db = da * a, db * b
        da, db = da * weight_a, db * weight_b
        along = _mean(da * a, db * b, H, D, PER_HEAD)
        da, db = scale * (da - a * along), scale * (db - b * along)
    if SHIFT:
        lean = tl.sum(da * apart_a + db * apart_b, 2)
    else:
        keep = da
        lean = tl.sum(da, 2)
    return da, db, weight_da, weight_db, lean, keep


@triton.jit(do_not_specialize=["table_rows", "rows_each", "T"])
def _backward(
    x_ptr, keep_ptr, weight_ptr, cos_ptr, sin_ptr, starts_ptr, grad_ptr, dx_ptr, dkeep_ptr, partial_ptr,
    stride_ob, stride_ot, stride_b, stride_t, stride_kb, stride_kt, table_rows, rows_each, T, H, eps,
    D: tl.constexpr, SHIFT: tl.constexpr, NORM: tl.constexpr, PER_HEAD: tl.constexpr, ROTATE: tl.constexpr,
    CUT: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    run, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    HALF_D: tl.constexpr = D // 2
    head, lane = tl.arange(0, HEADS), tl.arange(0, HALF)
    real = ((head < H)[:, None] & (lane < HALF_D)[None, :])[None]
    at = (head[:, None] * D + lane[None, :])[None]
    x_ptr += batch * stride_b
    grad_ptr += batch * T * H * D
    dx_ptr += batch * stride_ob
    if SHIFT:
        keep_ptr += batch * stride_kb
    if ROTATE:
        cos_ptr += batch * table_rows * HALF_D
        sin_ptr += batch * table_rows * HALF_D
    weight_a = tl.zeros([1, HEADS, HALF], tl.float32)
    weight_b = weight_a
    sum_a = tl.zeros([HEADS, HALF], tl.float32)
    sum_b = tl.zeros([HEADS, HALF], tl.float32)
    if NORM:
        weight_at = lane[None, None, :] if PER_HEAD else at
        weight_ptr += batch // rows_each * (D if PER_HEAD else H * D)
        weight_a = tl.load(weight_ptr + weight_at, mask=real, other=0.0).to(tl.float32)
        weight_b = tl.load(weight_ptr + weight_at + HALF_D, mask=real, other=0.0).to(tl.float32)
    for step in range(0, RUN // TOKENS):
        token = run * RUN + step * TOKENS + tl.arange(0, TOKENS)
        da, db, weight_da, weight_db, lean, keep = _mixed_gradient(
            x_ptr, keep_ptr, cos_ptr, sin_ptr, starts_ptr, grad_ptr, weight_a, weight_b,
            stride_t, stride_kt, token, head, lane, at, real, T, H, eps, D, SHIFT, NORM, PER_HEAD, ROTATE, CUT,
        )  # fmt: skip
        if NORM:
            sum_a += tl.sum(weight_da, 0)
            sum_b += tl.sum(weight_db, 0)
        if SHIFT:
            inside = (token < T)[:, None] & (head < H)[None, :]
            share = tl.reshape(keep, [TOKENS, HEADS])
            dkeep_at = (batch * T + token)[:, None] * H + head[None, :]
            tl.store(dkeep_ptr + dkeep_at, lean * share * (1 - share), mask=inside)
            later_a, later_b, _, _, _, later_keep = _mixed_gradient(
                x_ptr, keep_ptr, cos_ptr, sin_ptr, starts_ptr, grad_ptr, weight_a, weight_b,
                stride_t, stride_kt, token + 1, head, lane, at, real, T, H, eps, D, SHIFT, NORM, PER_HEAD, ROTATE, CUT,
            )  # fmt: skip
            passed = 1 - later_keep
            if CUT:
                passed = tl.where(
                    (tl.load(starts_ptr + token + 1, mask=token + 1 < T, other=1) == 0)[:, None, None], passed, 0.0
                )
            da = keep * da + passed * later_a
            db = keep * db + passed * later_b
        alive = real & (token < T)[:, None, None]
        out_ptr = dx_ptr + token[:, None, None] * stride_ot + at
        tl.store(out_ptr, da.to(dx_ptr.dtype.element_ty), mask=alive)
        tl.store(out_ptr + HALF_D, db.to(dx_ptr.dtype.element_ty), mask=alive)
    if NORM:
        out_ptr = partial_ptr + ((batch * tl.num_programs(0) + run) * (H * D) + at)
        tl.store(out_ptr, sum_a[None], mask=real)
        tl.store(out_ptr + HALF_D, sum_b[None], mask=real)
