"""Gated sliding-window attention on Hopper: the two functions of a back end, as in zoo/kernels/window.py.

bf16 and fp16, head dims 64 and 128, sm_90 only. Importing this imports Gluon, an experimental part of triton 3.6.
"""

import torch
from torch import Tensor

from zoo.kernels import hopper_backward, hopper_forward
from zoo.kernels import window as portable


def window_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: tuple[Tensor, ...],
    *,
    window: int | None,
    scale: float,
    spans: tuple[Tensor, Tensor] | None,
    kept: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    kernels = hopper_forward if scale > 0 else portable  # the running maximum is taken before the scale
    with torch.cuda.device(q.device):
        return kernels.window_forward(q, k, v, gate, window=window, scale=scale, spans=spans, kept=kept)


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
    kept: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    kernels = hopper_backward if scale > 0 else portable  # the bias is divided by the scale
    with torch.cuda.device(q.device):
        return kernels.window_backward(
            dout, dlse, q, k, v, out, lse, gate, window=window, scale=scale, spans=spans, kept=kept
        )
