"""What a block computes around its large products, in plain PyTorch: SwiGLU's product, the norm of a sum, q, k and v
made ready for attention, the narrow products of gates. The definitions, and the `reference` back end of the op families
"swiglu", "norm", "qkv" and "linear".
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops.reference import accumulator

# ---------------------------------------------------------------------------------------------------------- SwiGLU


def swiglu_forward(packed: Tensor) -> Tensor:
    """silu(gate) * value, (N, F), of packed (N, 2F) = value | gate."""
    value, gate = packed.to(accumulator(packed.dtype)).chunk(2, dim=-1)
    return (F.silu(gate) * value).to(packed.dtype)


def swiglu_backward(grad: Tensor, packed: Tensor) -> Tensor:
    """The gradient of packed (N, 2F) from that of the product (N, F)."""
    wide = accumulator(packed.dtype)
    value, gate = packed.to(wide).chunk(2, dim=-1)
    grad, share = grad.to(wide), gate.sigmoid()
    return torch.cat((grad * gate * share, grad * value * share * (1 + gate * (1 - share))), dim=-1).to(packed.dtype)


# ------------------------------------------------------------------------------------------------ the norm of a sum


def add_norm_forward(h: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(h + branch, its RMS norm times weight), (N, C) each; weight (S, C), for N / S rows each."""
    total = h + branch
    unit, _ = _unit(total, weight, eps)
    return total, (unit * weight.to(unit.dtype).unsqueeze(1)).to(h.dtype).view(h.shape)


