"""Means over blocks of tokens, forward and backward, in one pass over memory each (zoo/kernels/nsa.py).

Shapes: x (B,N,G,D), means (B,M,G,D). Block c holds the tokens [c * block, (c + 1) * block); what lies beyond the last
token counts as zero. Sums are taken in float32 and rounded once.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.launch import on_device, rows_contiguous

WIDTH = 256  # numbers of a token in a program
ROWS = 16  # tokens that it reads at once


def pool_forward(tensors: Sequence[Tensor], block: int) -> list[Tensor]:
    """Means like each of one or two of one shape and dtype, one more than blocks hold a token."""
    batch, length, heads, dim = tensors[0].shape
    shape = (batch, (length + 2 * block - 1) // block, heads, dim)
    means = [x.new_empty(shape) for x in tensors]
    if means[0].numel():
        _launch(_pool, tensors, means, (batch, shape[1], heads, dim), length, block)
    return means


def pool_backward(dmeans: Sequence[Tensor], length: int, block: int) -> list[Tensor]:
    """dx (B,length,G,D) like each of dmeans."""
    batch, _, heads, dim = dmeans[0].shape
    dx = [x.new_empty((batch, length, heads, dim)) for x in dmeans]
    if dx[0].numel():
        _launch(_pool_backward, dmeans, dx, (batch, triton.cdiv(length, block), heads, dim), length, block)
    return dx


def _launch(
    kernel: Any, sources: Sequence[Tensor], targets: Sequence[Tensor], means: tuple[int, ...], length: int, block: int
) -> None:
    """One or two of each, together where they lie alike in memory; means: the shape of what there is of blocks."""
    batch, blocks, heads, dim = means
    sources = [rows_contiguous(x) for x in sources]
    strides = sources[0].stride()[:3]
    together = sources[-1].stride()[:3] == strides
    if not together:
        _launch(kernel, sources[1:], targets[1:], means, length, block)
    count = len(sources) if together else 1
    others = (sources[1], targets[1]) if count == 2 else (None, None)
    with on_device(sources[0]):
        kernel[batch * blocks, triton.cdiv(heads * dim, WIDTH), count](
            sources[0], targets[0], *others, *strides, length, blocks, **_switches(heads, dim, block)
        )


def _switches(heads: int, dim: int, block: int) -> dict[str, int]:
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
    x_ptr, means_ptr, other_x_ptr, other_means_ptr, stride_b, stride_t, stride_h, N, M,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    batch, block = tl.cast(tl.program_id(0) // M, tl.int64), tl.program_id(0) % M
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    if other_x_ptr is not None:  # noqa: SIM102 - known while it compiles, the other not
        if tl.program_id(2) == 1:
            x_ptr, means_ptr = other_x_ptr, other_means_ptr
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
    dmeans_ptr, dx_ptr, other_dmeans_ptr, other_dx_ptr, stride_b, stride_t, stride_h, N, M,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    batch, block = tl.cast(tl.program_id(0) // M, tl.int64), tl.program_id(0) % M
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    if other_dmeans_ptr is not None:  # noqa: SIM102 - as in _pool
        if tl.program_id(2) == 1:
            dmeans_ptr, dx_ptr = other_dmeans_ptr, other_dx_ptr
    at = batch * stride_b + block * stride_t + column // D * stride_h + column % D
    share = tl.load(dmeans_ptr + at, mask=column < H * D, other=0.0).to(tl.float32) / BLOCK
    share = tl.broadcast_to(share.to(dx_ptr.dtype.element_ty)[None, :], [BLOCK_R, BLOCK_W])
    for r0 in tl.static_range(0, BLOCK, BLOCK_R):
        place = r0 + tl.arange(0, BLOCK_R)
        token = block * BLOCK + place
        there = ((place < BLOCK) & (token < N))[:, None] & (column < H * D)[None, :]
        row = (batch * N + token) * (H * D)
        tl.store(dx_ptr + row[:, None] + column[None, :], share, mask=there)
