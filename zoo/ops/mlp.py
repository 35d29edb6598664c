"""An MLP in pieces of its tokens, recomputed in the backward pass: inner activations never stand for a whole long row.

One operator however many pieces there are: a compiler that saw the loop would unroll it, in every layer three times.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.linear import add_product, as_matrix, product
from zoo.ops.stacking import stack_rows
from zoo.ops.swiglu import swiglu


def mlp_in_pieces(x: Tensor, up: Tensor, down: Tensor, *, tokens: int, gated: bool) -> Tensor:
    """act(x @ up.T) @ down.T, (B, T, C) of x's dtype or autocast's, `tokens` of each row at once.

    x     (B, T, C)
    up    (2 F, C) for SwiGLU (gated), value and gate, or (F, C) for GELU
    down  (C, F)
    All that is kept for the backward pass is x. The gradients of up and down are summed in float32 at least.
    Differentiable once. Raises ValueError for shapes that do not belong together, or tokens < 1.
    """
    hidden = up.shape[0] // 2 if gated else up.shape[0]
    fits = x.dim() == 3 and up.shape == (hidden * (1 + gated), x.shape[-1]) and down.shape == (x.shape[-1], hidden)
    if not fits or tokens < 1:
        raise ValueError(
            f"x, up and down are {tuple(x.shape)}, {tuple(up.shape)} and {tuple(down.shape)}, tokens = {tokens}; they "
            f"take (B, T, C), ({'2 F' if gated else 'F'}, C), (C, F), and 1 or more"
        )
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    rounded = (weight.detach().to(x.dtype).unsqueeze(0) for weight in (up, down))
    return _mlp(x, *rounded, up.unsqueeze(0), down.unsqueeze(0), tokens, gated)


# `up` and `down` are there for their gradients, of their own dtypes; the products take the rounded ones. Weights have a
# stack of S in front: row b takes those of b * S / B
@torch.library.custom_op("zoo::mlp_in_pieces", mutates_args=())
def _mlp(
    x: Tensor, rounded_up: Tensor, rounded_down: Tensor, up: Tensor, down: Tensor, tokens: int, gated: bool
) -> Tensor:
    y = torch.empty_like(x)
    with torch.autocast(x.device.type, enabled=False):
        for part, out in zip(x.split(tokens, 1), y.split(tokens, 1), strict=True):
            projected = product(part, rounded_up.mT)
            out.copy_(product(swiglu(projected) if gated else F.gelu(projected), rounded_down.mT))
    return y


@_mlp.register_fake
def _(x, rounded_up, rounded_down, up, down, tokens, gated):
    return torch.empty_like(x)


@torch.library.custom_op("zoo::mlp_in_pieces_backward", mutates_args=())
def _mlp_backward(
    dy: Tensor, x: Tensor, rounded_up: Tensor, rounded_down: Tensor, tokens: int, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    stack, wide = rounded_up.shape[0], torch.promote_types(x.dtype, torch.float32)
    dx = torch.empty_like(x)
    dup, ddown = (torch.zeros_like(weight, dtype=wide) for weight in (rounded_up, rounded_down))
    with torch.autocast(x.device.type, enabled=False):
        for part, grad, out in zip(*(y.split(tokens, 1) for y in (x, dy, dx)), strict=True):
            projected = product(part, rounded_up.mT)
            inner = swiglu(projected) if gated else F.gelu(projected)
            add_product(ddown, as_matrix(grad, stack).mT, as_matrix(inner, stack))
            grad = product(grad, rounded_down)
            if gated:
                grad = torch.ops.zoo.swiglu_backward(grad, projected)
            else:
                grad = torch.ops.aten.gelu_backward(grad, projected)
            add_product(dup, as_matrix(grad, stack).mT, as_matrix(part, stack))
            out.copy_(product(grad, rounded_up))
    return dx, dup, ddown


@_mlp_backward.register_fake
def _(dy, x, rounded_up, rounded_down, tokens, gated):
    wide = torch.promote_types(x.dtype, torch.float32)
    dup, ddown = (torch.empty_like(weight, dtype=wide) for weight in (rounded_up, rounded_down))
    return torch.empty_like(x), dup, ddown


def _save(ctx, inputs, output) -> None:
    x, rounded_up, rounded_down, up, down, *options = inputs
    ctx.save_for_backward(x, rounded_up, rounded_down)
    ctx.options = options
    ctx.dtypes = up.dtype, down.dtype


def _backward(ctx, dy: Tensor):
    dx, *dweights = _mlp_backward(dy, *ctx.saved_tensors, *ctx.options)
    return dx, None, None, *(d.to(dtype) for d, dtype in zip(dweights, ctx.dtypes, strict=True)), None, None


_mlp.register_autograd(_backward, setup_context=_save)
stack_rows(_mlp)
stack_rows(_mlp_backward)
