"""Partial sums added up in a fixed order, in Triton: the end of a weight's gradient, a piece from each program.

They have just been written and lie in the cache; a program takes COLUMNS of them, a sector of 32 bytes, and all pieces.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.launch import on_device

COLUMNS = 8
PIECES = 512  # of a tile: sixteen numbers to a thread, all on their way at once


def add_up(partial: Tensor) -> Tensor:
    """partial (S, N, C) float32, contiguous, summed over N: (S, C) float32."""
    stack, count, width = partial.shape
    out = torch.empty((stack, width), dtype=torch.float32, device=partial.device)
    if out.numel():
        with on_device(partial):
            add_up_kernel[triton.cdiv(width, COLUMNS), stack](
                partial, out, count, width, PIECES=PIECES, COLUMNS=COLUMNS, num_warps=8
            )
    return out


@triton.jit(do_not_specialize=["count"])
def add_up_kernel(partial_ptr, out_ptr, count, width, PIECES: tl.constexpr, COLUMNS: tl.constexpr):
    stack = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    partial_ptr += stack * count * width
    total = tl.zeros([PIECES, COLUMNS], tl.float32)
    for begin in range(0, count, PIECES):
        piece = begin + tl.arange(0, PIECES)
        inside = (piece < count)[:, None] & (column < width)[None, :]
        total += tl.load(partial_ptr + piece.to(tl.int64)[:, None] * width + column[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + stack * width + column, tl.sum(total, 0), mask=column < width)
