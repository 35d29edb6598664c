"""Linear layers under autocast whose precision is not autocast's.

`wide_linear` is a layer whose weight's gradient, a sum over all tokens, stays as wide as the weight: rounding it is no
faster, and takes a pass to widen it again.

`precise_linear` is a narrow projection in float32, as gates need it, on the tensor cores. A rounding error in a gate's
pre-activation is carried along the whole window, so these projections are float32 under autocast too (SPEC.md 3.2). As
a float32 product of a few dozen columns over all tokens that is slow on a GPU: it runs outside the tensor cores. Here
both sides are split into two bfloat16 pieces, x = x_high + x_low, and three of the four products of pieces are taken
with float32 sums; what is left out is 2^-16 of the result.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops import backend
from zoo.ops.stacking import in_front, stack_rows

# --------------------------------------------------------------------------------------------------- products by stack
# A stack of S replicas (zoo/ops/stacking.py) has its rows in one dim 0 and its weights in front: row b takes those of
# b * S / B. Without one S is 1, and a product is a plain one.


def as_matrix(x: Tensor, stack: int) -> Tensor:
    """(B, …, C) as one matrix (M, C), or for a stack of S > 1 as (S, M, C)."""
    return x.flatten(0, -2) if stack == 1 else x.unflatten(0, (stack, -1)).flatten(1, -2)


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """x (B, …, K) @ matrix (S, K, N), each row with its own."""
    y = as_matrix(x, matrix.shape[0]) @ (matrix[0] if matrix.shape[0] == 1 else matrix)
    return y.view(*x.shape[:-1], matrix.shape[2])


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices, or of stacks of them, summed and returned in float32 at least."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if not a.is_cuda or a.dtype == wide:
        return a.to(wide) @ b.to(wide)
    return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=wide)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, of matrices or stacks of them; one pass over total where a GPU's product can add to its float32
    output. total may have a stack of one more in front."""
    total = total[0] if total.dim() > a.dim() else total
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        (torch.addmm if a.dim() == 2 else torch.baddbmm)(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += wide_product(a, b)


# ---------------------------------------------------------------------------------------------------------- wide_linear


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in autocast's dtype, (B, …, C) and (N, C); the gradient of weight in float32 from end to end.

    Without autocast, and for float64, what F.linear is. Differentiable once.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device) or torch.float64 in (x.dtype, weight.dtype):
        return F.linear(x, weight)
    dtype = torch.get_autocast_dtype(device)
    return _wide_linear(x.to(dtype), weight.detach().to(dtype).unsqueeze(0), weight.unsqueeze(0))


# `weight` is there for its gradient, of its own dtype; the products take `rounded`
@torch.library.custom_op("zoo::wide_linear", mutates_args=())
def _wide_linear(x: Tensor, rounded: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return product(x, rounded.mT)


@_wide_linear.register_fake
def _(x, rounded, weight):
    return x.new_empty((*x.shape[:-1], rounded.shape[1]))


@torch.library.custom_op("zoo::wide_linear_backward", mutates_args=())
def _wide_linear_backward(dy: Tensor, x: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        rows, stack = as_matrix(dy, rounded.shape[0]), rounded.shape[0]
        return product(dy, rounded), wide_product(rows.mT, as_matrix(x, stack)).view(rounded.shape)


@_wide_linear_backward.register_fake
def _(dy, x, rounded):
    return x.new_empty(x.shape), rounded.new_empty(rounded.shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _save_wide(ctx, inputs, output) -> None:
    x, rounded, weight = inputs
    ctx.save_for_backward(x, rounded)
    ctx.dtype = weight.dtype


def _backward_wide(ctx, dy: Tensor) -> Any:
    dx, dweight = _wide_linear_backward(dy, *ctx.saved_tensors)
    return dx, None, dweight.to(ctx.dtype)


_wide_linear.register_autograd(_backward_wide, setup_context=_save_wide)
stack_rows(_wide_linear)
stack_rows(_wide_linear_backward)

# ------------------------------------------------------------------------------------------------------- precise_linear


def precise_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias in float32 (float64 for float64 input), whatever autocast says.

    x       (..., C) floating
    weight  (N, C), N small
    bias    (N,)
    Where a GPU would compute in bfloat16 or float16 anyway (autocast, or such an x), the product runs as three bfloat16
    ones, and its gradients have the precision that autocast gives those of any linear layer.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    pieces = in_pieces(x)  # asked before autocast is switched off
    with torch.autocast(x.device.type, enabled=False):
        if not pieces:
            return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
        high = x.to(torch.bfloat16).flatten(0, -2)
        whole = None if x.dtype == torch.bfloat16 else x.detach().flatten(0, -2)
        y = _piecewise_linear(high, whole, weight).unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias.float()


def in_pieces(x: Tensor) -> bool:
    """Whether such an x takes part in three products of pieces."""
    if x.device.type != "cuda" or x.dtype == torch.float64:
        return False
    return x.dtype != torch.float32 or torch.is_autocast_enabled("cuda")


@torch.library.custom_op("zoo::piecewise_linear", mutates_args=())
def _piecewise_linear(high: Tensor, x: Tensor | None, weight: Tensor) -> Tensor:
    """x @ weight.T, (M, C) and (N, C) to (M, N) float32, or a stack of each. `high` is x in bfloat16 and gets the
    gradient of x; x is None where that is all of it."""
    whole = high if x is None else x
    # x is split inside: a compiler that fuses its rounding with the difference computes both in float32, and finds zero
    return backend.choose("linear", whole.device, whole.dtype, backend.NO_HEADS).piecewise_product(whole, weight)


@_piecewise_linear.register_fake
def _(high, x, weight):
    return high.new_empty((*high.shape[:-1], weight.shape[-2]), dtype=torch.float32)


@torch.library.custom_op("zoo::piecewise_linear_backward", mutates_args=())
def _piecewise_linear_backward(dy: Tensor, high: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dy = dy.to(torch.bfloat16)
    return dy @ weight.to(torch.bfloat16), wide_product(dy.mT, high).to(weight.dtype)


@_piecewise_linear_backward.register_fake
def _(dy, high, weight):
    return high.new_empty(high.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output) -> None:
    high, _, weight = inputs
    ctx.save_for_backward(high, weight)


def _backward(ctx, dy: Tensor):
    dhigh, dweight = _piecewise_linear_backward(dy, *ctx.saved_tensors)
    return dhigh, None, dweight


_piecewise_linear.register_autograd(_backward, setup_context=_save)


@_piecewise_linear.register_vmap
def _(info, in_dims, high, x, weight):
    high, x, weight = (
        None if y is None else in_front(y, dim, info.batch_size)
        for y, dim in zip((high, x, weight), in_dims, strict=True)
    )
    return _piecewise_linear(high, x, weight), 0
