"""Queries, keys and values made ready for attention: token shift, RMS norm and rotary positions in one pass, in Triton.

One launch for q, k and v, with switches that vanish at compile time (SPEC.md 3.1, 3.2):

    m_t = keep_t x_t + (1 - keep_t) x_{t-1}        u_t = m_t / rms(m_t)        y_t = rotate(weight * u_t)

A row of a tile walks along RUN tokens, a token a step, all heads; what neighbours share, x and the gradient that a
token passes to the one before it, stays in registers from one step to the next, so everything is read and computed
once. The tokens to come are under way in shared memory (STAGES). The forward pass walks up; the backward pass walks
down and computes m and u again from x. It begins with the token after its run, for what that one passes on. Everything
between load and store is float32. Gradients of the norms' weights are summed per program, then by another kernel: no
atomics, the same bits every time.

The backward pass leaves what the projection wants: one row for each token, with the gradients of qkv, of whatever gates
were projected beside it, and of keep.

Shapes: qkv (B, T, H + 2 G, D), heads contiguous, D even; keep (B, T, 2 G) float32, for k then v, before its sigmoid;
weights (S, H * D) and (S, G * D), or (S, D) for a norm of each head, for B / S rows each; cos, sin (B or 1, T, D / 2)
float32; starts (T,) bool, where nothing is shifted in.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.launch import on_device
from zoo.kernels.pieces import add_up

ELEMENTS = 512  # of one half of the heads in a tile, at least
EACH = 8  # of them to a thread: a 128-bit load of 16-bit elements
RUN = 32  # tokens to a row of a tile
STAGES = 4  # of the walk: all but one on their way


def prepare_forward(
    qkv: Tensor, keep: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, starts: Tensor | None, heads: int, per_head: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v, contiguous, of qkv's dtype."""
    call = _Call(qkv, keep, q_weight, k_weight, cos, sin, starts, heads, per_head, eps)
    batch, tokens, _, dim = qkv.shape
    outputs = [
        torch.empty((batch, tokens, n, dim), dtype=qkv.dtype, device=qkv.device)
        for n in (heads, call.groups, call.groups)
    ]
    if qkv.numel():
        with on_device(qkv):
            qkv_forward_kernel[call.grid](*call.inputs, *outputs, *call.sizes, **call.switches)
    return outputs[0], outputs[1], outputs[2]


def prepare_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, dgates: Tensor, qkv: Tensor, keep: Tensor, q_weight: Tensor | None,
    k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, starts: Tensor | None, heads: int, per_head: bool,
    eps: float, width: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The gradients of qkv, gates and keep side by side in a row of `width` columns, zeros behind them: (B, T, width)
    of qkv's dtype; and those of the weights of q and k, head by head: (S, H + G, D) float32."""
    call = _Call(qkv, keep, q_weight, k_weight, cos, sin, starts, heads, per_head, eps)
    batch, tokens, _, dim = qkv.shape
    packed = torch.empty((batch, tokens, width), dtype=qkv.dtype, device=qkv.device)
    gates = dgates.shape[2]
    columns = {"GATES": gates, "OUT": width, "SPARE": width - qkv.shape[2] * dim - gates - keep.shape[2]}
    partial = None
    if q_weight is not None:
        size = (batch, call.grid[0], heads + call.groups, dim)
        partial = torch.empty(size, dtype=torch.float32, device=qkv.device)
    if qkv.numel():
        grads = (x.contiguous() for x in (dq, dk, dv, dgates))
        with on_device(qkv):
            qkv_backward_kernel[call.grid](
                *call.inputs, *grads, packed, partial, *call.sizes, **call.switches, **columns
            )
    if partial is None or q_weight is None:
        return packed, None
    pieces = partial.view(q_weight.shape[0], -1, (heads + call.groups) * dim)
    return packed, add_up(pieces).unflatten(1, (-1, dim))


