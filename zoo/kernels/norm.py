"""The residual stream's next sum and its RMS norm, forward and backward, in Triton (zoo/ops/norm.py).

A program owns whole rows, so each tensor is read once and written once; everything between load and store is float32.
The backward pass takes both row sums that it needs in one walk:

    u = s / rms(s)        ds = dy' / rms(s) - u * mean(dy' u) / rms(s) + ds'        dy' = weight * dy

with ds' what else arrived at s, and leaves a partial sum of dweight = dy u for each run of rows, added up in a fixed
order.

Shapes: rows (N, C) contiguous; weight (S, C), for N / S rows each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.launch import on_device
from zoo.kernels.pieces import add_up

ELEMENTS = 4096  # of each tensor that a program of the forward pass holds at once: rows times padded width
ELEMENTS_BACKWARD = 2048
STAGES = 3  # of its rows, two of them on their way: without, reading and computing take turns
STAGED_BYTES = 8192  # of a tensor, at most: nine such pieces fit the smallest shared memory
RUN = 32  # rows of a program of the backward pass, and of a partial sum
WIDE = 8192  # from this padded width on a program has more warps than four


def add_norm_forward(h: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(h + branch, its RMS norm times weight), both (N, C) in h's dtype."""
    h, branch, weight = (x.contiguous() for x in (h, branch, weight))
    total, normed = torch.empty_like(h), torch.empty_like(h)
    if h.numel():
        rows, width = h.shape[0] // weight.shape[0], h.shape[1]
        block = triton.next_power_of_2(width)
        tile = max(1, ELEMENTS // block)
        with on_device(h):
            _forward[triton.cdiv(rows, tile), weight.shape[0]](
                h, branch, weight, total, normed, rows, width, eps, ROWS=tile, BLOCK=block, num_warps=_warps(block)
            )
    return total, normed


def add_norm_backward(
    dnormed: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(ds (N, C), dweight (S, C)); dtotal (N, C) is what else arrived at the sum, or None."""
    dnormed, total, weight = (x.contiguous() for x in (dnormed, total, weight))
    stack, (count, width) = weight.shape[0], total.shape
    grad = torch.empty_like(total)
    if not total.numel():
        return grad, torch.zeros_like(weight)
    rows = count // stack
    runs = triton.cdiv(rows, RUN)
    partial = torch.empty((stack, runs, width), dtype=torch.float32, device=total.device)
    with on_device(total):
        _backward[runs, stack](
            dnormed, None if dtotal is None else dtotal.contiguous(), total, weight, grad, partial, rows, width, eps,
            MORE=dtotal is not None, **backward_tile(width, total.element_size()),
        )  # fmt: skip
    return grad, add_up(partial).to(weight.dtype)


def backward_tile(width: int, element_size: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    rows = max(1, min(RUN, ELEMENTS_BACKWARD // block))
    stages = STAGES if rows * block * element_size <= STAGED_BYTES else 1
    return {"RUN": RUN, "ROWS": rows, "BLOCK": block, "STAGES": stages, "num_warps": _warps(block)}


def _warps(block: int) -> int:
    return 16 if block >= WIDE else 4


@triton.jit(do_not_specialize=["rows"])
def _forward(
    h_ptr, branch_ptr, weight_ptr, total_ptr, normed_ptr, rows, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    stack = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    at = (stack * rows + row)[:, None] * width + column[None, :]
    real = (row < rows)[:, None] & (column < width)[None, :]
    h = tl.load(h_ptr + at, mask=real, other=0.0).to(tl.float32)
    branch = tl.load(branch_ptr + at, mask=real, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + stack * width + column, mask=column < width, other=0.0).to(tl.float32)
    total = (h + branch).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + at, total, mask=real)
    total = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, 1) / width + eps)
    normed = total * scale[:, None] * weight[None, :]
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    dnormed_ptr, dtotal_ptr, total_ptr, weight_ptr, grad_ptr, partial_ptr, rows, width, eps,
    MORE: tl.constexpr, RUN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    run, stack = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    weight = tl.load(weight_ptr + stack * width + column, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    for step in tl.range(0, RUN // ROWS, num_stages=STAGES):
        row = run * RUN + step * ROWS + tl.arange(0, ROWS)
        at = (stack * rows + row)[:, None] * width + column[None, :]
        real = (row < rows)[:, None] & inside[None, :]
        total = tl.load(total_ptr + at, mask=real, other=0.0).to(tl.float32)
        dnormed = tl.load(dnormed_ptr + at, mask=real, other=0.0).to(tl.float32)
        if MORE:
            dtotal = tl.load(dtotal_ptr + at, mask=real, other=0.0).to(tl.float32)
        scaled = dnormed * weight[None, :]
        squares, along = tl.sum(total * total, 1), tl.sum(scaled * total, 1)
        scale = tl.rsqrt(squares / width + eps)
        unit = total * scale[:, None]
        grad = scale[:, None] * (scaled - unit * (along * scale / width)[:, None])
        if MORE:
            grad += dtotal
        tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=real)
        dweight += tl.sum(dnormed * unit, 0)
    out_ptr = partial_ptr + (stack * tl.num_programs(0) + run) * width
    tl.store(out_ptr + column, dweight, mask=inside)
