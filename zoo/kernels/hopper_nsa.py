"""Native Sparse Attention on Hopper: the functions of a back end, as in zoo/kernels/nsa.py.

Compressed attention and the selected branch's forward over blocks of 64 keys have kernels of their own for sm_90, bf16
and fp16, head dims 64 and 128 and groups that divide 64 (far blocks: groups from 8); places, pooling, the choice of
blocks, the selected branch's merge and backward, and the mix run the portable ones. Importing this imports Gluon.
"""

from typing import Any

import torch
from torch import Tensor

from zoo.kernels import hopper_compressed, hopper_compressed_backward, hopper_near, hopper_partial, nsa_selected
from zoo.kernels import nsa_compressed as portable
from zoo.kernels.hopper_rows import takes
from zoo.kernels.nsa_choice import choose
from zoo.kernels.nsa_mix import mix_backward, mix_forward
from zoo.kernels.nsa_places import locate
from zoo.kernels.nsa_pool import pool_backward, pool_forward
from zoo.kernels.nsa_selected_backward import selected_backward

__all__ = [
    "compressed_backward",
    "compressed_forward",
    "locate",
    "mix_backward",
    "mix_forward",
    "pool_backward",
    "pool_forward",
    "selected_backward",
    "selected_forward",
    "selected_mix_forward",
]


def compressed_forward(
    q: Tensor, k: Tensor, v: Tensor, places: Any, geometry: Any, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = hopper_compressed if takes(q, k, scale) else portable
    with torch.cuda.device(q.device):
        out, lse = kernels.attend(q, k, v, places, geometry, scale)
    return out, lse, choose(q, k, lse, places, geometry, scale)


def compressed_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    places: Any,
    geometry: Any,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = hopper_compressed_backward if takes(q, k, scale) else portable
    with torch.cuda.device(q.device):
        return kernels.compressed_backward(dout, dlse, q, k, v, out, lse, places, geometry, scale)


def selected_forward(
    q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, places: Any, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    return nsa_selected.selected_forward(q, k, v, block_index, places, block, scale, *_parts(q, k, block, scale))


def selected_mix_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    gates: Tensor,
    compressed: Tensor,
    window: Tensor,
    places: Any,
    block: int,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return nsa_selected.selected_mix_forward(
        q, k, v, block_index, gates, compressed, window, places, block, scale, keep, *_parts(q, k, block, scale)
    )


def _parts(q: Tensor, k: Tensor, block: int, scale: float) -> tuple[Any, Any]:
    near = hopper_near if hopper_near.takes(q, k, block, scale) else nsa_selected
    far = hopper_partial if hopper_partial.takes(q, k, block, scale) else nsa_selected
    return near.near_outputs, far.far_outputs
