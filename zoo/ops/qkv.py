"""What attention begins with, as one operator: queries, keys, values and gates of a block's input.

    qkv = x W^T        m_t = keep_t x_t + (1 - keep_t) x_{t-1}  (k and v)
    gates, keep = x N^T  (+ bias; narrow, float32)        y = rotate(rms_norm(m))  (q and k)     (SPEC.md 3.1, 3.2)

Only both projections are kept for the backward pass. It writes the gradients of all columns side by side, so that what
arrives at x is one product, and so are the gradients of W and N together. B batch, T tokens, C width, H query heads,
G key/value heads, D head dim.
"""

from typing import Any

import torch
from torch import Tensor

from zoo.ops import backend, linear
from zoo.ops.linear import as_matrix, product, wide_product
from zoo.ops.stacking import fold, in_front

ALIGNED = 64  # columns: rows of 16-bit elements then begin with a cache line, as fast products want them


def attention_inputs(
    x: Tensor,
    weight: Tensor,
    keep: Tensor,
    heads: int,
    *,
    gates: Tensor | None = None,
    bias: Tensor | None = None,
    norms: tuple[Tensor, Tensor] | None = None,
    table: tuple[Tensor, Tensor] | None = None,
    starts: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (B, T, H, D), k and v (B, T, G, D) of x's dtype or autocast's; x @ gates.T + bias (B, T, N), float32.

    x       (B, T, C), any float dtype
    weight  ((H + 2 G) * D, C), D even
    keep    (2 G, C), for k then v: the sigmoid of x @ keep.T is a token's own weight, the rest that of the one before
            (zeros before the first)
    heads   H
    gates   (N, C); None: N is 0
    bias    (N,) or None
    norms   weights of the RMS norms of q and k: (H * D,) and (G * D,) over a whole token, or (D,) and (D,) per head
    table   cos, sin (B or 1, T, D / 2) of `rotary_table`; None does not rotate
    starts  (T,) bool, True where a packed document begins: nothing is shifted in there
    x @ gates.T and x @ keep.T are those of `precise_linear`; all else is computed in float32 at least. Differentiable
    once in x and all weights, in the products' dtype. Float64 stays float64. Raises ValueError for shapes that do not
    belong together.
    """
    kv_heads = keep.shape[0] // 2
    columns, width = weight.shape
    if x.dim() != 3 or not x.shape[2] == width == keep.shape[1] or (gates is not None and gates.shape[1] != width):
        shapes = ", ".join(str(tuple(y.shape)) for y in (x, weight, keep, gates) if y is not None)
        raise ValueError(f"x, weight, keep and gates are {shapes}; they take (B, T, C) and (…, C)")
    if heads < 1 or kv_heads < 1 or keep.shape[0] % 2 or columns % (2 * (heads + 2 * kv_heads)):
        raise ValueError(
            f"weight is {tuple(weight.shape)} with {heads} query heads and keep {tuple(keep.shape)}; they take "
            "((H + 2 G) * D, C), D even, and (2 G, C)"
        )
    dim = columns // (heads + 2 * kv_heads)
    q_weight, k_weight = (None, None) if norms is None else norms
    sizes = None if norms is None else (norms[0].shape, norms[1].shape)
    if sizes not in (None, ((dim,), (dim,)), ((heads * dim,), (kv_heads * dim,))):
        raise ValueError(f"norms have shapes {sizes}; they take (H * D,) and (G * D,), or (D,) twice")
    per_head = sizes == ((dim,), (dim,))

    device = x.device.type
    high = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) and _rounds(x) else x
    whole = None if high is x else x.detach()
    narrow = keep if gates is None else torch.cat((gates, keep))
    spare = narrow.new_zeros((-(columns + narrow.shape[0]) % ALIGNED, width))
    both = torch.cat([part.detach().to(high.dtype) for part in (weight, narrow, spare) if part.shape[0]])
    stacked = (None if y is None else y.unsqueeze(0) for y in (both, weight, narrow, bias, q_weight, k_weight))
    cos, sin = (None, None) if table is None else table
    options = (heads, kv_heads, per_head, linear.in_pieces(x), eps)
    q, k, v, pre, _, _ = _inputs(high, whole, *stacked, cos, sin, starts, *options)
    return q, k, v, pre


def _rounds(x: Tensor) -> bool:
    """Autocast leaves float64 as it is."""
    return x.dtype != torch.float64


# `weight` is there for its gradient, of its own dtype: products take `both`, it and `narrow` in theirs, with columns to
# spare. Weights have a stack of S in front: row b takes those of b * S / B
@torch.library.custom_op("zoo::attention_inputs", mutates_args=())
def _inputs(
    high: Tensor, whole: Tensor | None, both: Tensor, weight: Tensor, narrow: Tensor, bias: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, starts: Tensor | None,
    heads: int, kv_heads: int, per_head: bool, pieces: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v, gates; for the backward pass, the products with narrow (B, T, N + 2 G) and qkv (B, T, H + 2 G, D)."""
    with torch.autocast(high.device.type, enabled=False):
        x = high if whole is None else whole
        qkv = product(high, both[:, : weight.shape[1]].mT)
        if pieces:
            module = backend.choose("linear", x.device, x.dtype, backend.NO_HEADS)
            pre = module.piecewise_product(as_matrix(x, narrow.shape[0]), narrow).view(*x.shape[:2], narrow.shape[1])
        else:
            wide = torch.promote_types(x.dtype, torch.float32)
            pre = product(x.to(wide), narrow.mT.to(wide))
        qkv = qkv.unflatten(2, (heads + 2 * kv_heads, -1))
        module = backend.choose("qkv", qkv.device, qkv.dtype, qkv.shape[3])
        gates, keep = pre.split((pre.shape[2] - 2 * kv_heads, 2 * kv_heads), dim=2)
        q, k, v = module.prepare_forward(qkv, keep, q_weight, k_weight, cos, sin, starts, heads, per_head, eps)
        gates = gates.clone() if bias is None else _by_stack(gates, bias.shape[0]) + bias[:, None, None]
    return q, k, v, gates.view(*pre.shape[:2], gates.shape[-1]), pre, qkv


@_inputs.register_fake
def _(
    high, whole, both, weight, narrow, bias, q_weight, k_weight, cos, sin, starts, heads, kv_heads, per_head, pieces,
    eps,
):  # fmt: skip
    rows, every = high.shape[:2], heads + 2 * kv_heads
    dim = weight.shape[1] // every
    q, k, v, qkv = (high.new_empty((*rows, n, dim)) for n in (heads, kv_heads, kv_heads, every))
    wide, columns = torch.promote_types(high.dtype, torch.float32), narrow.shape[1]
    gates, pre = (high.new_empty((*rows, n), dtype=wide) for n in (columns - 2 * kv_heads, columns))
    return q, k, v, gates, pre, qkv


@torch.library.custom_op("zoo::attention_inputs_backward", mutates_args=())
def _inputs_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, dgates: Tensor, high: Tensor, qkv: Tensor, pre: Tensor, both: Tensor,
    q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, starts: Tensor | None,
    heads: int, per_head: bool, eps: float,
) -> list[Tensor]:  # fmt: skip
    """dx, of high's dtype; the gradient of both (S, …, C), in float32 at least; then those of the norms in one, head by
    head (S, H + G, D), where there are any."""
    module = backend.choose("qkv", qkv.device, qkv.dtype, qkv.shape[3])
    packed, dnorms = module.prepare_backward(
        dq, dk, dv, dgates, qkv, pre[..., dgates.shape[2] :], q_weight, k_weight, cos, sin, starts, heads, per_head,
        eps, both.shape[1],
    )  # fmt: skip
    with torch.autocast(high.device.type, enabled=False):
        columns = as_matrix(packed, both.shape[0])
        dboth = wide_product(columns.mT, as_matrix(high, both.shape[0]))
        found = [product(packed, both), dboth.view(both.shape)]
    return found if dnorms is None else [*found, dnorms]


