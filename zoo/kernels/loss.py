"""Cross-entropy of rows of logits and its gradient, in place, in Triton: the middle of `linear_cross_entropy`.

A program owns a row and walks its V logits twice, in tiles: once for the running maximum and sum of exponentials
(online logsumexp, Milakov and Gimelshein, arXiv 1805.02867), once to write softmax - onehot over them. Programs are
large, so that few rows are under way at once: all of them lie in the L2 cache until their second walk. The two products
around it are cuBLAS's (zoo/ops/loss.py).

Shapes: logits (N, V), rows contiguous; targets (N,) int64; loss (N,) float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 8192  # a tile of a row; a whole number of 128-bit loads per thread
WARPS = 16  # of a whole tile: at most four programs on a multiprocessor
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32: unlike -inf it can be subtracted from itself


def cross_entropy_rows(logits: Tensor, targets: Tensor, ignore_index: int, needs_grad: bool) -> Tensor:
    """loss (N,) float32 in nats, 0 where the target is `ignore_index`; `logits` become their own gradients if asked."""
    rows, width = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        block = min(COLUMNS, triton.next_power_of_2(width))
        _cross_entropy_rows[(rows,)](
            logits, targets, loss, logits.stride(0), width, ignore_index,
            NEEDS_GRAD=needs_grad, BLOCK=block, num_warps=WARPS if block == COLUMNS else 4,
        )  # fmt: skip
    return loss


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_rows(
    logits_ptr, targets_ptr, loss_ptr, stride_row, width, ignore_index, NEEDS_GRAD: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    target = tl.load(targets_ptr + row)
    scored = target != ignore_index
    row_ptr = logits_ptr + row.to(tl.int64) * stride_row
    place = tl.arange(0, BLOCK)
    if scored:
        # Each lane keeps a maximum and a sum of its own, so that only one reduction ends the walk
        highest = tl.full((BLOCK,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, width, BLOCK):
            x = tl.load(row_ptr + begin + place, mask=begin + place < width, other=float("-inf")).to(tl.float32)
            smaller = tl.exp(-tl.abs(x - highest))  # of the two exponentials under their common maximum; the other is 1
            total = tl.where(x > highest, total * smaller + 1, total + smaller)
            highest = tl.maximum(highest, x)
        peak = tl.max(highest, axis=0)
        lse = peak + tl.log(tl.sum(total * tl.exp(highest - peak), axis=0))
        tl.store(loss_ptr + row, lse - tl.load(row_ptr + target).to(tl.float32))
        if NEEDS_GRAD:
            tl.debug_barrier()  # the target's logit has been read before it is overwritten
            for begin in range(0, width, BLOCK):
                at = begin + place
                x = tl.load(row_ptr + at, mask=at < width, other=float("-inf")).to(tl.float32)
                gradient = tl.exp(x - lse) - tl.where(at == target, 1.0, 0.0)
                tl.store(row_ptr + at, gradient.to(logits_ptr.dtype.element_ty), mask=at < width)
    else:
        tl.store(loss_ptr + row, 0.0)
        if NEEDS_GRAD:
            for begin in range(0, width, BLOCK):
                zeros = tl.zeros((BLOCK,), logits_ptr.dtype.element_ty)
                tl.store(row_ptr + begin + place, zeros, mask=begin + place < width)
