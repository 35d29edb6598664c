"""Cross-entropy of rows of logits and its gradient, in place, in Triton: the middle of `linear_cross_entropy`.

A program owns a row of V logits: once through it for the running maximum and sum of exponentials (online logsumexp,
Milakov and Gimelshein, arXiv 1805.02867), once to write softmax - onehot over it. A row of up to HELD bytes stays in
the registers of the program in between, as it is stored: memory sees it read once and written once. A longer one is
read again. The two products around it are cuBLAS's (zoo/ops/loss.py).

Shapes: logits (N, V), rows contiguous; targets (N,) int64; loss (N,) float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.launch import on_device
from zoo.kernels.units import LOG2E

COLUMNS = 8192  # a tile of a row
EACH = tl.constexpr(8)  # of a tile's columns to a thread: a 128-bit load of 16-bit elements
HELD = 1 << 17  # bytes: half of a multiprocessor's registers
LOWEST = tl.constexpr(-1e38)  # unlike -inf it can be subtracted from itself, and in powers of two it is finite too


def cross_entropy_rows(logits: Tensor, targets: Tensor, ignore_index: int, needs_grad: bool) -> Tensor:
    """loss (N,) float32 in nats, 0 where the target is `ignore_index`; `logits` become their own gradients if asked."""
    rows, width = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        block = max(EACH.value, min(COLUMNS, triton.next_power_of_2(width)))
        tiles = triton.cdiv(width, block)
        with on_device(logits):
            cross_entropy_kernel[(rows,)](
                logits, targets, loss, logits.stride(0), width, ignore_index,
                NEEDS_GRAD=needs_grad, BLOCK=block, HELD=tiles if tiles * block * logits.element_size() <= HELD else 0,
                num_warps=max(1, block // (32 * EACH.value)),
            )  # fmt: skip
    return loss


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_kernel(
    logits_ptr, targets_ptr, loss_ptr, stride_row, width, ignore_index,
    NEEDS_GRAD: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """HELD: the row's tiles, where they stay in registers, or 0."""
    row = tl.program_id(0)
    target = tl.load(targets_ptr + row)
    row_ptr = logits_ptr + row.to(tl.int64) * stride_row
    place = tl.arange(0, BLOCK // EACH)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    if target != ignore_index:
        chosen = tl.load(row_ptr + target).to(tl.float32)
        # Each thread keeps a maximum and a sum of its own, so that only one reduction ends the walk
        highest = tl.full((BLOCK // EACH,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK // EACH,), tl.float32)
        tiles = ()
        if HELD > 0:
            for i in tl.static_range(HELD):
                tiles = tiles + (_tile(row_ptr, i * BLOCK + place, width),)  # type: ignore[assignment]
            for i in tl.static_range(HELD):
                highest, total = _add(highest, total, tiles[i])
        else:
            for begin in range(0, width, BLOCK):
                highest, total = _add(highest, total, _tile(row_ptr, begin + place, width))
        peak = tl.max(highest, axis=0)
        lse = peak + tl.log(tl.sum(total * tl.exp2((highest - peak) * LOG2E), axis=0))
        tl.store(loss_ptr + row, lse - chosen)
        if NEEDS_GRAD:
            tl.debug_barrier()  # the target's logit has been read before it is overwritten
            if HELD > 0:
                for i in tl.static_range(HELD):
                    _put(row_ptr, i * BLOCK + place, width, _softmax(tiles[i], lse))
            else:
                for begin in range(0, width, BLOCK):
                    at = begin + place
                    _put(row_ptr, at, width, _softmax(_tile(row_ptr, at, width), lse))
            tl.debug_barrier()  # softmax is written before onehot is taken off
            tl.store(row_ptr + target, (_softmax(chosen, lse) - 1).to(logits_ptr.dtype.element_ty))
    else:
        tl.store(loss_ptr + row, 0.0)
        if NEEDS_GRAD:
            for begin in range(0, width, BLOCK):
                _put(row_ptr, begin + place, width, tl.zeros((BLOCK // EACH, EACH), tl.float32))


@triton.jit
def _tile(row_ptr, at, width):
    return tl.load(row_ptr + at, mask=at < width, other=float("-inf"))


@triton.jit
def _put(row_ptr, at, width, x):
    tl.store(row_ptr + at, x.to(row_ptr.dtype.element_ty), mask=at < width)


@triton.jit
def _add(highest, total, x):
    """Each thread's maximum and sum of exponentials under it, with EACH more logits."""
    x = x.to(tl.float32)
    higher = tl.maximum(highest, tl.max(x, axis=1))
    under = tl.exp2(x * LOG2E - (higher * LOG2E)[:, None])
    return higher, total * tl.exp2((highest - higher) * LOG2E) + tl.sum(under, axis=1)


@triton.jit
def _softmax(x, lse):
    return tl.exp2(x.to(tl.float32) * LOG2E - lse * LOG2E)