@_inputs_backward.register_fake
def _(dq, dk, dv, dgates, high, qkv, pre, both, q_weight, k_weight, cos, sin, starts, heads, per_head, eps):
    wide = torch.promote_types(high.dtype, torch.float32)
    found = [high.new_empty(high.shape), both.new_empty(both.shape, dtype=wide)]
    if q_weight is not None:
        size = (q_weight.shape[0], dq.shape[2] + dk.shape[2], dq.shape[3])
        found.append(qkv.new_empty(size, dtype=wide))
    return found


def _save(ctx, inputs, output) -> None:
    high, _, both, weight, narrow, bias, *rest, heads, _, per_head, _, eps = inputs
    pre, qkv = output[4:]
    ctx.mark_non_differentiable(pre, qkv)
    ctx.save_for_backward(high, qkv, pre, both, *rest)
    ctx.options = heads, per_head, eps
    ctx.columns = weight.shape[1], narrow.shape[1]
    ctx.dtypes = weight.dtype, narrow.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, dgates: Tensor | None, *_):
    tensors = ctx.saved_tensors
    _, qkv, pre, weights = tensors[:4]
    heads, per_head, _ = ctx.options
    kv_heads, dim = (qkv.shape[2] - heads) // 2, qkv.shape[3]
    dq, dk, dv = (
        qkv.new_zeros((*qkv.shape[:2], n, dim)) if grad is None else grad
        for grad, n in ((dq, heads), (dk, kv_heads), (dv, kv_heads))
    )
    wide, narrow = ctx.columns
    if dgates is None:
        dgates = pre.new_zeros((*pre.shape[:2], narrow - 2 * kv_heads))
    dx, dboth, *both = _inputs_backward(dq, dk, dv, dgates, *tensors, *ctx.options)
    dbias = None
    if ctx.bias_dtype is not None:
        dbias = _by_stack(dgates, weights.shape[0]).sum(dim=(1, 2)).to(ctx.bias_dtype)
    dweight, dnarrow = (
        part.to(dtype)
        for part, dtype in zip((dboth[:, :wide], dboth[:, wide : wide + narrow]), ctx.dtypes, strict=True)
    )
    dnorms = [None, None]
    if both:
        parts = both[0].split((heads, kv_heads), dim=1)  # (S, H, D) and (S, G, D)
        dnorms = [
            (part.sum(dim=1) if per_head else part.flatten(1)).to(norm.dtype)
            for part, norm in zip(parts, tensors[4:6], strict=True)
        ]
    return dx, None, None, dweight, dnarrow, dbias, *dnorms, *[None] * 8


