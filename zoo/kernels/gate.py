"""Gate activation and chunk-local prefix, forward and backward (SPEC.md 0.1, 1.3 and 2.1).

Only differences of the gate's prefix sum inside one window count, so the prefix restarts every CHUNK tokens:

    suffix_j = sum of log_decay over (j, end of j's chunk]     total_c = sum over chunk c          (<= 0, in log2 units)

and sum_{i=j+1..t} log_decay_i = suffix_j - suffix_t + the totals of the chunks after j's, up to t's. Each chunk is
computed on its own: no carry along the sequence, and an error that does not know how long the sequence is.

Shapes: log_decay, z, u (B,N,H); suffix (B,H,N) float32; total (B,H,chunks) float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import EPS
from zoo.kernels.launch import rows_contiguous
from zoo.kernels.tiles import CHUNK
from zoo.kernels.units import LOG2E

HEADS = 16  # per program at most: a row of the (B,N,H) inputs is read in pieces this wide
# Of a row, in the backward: at most the last. Every program adds their sums up anew, in a tile as tall as the first of
# these that holds them. Only two: each is a compilation, times two for ALIGNED, and lengths change in mid-training
SEGMENTS = (128, 512)


def prefix(gate: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """suffix and total of gate = (log_decay,) or (z, u)."""
    gate = tuple(rows_contiguous(x) for x in gate)
    first, second = gate[0], gate[-1]
    batch, length, heads = first.shape
    chunks = triton.cdiv(length, CHUNK)
    suffix = first.new_empty((batch, heads, length), dtype=torch.float32)
    total = first.new_empty((batch, heads, chunks), dtype=torch.float32)
    wide = min(HEADS, triton.next_power_of_2(heads))
    _prefix[(chunks, batch, triton.cdiv(heads, wide))](
        first, second, suffix, total, *first.stride()[:2], *second.stride()[:2], length, heads, chunks,
        EPS=EPS, ACTIVATE=len(gate) == 2, CHUNK=CHUNK, HEADS=wide,
    )  # fmt: skip
    return suffix, total


def prefix_backward(
    key_side: Tensor, query_side: Tensor, gate: tuple[Tensor, ...], end: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of `gate`, from the two sides of that of the (unrestarted) prefix sum (zoo/kernels/window.py).

    key_side (B,H,N); query_side (B,H,T), of the last T positions. d log_decay_j is the sum of both over j and all that
    follows. Two passes over segments of the row, at most SEGMENTS[-1] of them: each segment's sum, then every segment
    with what follows it. Any length, no atomics, the same bits every time.
    end (B,N) int32: one past each token's document; the sum over later documents is zero but for rounding, and removed.
    It needs the sums of other segments, which are then stored in key_side, and a third pass.
    """
    first, second = (rows_contiguous(x) for x in (gate[0], gate[-1]))
    batch, length, heads = first.shape
    offset = length - query_side.shape[2]
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in gate)
    steps = triton.cdiv(length, CHUNK * SEGMENTS[-1])  # chunks to a segment
    segments = triton.cdiv(length, CHUNK * steps)
    sums = key_side.new_empty((batch, segments, heads))
    wide = min(HEADS, triton.next_power_of_2(heads))
    grid = (segments, batch, triton.cdiv(heads, wide))
    strides = (*first.stride()[:2], *second.stride()[:2])
    shape = {"CHUNK": CHUNK, "HEADS": wide}
    # Strides that are no multiple of 16 beside a length that is one: too rare to compile for apart
    aligned = all(x % 16 == 0 for x in (length, offset, first.stride(0), second.stride(0)))
    activation = {"EPS": EPS, "ACTIVATE": len(gate) == 2}
    _segment_sums[grid](key_side, query_side, sums, length, offset, heads, steps, segments, ALIGNED=aligned, **shape)
    _segment_backward[grid](
        key_side, query_side, sums, first, second, grads[0], grads[-1],
        *strides, length, offset, heads, steps, segments,
        BOUNDED=end is not None, ALIGNED=aligned, SEGMENTS=next(most for most in SEGMENTS if most >= segments),
        **activation, **shape,
    )  # fmt: skip
    if end is not None:
        _bounded_backward[(triton.cdiv(length, CHUNK), *grid[1:])](
            key_side, first, second, end, grads[0], grads[-1], *strides, *end.stride(), length, heads,
            **activation, **shape,
        )  # fmt: skip
    return grads


