"""What launchers share: which device they launch on, and what kernels ask of strides."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def rows_contiguous(x: Tensor) -> Tensor:
    """The kernels take any strides but the last."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides_of(*tensors: Tensor) -> list[int]:
    """Of each (B,T,H,D) all but the last, which is 1."""
    return [stride for x in tensors for stride in x.stride()[:3]]
