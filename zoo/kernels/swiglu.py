"""SwiGLU's gated product, silu(gate) * value, on the packed projection value | gate, forward and backward, in Triton.

The backward pass writes the gradients of both halves into one packed tensor, as the next product wants it, and needs
nothing of the forward pass but the projection.

Shapes: packed (N, 2F), rows contiguous; product (N, F).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.launch import on_device, rows_contiguous

BLOCK = 1024  # elements of a row: eight to a thread, a 128-bit load of 16-bit elements


def swiglu_forward(packed: Tensor) -> Tensor:
    """silu(gate) * value in packed's dtype, computed in float32; packed (N, 2F) = value | gate."""
    packed = rows_contiguous(packed)
    rows, width = packed.shape[0], packed.shape[1] // 2
    product = packed.new_empty((rows, width))
    if product.numel():
        grid = (rows, triton.cdiv(width, BLOCK))
        with on_device(packed):
            swiglu_forward_kernel[grid](packed, product, packed.stride(0), width, BLOCK=BLOCK, num_warps=4)
    return product


def swiglu_backward(grad: Tensor, packed: Tensor) -> Tensor:
    """The gradient of packed (N, 2F), contiguous, from that of the product (N, F)."""
    packed, grad = (rows_contiguous(x) for x in (packed, grad))
    rows, width = grad.shape
    packed_grad = torch.empty_like(packed, memory_format=torch.contiguous_format)
    if grad.numel():
        grid = (rows, triton.cdiv(width, BLOCK))
        strides = (grad.stride(0), packed.stride(0))
        with on_device(packed):
            swiglu_backward_kernel[grid](grad, packed, packed_grad, *strides, width, BLOCK=BLOCK, num_warps=4)
    return packed_grad


@triton.jit
def swiglu_forward_kernel(packed_ptr, product_ptr, stride_p, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(packed_ptr + row * stride_p + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(packed_ptr + row * stride_p + width + at, mask=inside, other=0.0).to(tl.float32)
    product = value * (gate * tl.sigmoid(gate))
    tl.store(product_ptr + row * width + at, product.to(product_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(grad_ptr, packed_ptr, packed_grad_ptr, stride_g, stride_p, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    grad = tl.load(grad_ptr + row * stride_g + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(packed_ptr + row * stride_p + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(packed_ptr + row * stride_p + width + at, mask=inside, other=0.0).to(tl.float32)
    open_ = tl.sigmoid(gate)
    dvalue = grad * (gate * open_)
    dgate = grad * value * open_ * (1 + gate * (1 - open_))
    out_ptr = packed_grad_ptr + row * 2 * width
    tl.store(out_ptr + at, dvalue.to(packed_grad_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + width + at, dgate.to(packed_grad_ptr.dtype.element_ty), mask=inside)