def add_norm_backward(
    dnormed: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(the gradient of the sum, that of weight); dtotal is what else arrived at the sum."""
    unit, scale = _unit(total, weight, eps)
    grad = dnormed.to(unit.dtype).view(unit.shape)
    dweight = (grad * unit).sum(dim=1).to(weight.dtype)
    grad = grad * weight.to(unit.dtype).unsqueeze(1)
    grad = (scale * (grad - unit * (grad * unit).mean(dim=-1, keepdim=True))).view(total.shape)
    return (grad if dtotal is None else grad + dtotal).to(total.dtype), dweight


def _unit(total: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(S, N / S, C) divided by its root mean square, and by what that multiplied."""
    rows = total.to(accumulator(total.dtype)).unflatten(0, (weight.shape[0], total.shape[0] // weight.shape[0]))
    scale = (rows.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return rows * scale, scale


# ------------------------------------------------------------------------------- keys, queries and values, made ready


def prepare_forward(
    qkv: Tensor, keep: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, starts: Tensor | None, heads: int, per_head: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v of the packed qkv (B, T, H + 2 G, D), contiguous (zoo/ops/qkv.py)."""
    parts = _parts(qkv, keep, q_weight, k_weight, cos, sin, heads)
    q, k, v = (_part_forward(*part, starts, per_head, eps) for part in parts)
    return q, k, v


def prepare_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, dgates: Tensor, qkv: Tensor, keep: Tensor, q_weight: Tensor | None,
    k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, starts: Tensor | None, heads: int, per_head: bool,
    eps: float, width: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The gradients of qkv, gates and keep side by side in a row of `width` columns, zeros behind them: (B, T, width)
    of qkv's dtype; and those of the weights of q and k, head by head: (S, H + G, D)."""
    parts = _parts(qkv, keep, q_weight, k_weight, cos, sin, heads)
    found = [_part_backward(grad, *part, starts, per_head, eps) for grad, part in zip((dq, dk, dv), parts, strict=True)]
    columns = [dx.flatten(2) for dx, _, _ in found]
    columns += [x.to(qkv.dtype) for x in (dgates, *(dkeep for _, dkeep, _ in found if dkeep is not None))]
    packed = torch.cat(columns, dim=2)
    dweights = [dweight for _, _, dweight in found if dweight is not None]
    return F.pad(packed, (0, width - packed.shape[2])), torch.cat(dweights, dim=1) if dweights else None


def _parts(qkv, keep, q_weight, k_weight, cos, sin, heads) -> list[tuple[Any, Any, Any, Any]]:  # noqa: ANN001
    """What q, k and v each take: the projection, keep, weight and table."""
    kv_heads = (qkv.shape[2] - heads) // 2
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)
    keep_k, keep_v = keep.chunk(2, dim=2)
    table = None if cos is None else (cos, sin)
    return [(q, None, q_weight, table), (k, keep_k, k_weight, table), (v, keep_v, None, None)]


def _part_forward(
    x: Tensor, keep: Tensor | None, weight: Tensor | None, table: tuple[Tensor, Tensor] | None,
    starts: Tensor | None, per_head: bool, eps: float,
) -> Tensor:  # fmt: skip
    """x (B, T, H, D) shifted, normalised and rotated, each where it is given what it needs."""
    mixed, _, unit, _ = _stages(x, keep, weight, starts, per_head, eps)
    y = mixed if weight is None else unit * _by_row(weight, x)
    return (y if table is None else _rotate(y, *table)).to(x.dtype, memory_format=torch.contiguous_format, copy=True)


def _part_backward(
    grad: Tensor, x: Tensor, keep: Tensor | None, weight: Tensor | None, table: tuple[Tensor, Tensor] | None,
    starts: Tensor | None, per_head: bool, eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of x, of keep (pre-activation), and of weight, head by head (S, H, D)."""
    mixed, before, unit, scale = _stages(x, keep, weight, starts, per_head, eps)
    grad = grad.to(mixed.dtype)
    if table is not None:
        grad = _rotate(grad, table[0], -table[1])
    weight_grad = None
    if weight is not None:
        weight_grad = (grad * unit).unflatten(0, (weight.shape[0], -1)).sum(dim=(1, 2))
        grad = grad * _by_row(weight, x)
        dims = (-1,) if per_head else (-2, -1)
        grad = scale * (grad - unit * (grad * unit).mean(dim=dims, keepdim=True))
    keep_grad = None
    if keep is not None:
        share = keep.to(grad.dtype).sigmoid()
        keep_grad = ((grad * (x - before)).sum(-1) * share * (1 - share)).to(keep.dtype)
        later = F.pad(grad * (1 - share).unsqueeze(-1), (0, 0, 0, 0, 0, 1))
        if starts is not None:
            later = later.masked_fill(F.pad(starts, (0, 1))[None, :, None, None], 0)
        grad = grad * share.unsqueeze(-1) + later[:, 1:]
    return grad.to(x.dtype), keep_grad, weight_grad


def _stages(x, keep, weight, starts, per_head, eps):  # noqa: ANN001, ANN202
    """After the shift; the token before; divided by its root mean square; and by what that multiplied."""
    x = x.to(accumulator(x.dtype))
    mixed, before, scale, unit = x, None, None, None
    if keep is not None:
        before = F.pad(x, (0, 0, 0, 0, 1, 0))[:, :-1]
        if starts is not None:
            before = before.masked_fill(starts[None, :, None, None], 0)
        share = keep.to(x.dtype).sigmoid().unsqueeze(-1)
        mixed = share * x + (1 - share) * before
    if weight is not None:
        dims = (-1,) if per_head else (-2, -1)
        scale = (mixed.square().mean(dim=dims, keepdim=True) + eps).rsqrt()
        unit = mixed * scale
    return mixed, before, unit, scale


def _by_row(weight: Tensor, x: Tensor) -> Tensor:
    """weight (S, H * D) or (S, D), for B / S rows each, against x (B, T, H, D)."""
    weight = weight.repeat_interleave(x.shape[0] // weight.shape[0], dim=0).to(accumulator(x.dtype))
    return weight.view(x.shape[0], 1, -1, x.shape[3])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2).to(x.dtype), sin.unsqueeze(2).to(x.dtype)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


# ------------------------------------------------------------------------------------------------ narrow products


def piecewise_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.mT, (…, M, K) and (…, N, K), in float32, from bfloat16 pieces of both; the product of the two
    remainders is left out. A bfloat16 x is one piece."""
    high, weight_high = x.bfloat16().float(), weight.bfloat16().float()
    low, weight_low = ((y.float() - part).bfloat16().float() for y, part in ((x, high), (weight, weight_high)))
    return low @ weight_high.mT + high @ weight_low.mT + high @ weight_high.mT
