"""The weighted sum of NSA's branches, forward and backward, in one pass over memory each (zoo/kernels/nsa.py).

Shapes: gates (B,T,H,3); each branch, None where there is none, and out (B,T,H,D). Gates are rounded to out's dtype, the
sum is taken in float32 and rounded once.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.launch import on_device

ELEMENTS = 4096  # of each branch in a program


def mix_forward(gates: Tensor, branches: Sequence[Tensor | None]) -> Tensor:
    """Like the first branch that there is."""
    out = torch.empty_like(next(x for x in branches if x is not None), memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    with on_device(gates):
        _mix[_programs(out),](gates.contiguous(), *_contiguous(branches), out, _rows(out), **_switches(out))
    return out


def mix_backward(dout: Tensor, gates: Tensor, branches: Sequence[Tensor | None]) -> list[Tensor]:
    """dgates, zero for a branch that is not there, and the gradients of those that are."""
    dgates = torch.empty_like(gates, memory_format=torch.contiguous_format)
    grads = [None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in branches]
    if dout.numel() == 0:
        dgates.zero_()
    else:
        with on_device(gates):
            _mix_backward[_programs(dout),](
                dout.contiguous(), gates.contiguous(), *_contiguous(branches), dgates, *grads, _rows(dout),
                **_switches(dout),
            )  # fmt: skip
    return [dgates, *(x for x in grads if x is not None)]


def _contiguous(branches: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in branches]


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[3]


def _programs(x: Tensor) -> int:
    return triton.cdiv(_rows(x), _switches(x)["BLOCK_R"])


def _switches(x: Tensor) -> dict[str, int]:
    block_d = triton.next_power_of_2(x.shape[3])
    return {"D": x.shape[3], "BLOCK_D": block_d, "BLOCK_R": max(1, ELEMENTS // block_d)}


# --------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def _places(rows, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr):
    """(row, whether it is one, place of each of its elements, whether it is one)."""
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    inside = row < rows
    return row, inside, row[:, None] * D + column[None, :], inside[:, None] & (column < D)[None, :]


@triton.jit
def gate_of(gates_ptr, row, inside, kind: tl.constexpr):
    return tl.load(gates_ptr + row * 3, mask=inside, other=0.0).to(kind).to(tl.float32)[:, None]


@triton.jit
def _weighted(acc, gates_ptr, x_ptr, row, inside, at, there, kind: tl.constexpr):
    if x_ptr is not None:
        x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
        acc += x * gate_of(gates_ptr, row, inside, kind)
    return acc


@triton.jit(do_not_specialize=["rows"])
def _mix(
    gates_ptr, first_ptr, second_ptr, third_ptr, out_ptr, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row, inside, at, there = _places(rows, D, BLOCK_D, BLOCK_R)
    kind: tl.constexpr = out_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    acc = _weighted(acc, gates_ptr, first_ptr, row, inside, at, there, kind)
    acc = _weighted(acc, gates_ptr + 1, second_ptr, row, inside, at, there, kind)
    acc = _weighted(acc, gates_ptr + 2, third_ptr, row, inside, at, there, kind)
    tl.store(out_ptr + at, acc.to(kind), mask=there)


@triton.jit
def _weighted_backward(dout, gates_ptr, x_ptr, dgates_ptr, dx_ptr, row, inside, at, there, kind: tl.constexpr):
    dgate = tl.zeros([dout.shape[0]], tl.float32)
    if x_ptr is not None:
        x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
        dgate = tl.sum(dout * x, 1)
        tl.store(dx_ptr + at, (dout * gate_of(gates_ptr, row, inside, kind)).to(dx_ptr.dtype.element_ty), mask=there)
    tl.store(dgates_ptr + row * 3, dgate.to(dgates_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _mix_backward(
    dout_ptr, gates_ptr, first_ptr, second_ptr, third_ptr, dgates_ptr, dfirst_ptr, dsecond_ptr, dthird_ptr, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row, inside, at, there = _places(rows, D, BLOCK_D, BLOCK_R)
    kind: tl.constexpr = dout_ptr.dtype.element_ty
    dout = tl.load(dout_ptr + at, mask=there, other=0.0).to(tl.float32)
    _weighted_backward(dout, gates_ptr, first_ptr, dgates_ptr, dfirst_ptr, row, inside, at, there, kind)
    _weighted_backward(dout, gates_ptr + 1, second_ptr, dgates_ptr + 1, dsecond_ptr, row, inside, at, there, kind)
    _weighted_backward(dout, gates_ptr + 2, third_ptr, dgates_ptr + 2, dthird_ptr, row, inside, at, there, kind)
