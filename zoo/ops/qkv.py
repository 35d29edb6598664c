"""Queries, keys and values made ready for attention, as one operator: token shift, RMS norm, rotary positions.

    m_t = keep_t x_t + (1 - keep_t) x_{t-1}  (k and v)     y = rotate(rms_norm(m))  (q and k)     (SPEC.md 3.1, 3.2)

Only the projection is kept for the backward pass, which writes one packed gradient. B batch, T tokens, H query heads,
G key/value heads, D head dim.
"""

from typing import Any

import torch
from torch import Tensor

from zoo.ops import backend
from zoo.ops.stacking import fold, in_front


def prepare_qkv(
    qkv: Tensor,
    keep: Tensor,
    heads: int,
    *,
    norms: tuple[Tensor, Tensor] | None = None,
    table: tuple[Tensor, Tensor] | None = None,
    starts: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, T, H, D), k and v (B, T, G, D), contiguous and of qkv's dtype; computed in float32 at least.

    qkv     (B, T, H + 2 G, D) the packed projection, any float dtype, D even
    keep    (B, T, 2 G) float32 (or wider), for k then v: its sigmoid is a token's own weight, the rest that of the one
            before (zeros before the first)
    heads   H
    norms   weights of the RMS norms of q and k: (H * D,) and (G * D,) over a whole token, or (D,) and (D,) per head
    table   cos, sin (B or 1, T, D / 2) of `rotary_table`; None does not rotate
    starts  (T,) bool, True where a packed document begins: nothing is shifted in there
    Differentiable once in qkv, keep and norms. Raises ValueError for shapes that do not belong together.
    """
    if qkv.dim() != 4 or qkv.shape[3] % 2 or (qkv.shape[2] - heads) % 2 or not 0 < heads < qkv.shape[2]:
        raise ValueError(f"qkv is {tuple(qkv.shape)} with {heads} query heads; it takes (B, T, H + 2 G, D), D even")
    dim, kv_heads = qkv.shape[3], (qkv.shape[2] - heads) // 2
    if keep.shape != (*qkv.shape[:2], 2 * kv_heads):
        raise ValueError(f"keep is {tuple(keep.shape)}; it takes (B, T, 2 G) = {(*qkv.shape[:2], 2 * kv_heads)}")
    q_weight, k_weight = (None, None) if norms is None else norms
    sizes = None if norms is None else (norms[0].shape, norms[1].shape)
    if sizes not in (None, ((dim,), (dim,)), ((heads * dim,), (kv_heads * dim,))):
        raise ValueError(f"norms have shapes {sizes}; they take (H * D,) and (G * D,), or (D,) twice")
    per_head = sizes == ((dim,), (dim,))
    stacked = (None if x is None else x.unsqueeze(0) for x in (q_weight, k_weight))
    cos, sin = (None, None) if table is None else table
    return _prepare(qkv, keep, *stacked, cos, sin, starts, heads, per_head, eps)


# Weights have a stack of S in front: row b takes those of b * S / B
@torch.library.custom_op("zoo::prepare_qkv", mutates_args=())
def _prepare(
    qkv: Tensor, keep: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, starts: Tensor | None, heads: int, per_head: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    module = backend.choose("qkv", qkv.device, qkv.dtype, qkv.shape[3])
    return module.prepare_forward(qkv, keep, q_weight, k_weight, cos, sin, starts, heads, per_head, eps)


@_prepare.register_fake
def _(qkv, keep, q_weight, k_weight, cos, sin, starts, heads, per_head, eps):
    kv_heads = (qkv.shape[2] - heads) // 2
    q, k, v = (qkv.new_empty((*qkv.shape[:2], n, qkv.shape[3])) for n in (heads, kv_heads, kv_heads))
    return q, k, v


@torch.library.custom_op("zoo::prepare_qkv_backward", mutates_args=())
def _prepare_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, keep: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, starts: Tensor | None, heads: int, per_head: bool, eps: float,
) -> list[Tensor]:  # fmt: skip
    """dqkv and dkeep, then those of both weights in one, head by head (S, H + G, D), where there are any."""
    module = backend.choose("qkv", qkv.device, qkv.dtype, qkv.shape[3])
    found = module.prepare_backward(
        dq, dk, dv, qkv, keep, q_weight, k_weight, cos, sin, starts, heads, per_head, eps
    )  # fmt: skip
    return [x for x in found if x is not None]


@_prepare_backward.register_fake
def _(dq, dk, dv, qkv, keep, q_weight, k_weight, cos, sin, starts, heads, per_head, eps):
    found = [qkv.new_empty(qkv.shape), keep.new_empty(keep.shape)]
    if q_weight is not None:
        size = (q_weight.shape[0], dq.shape[2] + dk.shape[2], dq.shape[3])
        found.append(qkv.new_empty(size, dtype=torch.promote_types(qkv.dtype, torch.float32)))
    return found


def _save(ctx, inputs, output) -> None:
    *tensors, heads, per_head, eps = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = heads, per_head, eps


def _backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor):
    tensors = ctx.saved_tensors
    heads, per_head, _ = ctx.options
    dqkv, dkeep, *both = _prepare_backward(dq, dk, dv, *tensors, *ctx.options)
    dweights = [None, None]
    if both:
        parts = both[0].split((heads, dk.shape[2]), dim=1)  # (S, H, D) and (S, G, D)
        weights = tensors[2:4]
        dweights = [
            (part.sum(dim=1) if per_head else part.flatten(1)).to(weight.dtype)
            for part, weight in zip(parts, weights, strict=True)
        ]
    return dqkv, dkeep, *dweights, None, None, None, None, None, None


_prepare.register_autograd(_backward, setup_context=_save)


def _stacked(operator: Any, rows: int) -> None:
    """vmap: the stack joins the rows; weights keep it in front. `rows` arguments come before the weights."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        if args[rows + 4] is not None:
            raise ValueError(f"{operator._qualname}: packed documents (cu_seqlens) cannot be stacked by vmap")
        folded = [fold(x, dim, size) for x, dim in zip(args[: rows + 2], in_dims[: rows + 2], strict=True)]
        batch = folded[0].shape[0] // size
        tables = [
            _table(x, dim, size, batch) for x, dim in zip(args[rows + 2 :][:2], in_dims[rows + 2 :][:2], strict=True)
        ]
        outputs = operator(*folded, *tables, *args[rows + 4 :])
        outputs = type(outputs)(x.unflatten(0, (size, -1)) for x in outputs)
        return outputs, type(outputs)(0 for _ in outputs)

    operator.register_vmap(rule)


def _table(x: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    if x is None or (dim is None and x.shape[0] == 1):
        return x
    stack = in_front(x, dim, size)
    return stack.expand(size, batch, *stack.shape[2:]).flatten(0, 1)


_stacked(_prepare, 2)
_stacked(_prepare_backward, 5)
