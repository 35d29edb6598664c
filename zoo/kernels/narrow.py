"""A product with few columns in float32 precision on the tensor cores, in Triton: three bfloat16 products of pieces.

x = high + low and weight = high + low in bfloat16, split between load and product, so that x is read once and no piece
is ever stored. low * low is left out: 2^-16 of the result.

Shapes: x (…, M, K) float32 or bfloat16 (no low then), weight (…, N, K), N small; a stack in front of both, or none.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.launch import on_device

ROWS, INNER = 128, 32
PIECE = tl.bfloat16
WARPS, STAGES = 8, 4  # two programs to a multiprocessor of sm90: 32,768 rows are one wave


def piecewise_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.mT in float32."""
    rows, inner = x.shape[-2:]
    width = weight.shape[-2]
    x, weight = x.contiguous(), weight.contiguous()
    y = x.new_empty((*x.shape[:-1], width), dtype=torch.float32)
    if y.numel():
        grid = (triton.cdiv(rows, ROWS), y.numel() // (rows * width))
        with on_device(x):
            narrow_kernel[grid](
                x, weight, y, rows, inner, width, PIECES=x.dtype != torch.bfloat16, ROWS=ROWS, INNER=INNER, PIECE=PIECE,
                WIDTH=max(16, triton.next_power_of_2(width)), num_warps=WARPS, num_stages=STAGES,
            )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["rows"])
def narrow_kernel(
    x_ptr, weight_ptr, y_ptr, rows, inner, width,
    PIECES: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, PIECE: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    stack = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column, place = tl.arange(0, WIDTH), tl.arange(0, INNER)
    x_ptr += (stack * rows + row)[:, None] * inner
    weight_ptr += stack * width * inner + column[None, :] * inner
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for begin in range(0, inner, INNER):
        at = begin + place
        x = tl.load(x_ptr + at[None, :], mask=(row < rows)[:, None] & (at < inner)[None, :], other=0.0)
        weight = tl.load(weight_ptr + at[:, None], mask=(at < inner)[:, None] & (column < width)[None, :], other=0.0)
        weight = weight.to(tl.float32)
        high, weight_high = x.to(PIECE), weight.to(PIECE)
        total = tl.dot(high, (weight - weight_high.to(tl.float32)).to(PIECE), total)
        if PIECES:
            total = tl.dot((x.to(tl.float32) - high.to(tl.float32)).to(PIECE), weight_high, total)
        total = tl.dot(high, weight_high, total)
    y_at = y_ptr + (stack * rows + row)[:, None] * width + column[None, :]
    tl.store(y_at, total, mask=(row < rows)[:, None] & (column < width)[None, :])
