"""The tiles that pruning keeps, in plain PyTorch: the definition, on any device (rule and proof: zoo/ops/prune.py)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import FORGOTTEN, KEPT_TILE, ROUNDING, UNITS
from zoo.ops import reference


def kept_tiles(
    q: Tensor, k: Tensor, gate: tuple[Tensor, ...], *, window: int | None, scale: float, prune: float
) -> tuple[Tensor, Tensor]:
    """As `zoo.ops.prune.kept_tiles`."""
    length, (keys, kv_heads) = q.shape[1], k.shape[1:3]
    wide = reference.accumulator(q.dtype)
    k_norm = torch.linalg.vector_norm(k, dim=-1, dtype=wide)
    q_norm = torch.linalg.vector_norm(q, dim=-1, dtype=wide).unflatten(2, (kv_heads, -1))
    product = q_norm * k_norm[:, keys - length :].unsqueeze(3)
    early = (0, 0, keys - length, 0)
    q_norm, product = (_by_tile(F.pad(x.flatten(2), early)).amax(3) for x in (q_norm, product))  # (B,H,tiles)
    reach = k_norm.amax(1).repeat_interleave(q.shape[2] // kv_heads, dim=1).unsqueeze(2)
    room = abs(scale) * (reach * q_norm + product)
    need = ((room - log_share(prune, window, keys)) * (ROUNDING * UNITS)).ceil()
    most = float(1 << 61)
    need = torch.where(need < most, need, most).long()  # also where it is not a number: then nothing is dropped

    decay = gate[0] if len(gate) == 1 else reference.activate(gate[0], gate[1])
    forgot = -_by_tile(decay).sum(3, dtype=torch.float64)
    forgot = (forgot.clamp(max=FORGOTTEN) * UNITS).long()
    since = (forgot.flip(2).cumsum(2) - forgot.flip(2)).flip(2).contiguous()  # what the tiles after this one forgot
    # b drops a when since[a] - since[b - 1] > need[b], if all after b do; need is positive, so b - 1 is always kept
    limit = (since + forgot + need).flip(2).cummax(2).values.flip(2)
    first = torch.searchsorted(-since, -limit)  # how many lie above it
    first = first.unflatten(1, (kv_heads, -1)).amin(2).int()
    return first, mirror(first)


def log_share(prune: float, window: int | None, keys: int) -> float:
    """The logarithm of what a key may hold of a row's probability, if all that the row sees are to hold `prune`."""
    return math.log(prune / min(keys, keys if window is None else window))


def mirror(first: Tensor) -> Tensor:
    """One past the last query tile that keeps each key tile, from the first key tile that each query tile keeps."""
    tile = torch.arange(first.shape[2], device=first.device, dtype=torch.int32)
    return torch.searchsorted(first, tile.expand_as(first).contiguous(), right=True, out_int32=True)


def _by_tile(x: Tensor) -> Tensor:
    """(B,N,H) to (B,H,tiles,KEPT_TILE), zeros after the end."""
    x = F.pad(x.transpose(1, 2), (0, -x.shape[1] % KEPT_TILE))
    return x.unflatten(2, (-1, KEPT_TILE))
