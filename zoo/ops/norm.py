"""The residual stream's next sum and its RMS norm, as one operator (Zhang and Sennrich, arXiv 1910.07467).

    s = h + branch        y = weight * s / rms(s)

The sum is all that is kept for the backward pass, which adds the gradient that arrives at s and the one that y makes,
and hands the same tensor to h and to branch.
"""

import torch
from torch import Tensor

from zoo.ops import backend
from zoo.ops.stacking import stack_rows


def add_norm(h: Tensor, branch: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(h + branch, its RMS norm times weight), both (…, C) in h's dtype, each rounded once.

    h, branch  (…, C) of one float dtype; what is normalised is their sum as it is returned
    weight     (C,) any float dtype
    Computed in float32 at least. Differentiable once. Raises ValueError for shapes or dtypes that do not belong
    together.
    """
    if h.shape != branch.shape or h.dtype != branch.dtype or not h.is_floating_point():
        raise ValueError(
            f"h is {h.dtype} {tuple(h.shape)} and branch {branch.dtype} {tuple(branch.shape)}; they take one float "
            "dtype and one shape"
        )
    if h.dim() < 2 or weight.shape != h.shape[-1:]:
        raise ValueError(f"h is {tuple(h.shape)} and weight {tuple(weight.shape)}; they take (…, C) and (C,)")
    return _add_norm(h, branch, weight.unsqueeze(0), eps)


# Weights have a stack of S in front: row n of N takes those of n * S / N
@torch.library.custom_op("zoo::add_norm", mutates_args=())
def _add_norm(h: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    module = backend.choose("norm", h.device, h.dtype, backend.NO_HEADS)
    total, normed = module.add_norm_forward(h.flatten(0, -2), branch.flatten(0, -2), weight, eps)
    return total.view(h.shape), normed.view(h.shape)


@_add_norm.register_fake
def _(h, branch, weight, eps):
    backend.tell_inductor()  # here: it is this operator's pair of results that inductor would write down twice a layer
    return h.new_empty(h.shape), h.new_empty(h.shape)


@torch.library.custom_op("zoo::add_norm_backward", mutates_args=())
def _add_norm_backward(
    dnormed: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(the gradient of h and of branch, that of weight). dtotal None: nothing but the norm has used the sum."""
    module = backend.choose("norm", total.device, total.dtype, backend.NO_HEADS)
    rows = (None if x is None else x.flatten(0, -2) for x in (dnormed, dtotal, total))
    grad, dweight = module.add_norm_backward(*rows, weight, eps)
    return grad.view(total.shape), dweight


@_add_norm_backward.register_fake
def _(dnormed, dtotal, total, weight, eps):
    return total.new_empty(total.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output) -> None:
    _, _, weight, eps = inputs
    ctx.save_for_backward(output[0], weight)
    ctx.eps = eps
    ctx.set_materialize_grads(False)


def _backward(ctx, dtotal: Tensor | None, dnormed: Tensor | None):
    if dnormed is None:
        return dtotal, dtotal, None, None
    total, weight = ctx.saved_tensors
    grad, dweight = _add_norm_backward(dnormed, dtotal, total, weight, ctx.eps)
    return grad, grad, dweight, None


_add_norm.register_autograd(_backward, setup_context=_save)
stack_rows(_add_norm)
stack_rows(_add_norm_backward)