@triton.jit
def _softplus(x):
    """log(1 + e^x) with a small relative error everywhere."""
    small = tl.exp(-tl.abs(x))
    rounded = 1 + small
    log1p = tl.where(rounded == 1, small, tl.log(rounded) * (small / tl.where(rounded == 1, 1.0, rounded - 1)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _amplitude(u):
    """beta = 1 + elu(u) and its derivative."""
    slope = tl.exp(tl.minimum(u, 0.0))
    return slope + tl.maximum(u, 0.0), slope


@triton.jit
def log_decay_at(first_ptr, second_ptr, first_at, second_at, inside, EPS: tl.constexpr, ACTIVATE: tl.constexpr):
    """log_decay at these addresses, in log2 units, 0 outside."""
    z = tl.load(first_ptr + first_at, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATE:
        beta, _ = _amplitude(tl.load(second_ptr + second_at, mask=inside, other=0.0).to(tl.float32))
        z = tl.where(inside, -_softplus(-beta * z) / (beta + EPS), 0.0)
    return z * LOG2E


@triton.jit(do_not_specialize=["chunks"])
def _prefix(
    first_ptr, second_ptr, suffix_ptr, total_ptr,
    stride_fb, stride_ft, stride_sb, stride_st, N, H, chunks,
    EPS: tl.constexpr, ACTIVATE: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One chunk of one row, HEADS heads. Token j holds what follows it, so the tile is read one token later."""
    chunk, batch = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    begin = tl.cast(chunk, tl.int64) * CHUNK
    token = begin + tl.arange(0, CHUNK)
    after = token + 1
    inside = (after < tl.minimum(begin + CHUNK, N))[:, None] & (head < H)[None, :]
    first_ptr += batch * stride_fb
    second_ptr += batch * stride_sb
    first_at = after[:, None] * stride_ft + head[None, :]
    second_at = after[:, None] * stride_st + head[None, :]
    decay = log_decay_at(first_ptr, second_ptr, first_at, second_at, inside, EPS, ACTIVATE)
    first_at, second_at = begin * stride_ft + head, begin * stride_st + head
    own = log_decay_at(first_ptr, second_ptr, first_at, second_at, head < H, EPS, ACTIVATE)
    row = batch * H + head
    suffix_at = row[None, :] * N + token[:, None]
    tl.store(suffix_ptr + suffix_at, tl.cumsum(decay, 0, reverse=True), mask=(token < N)[:, None] & (head < H)[None, :])
    tl.store(total_ptr + row * chunks + chunk, tl.sum(decay, 0) + own, mask=head < H)


@triton.jit
def _aligned(x, ALIGNED: tl.constexpr):
    """x, known to the compiler as a multiple of 16 where ALIGNED: what loads of 16 bytes ask of lengths and strides."""
    if ALIGNED:
        x = x // 16 * 16
    return x


@triton.jit
def _both_sides(key_side_ptr, query_side_ptr, row, token, head, N, offset, H):
    """d prefix of (tokens, heads), 0 outside. row: b * H + head."""
    inside = (token < N)[:, None] & (head < H)[None, :]
    x = tl.load(key_side_ptr + row[None, :] * N + token[:, None], mask=inside, other=0.0)
    asked = inside & (token >= offset)[:, None]
    return x + tl.load(query_side_ptr + row[None, :] * (N - offset) + (token - offset)[:, None], mask=asked, other=0.0)


@triton.jit(do_not_specialize=["N", "offset", "steps", "segments"])
def _segment_sums(
    key_side_ptr, query_side_ptr, sums_ptr, N, offset, H, steps, segments,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The sum of d prefix over one segment, HEADS heads."""
    N, offset = _aligned(N, ALIGNED), _aligned(offset, ALIGNED)
    segment, batch = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    row = batch * H + head
    total = tl.zeros([CHUNK, HEADS], tl.float32)
    for i in range(0, steps):
        token = (tl.cast(segment, tl.int64) * steps + i) * CHUNK + tl.arange(0, CHUNK)
        total += _both_sides(key_side_ptr, query_side_ptr, row, token, head, N, offset, H)
    tl.store(sums_ptr + (batch * segments + segment) * H + head, tl.sum(total, 0), mask=head < H)


@triton.jit(do_not_specialize=["stride_fb", "stride_sb", "N", "offset", "steps", "segments"])
def _segment_backward(
    key_side_ptr, query_side_ptr, sums_ptr, first_ptr, second_ptr, dfirst_ptr, dsecond_ptr,
    stride_fb, stride_ft, stride_sb, stride_st, N, offset, H, steps, segments,
    EPS: tl.constexpr, ACTIVATE: tl.constexpr, BOUNDED: tl.constexpr, ALIGNED: tl.constexpr, SEGMENTS: tl.constexpr,
    CHUNK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """d log_decay of one segment, newest chunk first, and the gradients of the inputs (B,N,H) from it. Where BOUNDED,
    d log_decay goes back to key_side instead."""
    N, offset = _aligned(N, ALIGNED), _aligned(offset, ALIGNED)
    stride_fb, stride_sb = _aligned(stride_fb, ALIGNED), _aligned(stride_sb, ALIGNED)
    segment = tl.program_id(0)
    batch = tl.cast(tl.program_id(1), tl.int64)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    row = batch * H + head
    newest = (tl.cast(segment, tl.int64) * steps + (steps - 1)) * CHUNK + tl.arange(0, CHUNK)
    x = _both_sides(key_side_ptr, query_side_ptr, row, newest, head, N, offset, H)  # on its way while sums are added up
    later = tl.arange(0, SEGMENTS)
    mask = ((later > segment) & (later < segments))[:, None] & (head < H)[None, :]
    sums_at = (batch * segments + later)[:, None] * H + head[None, :]
    carry = tl.sum(tl.load(sums_ptr + sums_at, mask=mask, other=0.0), 0)
    for i in range(0, steps):
        token = newest - i * CHUNK
        inside = (token < N)[:, None] & (head < H)[None, :]
        grad = tl.cumsum(x, 0, reverse=True) + carry[None, :]
        carry += tl.sum(x, 0)
        if i + 1 < steps:
            x = _both_sides(key_side_ptr, query_side_ptr, row, token - CHUNK, head, N, offset, H)
        if BOUNDED:
            tl.store(key_side_ptr + row[None, :] * N + token[:, None], grad, mask=inside)
        else:
            _activation_backward(
                grad, first_ptr, second_ptr, dfirst_ptr, dsecond_ptr, stride_fb, stride_ft, stride_sb, stride_st,
                batch, token, head, inside, N, H, EPS, ACTIVATE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["N", "stride_eb"])
def _bounded_backward(
    grad_ptr, first_ptr, second_ptr, end_ptr, dfirst_ptr, dsecond_ptr,
    stride_fb, stride_ft, stride_sb, stride_st, stride_eb, stride_et, N, H,
    EPS: tl.constexpr, ACTIVATE: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The gradients of the inputs where each document ends the sums: what lies beyond is taken off."""
    batch = tl.cast(tl.program_id(1), tl.int64)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    token = tl.cast(tl.program_id(0), tl.int64) * CHUNK + tl.arange(0, CHUNK)
    inside = (token < N)[:, None] & (head < H)[None, :]
    row = (batch * H + head)[None, :] * N
    grad = tl.load(grad_ptr + row + token[:, None], mask=inside, other=0.0)
    end = tl.load(end_ptr + batch * stride_eb + token * stride_et, mask=token < N, other=0)
    grad -= tl.load(grad_ptr + row + end[:, None], mask=inside & (end < N)[:, None], other=0.0)
    _activation_backward(
        grad, first_ptr, second_ptr, dfirst_ptr, dsecond_ptr, stride_fb, stride_ft, stride_sb, stride_st,
        batch, token, head, inside, N, H, EPS, ACTIVATE,
    )  # fmt: skip


@triton.jit
def _activation_backward(
    grad, first_ptr, second_ptr, dfirst_ptr, dsecond_ptr, stride_fb, stride_ft, stride_sb, stride_st,
    batch, token, head, inside, N, H, EPS: tl.constexpr, ACTIVATE: tl.constexpr,
):  # fmt: skip
    """From d log_decay (tokens, heads) to the gradients of the inputs, contiguous (B,N,H)."""
    out_at = (batch * N + token)[:, None] * H + head[None, :]
    if ACTIVATE:
        z = tl.load(first_ptr + batch * stride_fb + token[:, None] * stride_ft + head[None, :], mask=inside, other=0.0)
        u = tl.load(second_ptr + batch * stride_sb + token[:, None] * stride_st + head[None, :], mask=inside, other=0.0)
        z = z.to(tl.float32)
        beta, slope = _amplitude(u.to(tl.float32))
        sharp = beta * z
        closing = 1 / (1 + tl.exp(sharp))
        grad = grad / (beta + EPS)
        dsecond = grad * slope * (z * closing + _softplus(-sharp) / (beta + EPS))
        tl.store(dsecond_ptr + out_at, dsecond.to(dsecond_ptr.dtype.element_ty), mask=inside)
        grad = grad * beta * closing
    tl.store(dfirst_ptr + out_at, grad.to(dfirst_ptr.dtype.element_ty), mask=inside)