_inputs.register_autograd(_backward, setup_context=_save)


def _by_stack(x: Tensor, stack: int) -> Tensor:
    """(B, T, N) -> (S, B / S, T, N)."""
    return x.unflatten(0, (stack, -1))


def _stacked(operator: Any, rows: int) -> None:
    """vmap: the stack joins the rows; weights keep it in front. `rows` arguments come before the rotary table."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        if args[rows + 2] is not None:
            raise ValueError(f"{operator._qualname}: packed documents (cu_seqlens) cannot be stacked by vmap")
        folded = [fold(x, dim, size) for x, dim in zip(args[:rows], in_dims[:rows], strict=True)]
        batch = folded[0].shape[0] // size
        tables = [_table(x, dim, size, batch) for x, dim in zip(args[rows:][:2], in_dims[rows:][:2], strict=True)]
        outputs = operator(*folded, *tables, *args[rows + 2 :])
        outputs = type(outputs)(x.unflatten(0, (size, -1)) for x in outputs)
        return outputs, type(outputs)(0 for _ in outputs)

    operator.register_vmap(rule)


def _table(x: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    if x is None or (dim is None and x.shape[0] == 1):
        return x
    stack = in_front(x, dim, size)
    return stack.expand(size, batch, *stack.shape[2:]).flatten(0, 1)


_stacked(_inputs, 8)
_stacked(_inputs_backward, 10)
