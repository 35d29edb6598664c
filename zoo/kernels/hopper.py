"""Gated sliding-window attention on Hopper: the back end's two functions (zoo/ops/backend.py), as in zoo/kernels/window.py.

bf16 and fp16, head dims 64 and 128, sm_90 only. Importing this imports Gluon, an experimental part of triton 3.6.
"""

import torch
from torch import Tensor

from zoo.kernels import hopper_backward, hopper_forward, window as portable

HEAD_DIMS = (64, 128)


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why these kernels can't run such a call, or None."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) != (9, 0):
        return "the Hopper kernels need a device of compute capability 9.0"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the Hopper kernels take float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None if head_dim in HEAD_DIMS else f"the Hopper kernels take a head_dim of 64 or 128, not {head_dim}"


def window_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: tuple[Tensor, ...],
    *,
    window: int | None,
    scale: float,
    spans: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    kernels = hopper_forward if scale > 0 else portable  # the running maximum is taken before the scale
    with torch.cuda.device(q.device):
        return kernels.window_forward(q, k, v, gate, window=window, scale=scale, spans=spans)


def window_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    gate: tuple[Tensor, ...],
    *,
    window: int | None,
    scale: float,
    spans: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    kernels = hopper_backward if scale > 0 else portable  # the bias is divided by the scale
    with torch.cuda.device(q.device):
        return kernels.window_backward(dout, dlse, q, k, v, out, lse, gate, window=window, scale=scale, spans=spans)
