"""Cross-entropy of rows of logits and its gradient, in place, on Hopper, in Gluon: zoo/kernels/loss.py's, for training.

Memory should never rest. A row of V logits in registers leaves room for no second one, so that loading, computing and
storing take turns; here it lies in shared memory. Two persistent programs share a multiprocessor, each walks rows of
its own. Every place that the second pass over a row has read is at once fetched the next row into: asynchronous copies
of 16 bytes a thread, in flight while this row's gradients are computed and stored. A thread's copies, reads and stores
are of the same elements.

Shapes as in zoo/kernels/loss.py. bf16 and fp16, rows that 16-byte copies can fetch.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from zoo.kernels import loss as portable
from zoo.kernels.hopper_band import ceil_div, programs
from zoo.kernels.loss import LOWEST
from zoo.kernels.units import LOG2E

EACH = gl.constexpr(8)  # elements of a 16-byte copy
COLUMNS, WARPS = 4096, 16  # a tile of a row, and who walks it
PROGRAMS = 2  # to a multiprocessor, where shared memory has room for their rows; they share its registers
ROOM, OWN = 228 * 1024, 2048  # bytes of a multiprocessor; of a program beyond its row
NARROWEST = 16384  # columns; below, several programs of the portable kernel fit, which do the same


def cross_entropy_rows(logits: Tensor, targets: Tensor, ignore_index: int, needs_grad: bool) -> Tensor:
    """As zoo.kernels.loss.cross_entropy_rows, which does what these copies can't and what writes nothing."""
    with torch.cuda.device(logits.device):
        if not needs_grad or not takes(logits):
            return portable.cross_entropy_rows(logits, targets, ignore_index, needs_grad)
        rows, width = logits.shape
        loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
        if rows:
            tiles = ceil_div(width, COLUMNS)
            grid = min(rows, resident(tiles) * programs(logits))
            cross_entropy_kernel[(grid,)](
                logits, targets, loss, logits.stride(0), rows, width, ignore_index, COLUMNS, tiles,
                num_warps=WARPS, maxnreg=registers(),
            )  # fmt: skip
        return loss


def takes(logits: Tensor) -> bool:
    """Whether every row begins and ends with a whole copy, and one fits a program but not many of them."""
    _, width = logits.shape
    copied = width % 16 == 0 and logits.stride(0) % 16 == 0 and logits.data_ptr() % 16 == 0
    return copied and width >= NARROWEST and resident(ceil_div(width, COLUMNS)) > 0


def resident(tiles: int) -> int:
    """Programs of a multiprocessor that hold a row of so many tiles each."""
    return min(PROGRAMS, ROOM // (tiles * COLUMNS * 2 + OWN))


def registers() -> int:
    """Of a thread, so that PROGRAMS fit."""
    return 65536 // (PROGRAMS * WARPS * 32)


@gluon.jit(do_not_specialize=["rows", "ignore_index"])
def cross_entropy_kernel(logits_ptr, targets_ptr, loss_ptr, stride_row, rows, width, ignore_index,
                         BLOCK: gl.constexpr, TILES: gl.constexpr):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, EACH], [32, 1], [gl.num_warps(), 1], [1, 0])
    thread = gl.expand_dims(gl.arange(0, BLOCK // EACH, layout=gl.SliceLayout(1, layout)), 1)
    place = thread * EACH + gl.expand_dims(gl.arange(0, EACH, layout=gl.SliceLayout(0, layout)), 0)
    dtype: gl.constexpr = logits_ptr.dtype.element_ty
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    held = ()  # one by one, so that the compiler sees which of them a copy overwrites
    for _ in gl.static_range(TILES):
        held = held + (gl.allocate_shared_memory(dtype, [BLOCK // EACH, EACH], flat),)  # type: ignore[assignment]
    step = gl.num_programs(0)
    row = gl.program_id(0)
    row_ptr = logits_ptr + row.to(gl.int64) * stride_row
    target = gl.load(targets_ptr + row)
    scored = target != ignore_index
    chosen = gl.load(row_ptr + target, mask=scored, other=0.0).to(gl.float32)
    for i in gl.static_range(TILES):
        _fetch(held[i], row_ptr, i * BLOCK + place, gl.where(scored, width, 0))
    next_target = gl.load(targets_ptr + row + step, mask=row + step < rows, other=ignore_index)
    while row < rows:
        # Each thread keeps a maximum and a sum of its own, so that only one reduction ends the walk
        highest = gl.full([BLOCK // EACH], LOWEST, gl.float32, gl.SliceLayout(1, layout))
        total = gl.zeros([BLOCK // EACH], gl.float32, gl.SliceLayout(1, layout))
        for i in gl.static_range(TILES):
            async_copy.wait_group(TILES - 1 - i)
            x = held[i].load(layout).to(gl.float32)  # type: ignore[var-annotated]
            if i == TILES - 1:
                x = gl.where(i * BLOCK + place < width, x, float("-inf"))
            higher = gl.maximum(highest, gl.max(x, axis=1))
            under = gl.exp2(x * LOG2E - gl.expand_dims(higher * LOG2E, 1))
            total = total * gl.exp2((highest - higher) * LOG2E) + gl.sum(under, axis=1)
            highest = higher
        # What is fetched while the gradients are written: rows that aren't scored are zeros, never looked at
        next_row = row + step
        next_ptr = logits_ptr + next_row.to(gl.int64) * stride_row
        next_scored = next_target != ignore_index
        next_chosen = gl.load(next_ptr + next_target, mask=next_scored, other=0.0).to(gl.float32)
        next_width = gl.where(next_scored, width, 0)
        after_target = gl.load(targets_ptr + next_row + step, mask=next_row + step < rows, other=ignore_index)

        peak = gl.max(highest, axis=0)
        lse = peak + gl.log(gl.sum(total * gl.exp2((highest - peak) * LOG2E), axis=0))
        gl.store(loss_ptr + row, gl.where(scored, lse - chosen, 0.0))
        shift = gl.where(scored, lse * LOG2E, float("inf"))  # 2^-inf: no gradient
        for i in gl.static_range(TILES):
            x = held[i].load(layout).to(gl.float32)
            _fetch(held[i], next_ptr, i * BLOCK + place, next_width)
            at = i * BLOCK + place
            gl.store(row_ptr + at, gl.exp2(x * LOG2E - shift).to(dtype), mask=at < width)
        if scored:  # by the thread that has just written it
            at = (target // BLOCK * BLOCK).to(gl.int32) + place
            less = gl.full_like(at, gl.exp2(chosen * LOG2E - shift) - 1, dtype=dtype)
            gl.store(row_ptr + at, less, mask=at == target)

        row, row_ptr, target, scored, chosen = next_row, next_ptr, next_target, next_scored, next_chosen
        next_target = after_target
    async_copy.wait_group(0)


@gluon.jit
def _fetch(tile, row_ptr, at, width):
    """A tile of a row, as far as `width`; zeros beyond."""
    async_copy.async_copy_global_to_shared(tile, row_ptr + at, mask=at < width)
    async_copy.commit_group()