class _Call:
    """What both directions pass to their kernel."""

    def __init__(
        self, qkv: Tensor, keep: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None,
        sin: Tensor | None, starts: Tensor | None, heads: int, per_head: bool, eps: float,
    ):  # fmt: skip
        if qkv.stride(3) != 1 or qkv.stride(2) != qkv.shape[3]:
            qkv = qkv.contiguous()
        keep = keep if keep.stride(2) == 1 else keep.contiguous()
        batch, tokens, packed, dim = qkv.shape
        self.groups = (packed - heads) // 2
        half = triton.next_power_of_2(dim // 2)
        wide, narrow = (triton.next_power_of_2(n) * half for n in (heads, self.groups))
        tile = max(ELEMENTS, wide, narrow)
        rows = (tile // wide, tile // narrow)
        self.grid = (triton.cdiv(tokens, RUN * min(rows)), batch, 3)
        rest = (None if x is None else x.contiguous() for x in (q_weight, k_weight, cos, sin))
        self.inputs: tuple[Any, ...] = (qkv, keep, *rest, starts)
        self.sizes: tuple[Any, ...] = (
            *qkv.stride()[:2], *keep.stride()[:2], tokens if cos is not None and cos.shape[0] > 1 else 0,
            1 if q_weight is None else batch // q_weight.shape[0], tokens, eps,
        )  # fmt: skip
        self.switches: dict[str, Any] = {
            "H": heads, "G": self.groups, "D": dim, "NORM": q_weight is not None, "PER_HEAD": per_head,
            "ROTATE": cos is not None, "CUT": starts is not None, "ROWS_Q": rows[0], "ROWS_KV": rows[1], "HALF": half,
            "RUN": RUN, "STAGES": STAGES, "num_warps": max(1, min(16, tile // (32 * EACH))),
        }  # fmt: skip


@triton.jit(do_not_specialize=["table_rows", "rows_each", "T"])
def qkv_forward_kernel(
    qkv_ptr, keep_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, starts_ptr, q_ptr, k_ptr, v_ptr,
    stride_b, stride_t, stride_kb, stride_kt, table_rows, rows_each, T, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, PER_HEAD: tl.constexpr,
    ROTATE: tl.constexpr, CUT: tl.constexpr, ROWS_Q: tl.constexpr, ROWS_KV: tl.constexpr, HALF: tl.constexpr,
    RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program, batch, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    qkv_ptr += batch * stride_b
    keep_ptr += batch * stride_kb
    if ROTATE:
        cos_ptr += batch * table_rows * (D // 2)
        sin_ptr += batch * table_rows * (D // 2)
    stack = batch // rows_each
    if part == 0:  # the longest first
        _up(
            qkv_ptr + H * D, keep_ptr, k_weight_ptr, cos_ptr, sin_ptr, starts_ptr, k_ptr + batch * T * (G * D),
            program, stack, stride_t, stride_kt, T, eps, G, D, True, NORM, PER_HEAD, ROTATE, CUT, ROWS_KV, HALF, RUN,
            STAGES, ROWS_KV > ROWS_Q,
        )  # fmt: skip
    elif part == 1:
        _up(
            qkv_ptr, keep_ptr, q_weight_ptr, cos_ptr, sin_ptr, starts_ptr, q_ptr + batch * T * (H * D),
            program, stack, stride_t, stride_kt, T, eps, H, D, False, NORM, PER_HEAD, ROTATE, CUT, ROWS_Q, HALF, RUN,
            STAGES, ROWS_Q > ROWS_KV,
        )  # fmt: skip
    else:
        _up(
            qkv_ptr + (H + G) * D, keep_ptr + G, None, cos_ptr, sin_ptr, starts_ptr, v_ptr + batch * T * (G * D),
            program, stack, stride_t, stride_kt, T, eps, G, D, True, False, PER_HEAD, False, CUT, ROWS_KV, HALF, RUN,
            STAGES, ROWS_KV > ROWS_Q,
        )  # fmt: skip


@triton.jit(do_not_specialize=["table_rows", "rows_each", "T"])
def qkv_backward_kernel(
    qkv_ptr, keep_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, starts_ptr, dq_ptr, dk_ptr, dv_ptr, dgates_ptr,
    packed_ptr, partial_ptr,
    stride_b, stride_t, stride_kb, stride_kt, table_rows, rows_each, T, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, PER_HEAD: tl.constexpr,
    ROTATE: tl.constexpr, CUT: tl.constexpr, ROWS_Q: tl.constexpr, ROWS_KV: tl.constexpr, HALF: tl.constexpr,
    RUN: tl.constexpr, STAGES: tl.constexpr, GATES: tl.constexpr, OUT: tl.constexpr, SPARE: tl.constexpr,
):  # fmt: skip
    """packed (B, T, OUT): the gradients of q, k, v, of GATES gates and of keep, then SPARE zeros."""
    program, batch, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    qkv_ptr += batch * stride_b
    packed_ptr += batch * T * OUT
    keep_ptr += batch * stride_kb
    gates_ptr = packed_ptr + (H + 2 * G) * D
    dkeep_ptr = gates_ptr + GATES
    if ROTATE:
        cos_ptr += batch * table_rows * (D // 2)
        sin_ptr += batch * table_rows * (D // 2)
    if NORM:
        partial_ptr += (batch * tl.num_programs(0) + program) * ((H + G) * D)
    stack = batch // rows_each
    if part == 0:
        _down(
            qkv_ptr + H * D, keep_ptr, k_weight_ptr, cos_ptr, sin_ptr, starts_ptr, dk_ptr + batch * T * (G * D),
            packed_ptr + H * D, dkeep_ptr, None if partial_ptr is None else partial_ptr + H * D,
            program, stack, stride_t, stride_kt, T, eps, G, D, OUT, True, NORM, PER_HEAD, ROTATE, CUT, ROWS_KV, HALF,
            RUN, STAGES, ROWS_KV > ROWS_Q,
        )  # fmt: skip
    elif part == 1:
        if GATES + SPARE > 0:
            _copy_gates(
                dgates_ptr + batch * T * GATES, gates_ptr, program * (ROWS_Q * RUN), T, GATES, 2 * G, SPARE, OUT,
                ROWS_Q * RUN,
            )  # fmt: skip
        _down(
            qkv_ptr, keep_ptr, q_weight_ptr, cos_ptr, sin_ptr, starts_ptr, dq_ptr + batch * T * (H * D),
            packed_ptr, None, partial_ptr,
            program, stack, stride_t, stride_kt, T, eps, H, D, OUT, False, NORM, PER_HEAD, ROTATE, CUT, ROWS_Q, HALF,
            RUN, STAGES, ROWS_Q > ROWS_KV,
        )  # fmt: skip
    else:
        _down(
            qkv_ptr + (H + G) * D, keep_ptr + G, None, cos_ptr, sin_ptr, starts_ptr, dv_ptr + batch * T * (G * D),
            packed_ptr + (H + G) * D, dkeep_ptr + G, None,
            program, stack, stride_t, stride_kt, T, eps, G, D, OUT, True, False, PER_HEAD, False, CUT, ROWS_KV, HALF,
            RUN, STAGES, ROWS_KV > ROWS_Q,
        )  # fmt: skip


@triton.jit
def _copy_gates(
    dgates_ptr, gates_ptr, first, T, GATES: tl.constexpr, KEEP: tl.constexpr, SPARE: tl.constexpr, OUT: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Gradients of gates (T, GATES) into their columns, and zeros into those that stand behind the KEEP next ones."""
    COLUMNS: tl.constexpr = triton.next_power_of_2(GATES + SPARE)
    token, column = first + tl.arange(0, TOKENS)[:, None], tl.arange(0, COLUMNS)[None, :]
    grad = tl.zeros([TOKENS, COLUMNS], tl.float32)
    if GATES > 0:
        grad += tl.load(dgates_ptr + token * GATES + column, mask=(token < T) & (column < GATES), other=0.0)
    place = tl.where(column < GATES, column, column + KEEP)
    tl.store(gates_ptr + token * OUT + place, grad, mask=(token < T) & (column < GATES + SPARE))


@triton.jit
def _both(ptr, token, inside, stride_t, at, real, HALF_D: tl.constexpr):
    """The two halves of all heads of these tokens, zero where not inside."""
    mask = real & inside[:, None, None]
    ptr += token[:, None, None] * stride_t + at
    a = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(ptr + HALF_D, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _put(ptr, a, b, token, inside, stride_t, at, real, HALF_D: tl.constexpr):
    mask = real & inside[:, None, None]
    ptr += token[:, None, None] * stride_t + at
    tl.store(ptr, a.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + HALF_D, b.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weight(weight_ptr, stack, head, lane, real, H: tl.constexpr, D: tl.constexpr, PER_HEAD: tl.constexpr):
    if PER_HEAD:
        weight_ptr += stack * D + lane[None, None, :]
    else:
        weight_ptr += stack * (H * D) + (head[:, None] * D + lane[None, :])[None]
    a = tl.load(weight_ptr, mask=real, other=0.0).to(tl.float32)
    b = tl.load(weight_ptr + D // 2, mask=real, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _angles(cos_ptr, sin_ptr, token, inside, lane, HALF_D: tl.constexpr):
    at = token[:, None] * HALF_D + lane[None, :]
    mask = inside[:, None] & (lane < HALF_D)[None, :]
    cos = tl.load(cos_ptr + at, mask=mask, other=0.0)[:, None, :]
    sin = tl.load(sin_ptr + at, mask=mask, other=0.0)[:, None, :]
    return cos, sin


@triton.jit
def _keep(keep_ptr, token, inside, stride_kt, head, H: tl.constexpr):
    mask = inside[:, None] & (head < H)[None, :]
    return tl.sigmoid(tl.load(keep_ptr + token[:, None] * stride_kt + head[None, :], mask=mask, other=0.0))


@triton.jit
def _starts_here(starts_ptr, token, inside):
    return tl.load(starts_ptr + token, mask=inside, other=1) != 0


@triton.jit
def _up(
    x_ptr, keep_ptr, weight_ptr, cos_ptr, sin_ptr, starts_ptr, y_ptr, program, stack, stride_t, stride_kt, T, eps,
    H: tl.constexpr, D: tl.constexpr, SHIFT: tl.constexpr, NORM: tl.constexpr, PER_HEAD: tl.constexpr,
    ROTATE: tl.constexpr, CUT: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, RUN: tl.constexpr,
    STAGES: tl.constexpr, FEWER: tl.constexpr,
):  # fmt: skip
    """The forward pass of one part: ROWS runs of tokens, next to each other."""
    HALF_D: tl.constexpr = D // 2
    HEADS: tl.constexpr = triton.next_power_of_2(H)
    head, lane = tl.arange(0, HEADS), tl.arange(0, HALF)
    real = ((head < H)[:, None] & (lane < HALF_D)[None, :])[None]
    at = (head[:, None] * D + lane[None, :])[None]
    first = (program * ROWS + tl.arange(0, ROWS)) * RUN
    if NORM:
        weight_a, weight_b = _weight(weight_ptr, stack, head, lane, real, H, D, PER_HEAD)
    if SHIFT:
        before_a, before_b = _both(x_ptr, first - 1, (first > 0) & (first <= T), stride_t, at, real, HALF_D)
    steps = RUN
    if FEWER:  # programs than the part that made the grid
        steps = tl.where(program * (ROWS * RUN) < T, steps, 0)
    for step in tl.range(0, steps, num_stages=STAGES):
        token = first + step
        inside = token < T
        a, b = _both(x_ptr, token, inside, stride_t, at, real, HALF_D)
        if SHIFT:
            own_a, own_b = a, b
            if CUT:
                cut = _starts_here(starts_ptr, token, inside)[:, None, None]
                before_a, before_b = tl.where(cut, 0.0, before_a), tl.where(cut, 0.0, before_b)
            keep = _keep(keep_ptr, token, inside, stride_kt, head, H)[:, :, None]
            a, b = before_a + keep * (a - before_a), before_b + keep * (b - before_b)
            before_a, before_b = own_a, own_b
        if NORM:
            square = tl.sum(a * a + b * b, 2)
            if PER_HEAD:
                scale = tl.rsqrt(square / D + eps)[:, :, None]
            else:
                scale = tl.rsqrt(tl.sum(square, 1) / (H * D) + eps)[:, None, None]
            a, b = a * scale * weight_a, b * scale * weight_b
        if ROTATE:
            cos, sin = _angles(cos_ptr, sin_ptr, token, inside, lane, HALF_D)
            a, b = a * cos - b * sin, a * sin + b * cos
        _put(y_ptr, a, b, token, inside, H * D, at, real, HALF_D)


@triton.jit
def _down(
    x_ptr, keep_ptr, weight_ptr, cos_ptr, sin_ptr, starts_ptr, grad_ptr, dx_ptr, dkeep_ptr, partial_ptr,
    program, stack, stride_t, stride_kt, T, eps, H: tl.constexpr, D: tl.constexpr, OUT: tl.constexpr,
    SHIFT: tl.constexpr, NORM: tl.constexpr, PER_HEAD: tl.constexpr, ROTATE: tl.constexpr,
    CUT: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, RUN: tl.constexpr,
    STAGES: tl.constexpr, FEWER: tl.constexpr,
):  # fmt: skip
    """The backward pass of one part: ROWS runs of tokens, next to each other. OUT: stride of dx and dkeep."""
    HALF_D: tl.constexpr = D // 2
    HEADS: tl.constexpr = triton.next_power_of_2(H)
    head, lane = tl.arange(0, HEADS), tl.arange(0, HALF)
    real = ((head < H)[:, None] & (lane < HALF_D)[None, :])[None]
    at = (head[:, None] * D + lane[None, :])[None]
    first = (program * ROWS + tl.arange(0, ROWS)) * RUN
    if NORM:
        weight_a, weight_b = _weight(weight_ptr, stack, head, lane, real, H, D, PER_HEAD)
        sum_a = tl.zeros([ROWS, HEADS, HALF], tl.float32)
        sum_b = tl.zeros([ROWS, HEADS, HALF], tl.float32)
    if SHIFT:
        a, b = _both(x_ptr, first + RUN, first + RUN < T, stride_t, at, real, HALF_D)
        passed_a, passed_b = tl.zeros_like(a), tl.zeros_like(b)  # to this token, by the one after it
    steps = RUN + 1
    if FEWER:  # programs than the part that made the grid
        steps = tl.where(program * (ROWS * RUN) < T, steps, 0)
    for step in tl.range(0 if SHIFT else 1, steps, num_stages=STAGES):
        token = first + RUN - step
        inside = token < T
        own = inside & (step > 0)  # the token after the run is another program's
        da, db = _both(grad_ptr, token, inside, H * D, at, real, HALF_D)
        if ROTATE:
            cos, sin = _angles(cos_ptr, sin_ptr, token, inside, lane, HALF_D)
            da, db = da * cos + db * sin, db * cos - da * sin
        if SHIFT:
            keep = _keep(keep_ptr, token, inside, stride_kt, head, H)
            earlier_a, earlier_b = _both(x_ptr, token - 1, (token > 0) & (token <= T), stride_t, at, real, HALF_D)
            before_a, before_b = earlier_a, earlier_b
            if CUT:
                cut = _starts_here(starts_ptr, token, inside)[:, None, None]
                before_a, before_b = tl.where(cut, 0.0, before_a), tl.where(cut, 0.0, before_b)
            apart_a, apart_b = a - before_a, b - before_b
            a, b = before_a + keep[:, :, None] * apart_a, before_b + keep[:, :, None] * apart_b
        else:
            a, b = _both(x_ptr, token, inside, stride_t, at, real, HALF_D)
        if NORM:
            weight_da, weight_db = da * a, db * b
            da, db = da * weight_a, db * weight_b
            square, along = tl.sum(a * a + b * b, 2), tl.sum(da * a + db * b, 2)
            if PER_HEAD:
                square, along = square / D, along / D
            else:
                square, along = tl.split(tl.sum(tl.join(square, along), 1))  # one exchange between warps
                square, along = square[:, None] / (H * D), along[:, None] / (H * D)
            scale = tl.rsqrt(square + eps)  # (ROWS, 1 or HEADS)
            counted = tl.where(own[:, None], scale, 0.0)[:, :, None]
            sum_a += weight_da * counted
            sum_b += weight_db * counted
            along = (scale * scale * along)[:, :, None]
            da, db = da - a * along, db - b * along  # d m but for scale
        if SHIFT:
            lean = tl.sum(da * apart_a + db * apart_b, 2) * keep * (1 - keep)
            stay, leave = keep, 1 - keep
            if NORM:
                lean, stay, leave = lean * scale, stay * scale, leave * scale
            if CUT:
                leave = tl.where(_starts_here(starts_ptr, token, inside)[:, None], 0.0, leave)
            dkeep_at = token[:, None] * OUT + head[None, :]
            tl.store(dkeep_ptr + dkeep_at, lean, mask=own[:, None] & (head < H)[None, :])
            stay, leave = stay[:, :, None], leave[:, :, None]
            _put(dx_ptr, stay * da + passed_a, stay * db + passed_b, token, own, OUT, at, real, HALF_D)
            passed_a, passed_b = leave * da, leave * db
            a, b = earlier_a, earlier_b
        else:
            if NORM:
                da, db = da * scale[:, :, None], db * scale[:, :, None]
            _put(dx_ptr, da, db, token, own, OUT, at, real, HALF_D)
    if NORM:
        tl.store(partial_ptr + at, tl.sum(sum_a, 0)[None], mask=real)
        tl.store(partial_ptr + at + HALF_D, tl.sum(sum_b, 0)[None], mask=real)
