"""Means over blocks of tokens, forward and backward, in one pass over memory each (zoo/kernels/nsa.py).

Shapes: x (B,N,G,D), means (B,M,G,D). Block c holds the tokens [c * block, (c + 1) * block); what lies beyond the last
token counts as zero. Sums are taken in float32 and rounded once.
"""

import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.launch import on_device, rows_contiguous

WIDTH = 256  # numbers of a token in a program
ROWS = 16  # tokens that it reads at once


def pool_forward(x: Tensor, block: int) -> Tensor:
    """Means like x, one more than blocks hold a token."""
    batch, length, heads, dim = x.shape
    means = x.new_empty((batch, (length + 2 * block - 1) // block, heads, dim))
    if means.numel() == 0:
        return means
    x = rows_contiguous(x)
    with on_device(x):
        _pool[_programs(means)](x, means, *x.stride()[:3], length, means.shape[1], **_switches(means, block))
    return means


def pool_backward(dmeans: Tensor, length: int, block: int) -> Tensor:
    """dx (B,length,G,D) like dmeans."""
    batch, _, heads, dim = dmeans.shape
    dx = dmeans.new_empty((batch, length, heads, dim))
    if dx.numel() == 0:
        return dx
    dmeans = rows_contiguous(dmeans)
    blocks = triton.cdiv(length, block)
    with on_device(dmeans):
        _pool_backward[_programs(dmeans[:, :blocks])](
            dmeans, dx, *dmeans.stride()[:3], length, blocks, **_switches(dmeans, block)
        )
    return dx


def _programs(means: Tensor) -> tuple[int, int]:
    batch, blocks, heads, dim = means.shape
    return batch * blocks, triton.cdiv(heads * dim, WIDTH)


def _switches(means: Tensor, block: int) -> dict[str, int]:
    _, _, heads, dim = means.shape
    rows = min(ROWS, triton.next_power_of_2(block))
    return {
        "H": heads,
        "D": dim,
        "BLOCK": block,
        "BLOCK_R": rows,
        "BLOCK_W": min(WIDTH, triton.next_power_of_2(heads * dim)),
    }


@triton.jit(do_not_specialize=["N", "M"])
def _pool(
    x_ptr, means_ptr, stride_b, stride_t, stride_h, N, M,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    batch, block = tl.cast(tl.program_id(0) // M, tl.int64), tl.program_id(0) % M
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    x_ptr += batch * stride_b + column // D * stride_h + column % D
    acc = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    for r0 in tl.static_range(0, BLOCK, BLOCK_R):
        place = r0 + tl.arange(0, BLOCK_R)
        token = block * BLOCK + place
        there = ((place < BLOCK) & (token < N))[:, None] & (column < H * D)[None, :]
        acc += tl.load(x_ptr[None, :] + tl.cast(token, tl.int64)[:, None] * stride_t, mask=there, other=0.0).to(
            tl.float32
        )
    at = (batch * M + block) * (H * D) + column
    mean = tl.sum(acc, 0) / BLOCK
    tl.store(means_ptr + at, mean.to(means_ptr.dtype.element_ty), mask=column < H * D)


@triton.jit(do_not_specialize=["N", "M"])
def _pool_backward(
    dmeans_ptr, dx_ptr, stride_b, stride_t, stride_h, N, M,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    batch, block = tl.cast(tl.program_id(0) // M, tl.int64), tl.program_id(0) % M
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    at = batch * stride_b + block * stride_t + column // D * stride_h + column % D
    share = tl.load(dmeans_ptr + at, mask=column < H * D, other=0.0).to(tl.float32) / BLOCK
    share = tl.broadcast_to(share.to(dx_ptr.dtype.element_ty)[None, :], [BLOCK_R, BLOCK_W])
    for r0 in tl.static_range(0, BLOCK, BLOCK_R):
        place = r0 + tl.arange(0, BLOCK_R)
        token = block * BLOCK + place
        there = ((place < BLOCK) & (token < N))[:, None] & (column < H * D)[None, :]
        row = (batch * N + token) * (H * D)
        tl.store(dx_ptr + row[:, None] + column[None, :], share, mask=there)
