"""SwiGLU's gated product as an operator (Shazeer, arXiv 2002.05202)."""

import torch
from torch import Tensor

from zoo.ops import backend
from zoo.ops.stacking import stack_rows


def swiglu(packed: Tensor) -> Tensor:
    """silu(gate) * value of a packed projection: (…, 2F) = value | gate to (…, F), of the same float dtype.

    Computed in float32 at least. Differentiable once; all that is kept for it is `packed`.
    Raises ValueError where the last dimension is odd or the tensor is not floating.
    """
    if packed.dim() < 2 or packed.shape[-1] % 2 or not packed.is_floating_point():
        raise ValueError(f"packed is {packed.dtype} {tuple(packed.shape)}; it takes a floating (…, 2F), value and gate")
    return _swiglu(packed)


@torch.library.custom_op("zoo::swiglu", mutates_args=())
def _swiglu(packed: Tensor) -> Tensor:
    module = backend.choose("swiglu", packed.device, packed.dtype, backend.NO_HEADS)
    return module.swiglu_forward(packed.flatten(0, -2)).unflatten(0, packed.shape[:-1])


@_swiglu.register_fake
def _(packed):
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2))


@torch.library.custom_op("zoo::swiglu_backward", mutates_args=())
def _swiglu_backward(grad: Tensor, packed: Tensor) -> Tensor:
    module = backend.choose("swiglu", packed.device, packed.dtype, backend.NO_HEADS)
    return module.swiglu_backward(grad.flatten(0, -2), packed.flatten(0, -2)).unflatten(0, packed.shape[:-1])


@_swiglu_backward.register_fake
def _(grad, packed):
    return packed.new_empty(packed.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> Tensor:
    return _swiglu_backward(grad, *ctx.saved_tensors)


_swiglu.register_autograd(_backward, setup_context=_save)
stack_rows(_swiglu)
stack_rows(_swiglu_backward)
