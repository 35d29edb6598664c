"""Native Sparse Attention (Yuan et al., arXiv 2502.11089; SPEC.md 5) as operators: checks, custom ops, autograd.

    o_t = g_cmp Attn(q_t, compressed blocks) + g_slc Attn(q_t, chosen blocks) + g_win Attn(q_t, last `window` keys)

Each branch has a softmax of its own. `nsa_attention` composes `compressed_attention`, which also chooses the blocks,
`window_attention`, and what `selected_attention` and `mix_branches` compute as one operator; a log-decay, where there
is one, acts on the window alone (GatedFWA, 5.4).

Where public codes differ (SPEC.md 5.3) this one does so: compressed block c is visible iff it ends at or before the
query, (c + 1) * block <= t + 1; the first, the own and the previous block are always chosen and count among `top`; the
others by their probability summed over the query heads of a key/value head, of two equal ones the earlier; fewer blocks
than `top` means that all are chosen. A query that no compressed block is visible to gets zero from that branch.

Shapes: q (B,T,H,D); k, v (B,N,G,D), H a multiple of G; compressed keys and values (B,M,G,D).
"""

from typing import Any, Literal

import torch
from torch import Tensor

from zoo.ops import backend, reference
from zoo.ops.nsa_blocks import kernels, pool_each, runs_dense
from zoo.ops.reference_nsa import Geometry, Places
from zoo.ops.stacking import stack_rows
from zoo.ops.window import check_documents, check_index, window_attention

FORCED = 3  # blocks that are always chosen: the first, the previous, the own


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    branch_gates: Tensor,
    log_decay: Tensor | None = None,
    *,
    block: int = 64,
    top: int = 16,
    window: int = 512,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The three branches over one set of keys and values, weighted by branch_gates (B,T,H,3): compressed, selected,
    window. Compressed keys and values are means over `block` tokens.

    q (B,T,H,D); k, v (B,N,G,D): the queries are the last T of the N positions. log_decay (B,N,H) float32 <= 0 or None
    and `window` as in `window_attention`. top >= 3 chosen blocks. cu_seqlens (documents + 1,) int32 packs documents in
    one row (B = 1, N = T): blocks begin anew with each, nothing passes between them.

    Returns out like q. Differentiable once in q, k, v, branch_gates and log_decay; the choice of blocks is a constant.
    While `runs_dense` the selected branch is computed as the causal attention that it is.
    Raises ValueError naming the argument.
    """
    _check_qkv("k and v", q, k, v)
    if branch_gates.shape != (*q.shape[:3], 3):
        raise ValueError(f"branch_gates has shape {_shapes(branch_gates)}, it must be (B, T, H, 3) for q {_shapes(q)}")
    if k.shape[1] < q.shape[1]:
        raise ValueError(f"the queries are the last positions of the keys: T must be at most N, got {_shapes(q, k)}")
    if top < FORCED:
        raise ValueError(f"top is {top}: it must be at least {FORCED}, the first, previous and own block")
    _geometry(block, None, None, top)
    offset = k.shape[1] - q.shape[1]
    start = torch.full(q.shape[:1], offset, dtype=torch.int32, device=q.device) if offset else None
    options: dict[str, Any] = {"scale": scale, "cu_seqlens": cu_seqlens}
    compressed_k, compressed_v = pool_each([k, v], block, cu_seqlens=cu_seqlens)
    dense = runs_dense(k.shape[1], block, top)
    compressed, _, block_index = compressed_attention(
        q, compressed_k, compressed_v, block=block, top=0 if dense else top, query_start=start, **options
    )
    near = window_attention(q, k, v, log_decay, window=window, **options)
    if dense:
        return mix_branches(branch_gates, compressed, window_attention(q, k, v, **options), near)
    scale = _check_places(q, scale, cu_seqlens, start)
    branches = (branch_gates, compressed, near)
    keep = torch.is_grad_enabled()  # not x.requires_grad: under vmap a tensor does not tell
    return _selected_mix(q, k, v, block_index, *branches, block, scale, cu_seqlens, start, keep)[0]


def mix_branches(
    branch_gates: Tensor, compressed: Tensor | None, selected: Tensor | None, near: Tensor | None
) -> Tensor:
    """Sum of the branches (B,T,H,D) weighted by branch_gates (B,T,H,3), in the branches' dtype; None: no such branch.

    Differentiable once. Raises ValueError where there is no branch, or shapes don't fit.
    """
    branches = [x for x in (compressed, selected, near) if x is not None]
    if not branches:
        raise ValueError("there is no branch to mix: compressed, selected and near are None")
    shape = branches[0].shape
    if len(shape) != 4 or any(x.shape != shape for x in branches) or branch_gates.shape != (*shape[:3], 3):
        text = f"{_shapes(*branches)}, branch_gates {_shapes(branch_gates)}"
        raise ValueError(f"branches must be alike (B, T, H, D), branch_gates (B, T, H, 3), got {text}")
    return _mix_branches(branch_gates, compressed, selected, near)


def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = 64,
    stride: int | None = None,
    select: int | None = None,
    top: int = 16,
    importance: Literal["spatial", "printed"] = "spatial",
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    query_start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over compressed blocks, and the choice of blocks to look at in detail.

    k, v (B,M,G,D): block c stands for the tokens [c * stride, c * stride + block); the stride is `block` unless given
    and divides it. `select` is the size of the blocks that are chosen, `block` unless given, a multiple of stride that
    holds `block`; where it holds several its importance adds up what overlaps it ("spatial"), or, as Eq. 9 is printed,
    what lies select / stride - 1 strides earlier ("printed"; SPEC.md 5.1 shows why the first is what is meant). top = 0
    chooses nothing. With cu_seqlens blocks stand where `pool_blocks` puts them.
    query_start (B,) int32: position of each row's first query, 0 unless given (decoding, chunked prefill). Blocks
    that no query sees may be read all the same, past the last query too: k and v must be finite (0 x NaN = NaN).

    Returns out like q, the natural-log normaliser lse (B,T,H) (-inf, and out 0, where no block is visible) and
    block_index (B,T,G,top) int32: for each query its blocks, counted from its document's start, ascending, then -1.
    Differentiable once in q, k, v, through out and lse.
    Raises ValueError naming the argument. Values (cu_seqlens, query_start) are looked at on the CPU, and on other
    devices under ZOO_DEBUG=1 only.
    """
    _check_qkv("k and v", q, k, v)
    geometry = _geometry(block, stride, select, top)
    if importance not in ("spatial", "printed"):
        raise ValueError(f'importance is {importance!r}: it must be "spatial" or "printed"')
    scale, printed = _check_places(q, scale, cu_seqlens, query_start), importance == "printed"
    return _compressed_attention(
        q, k, v, geometry.block, geometry.stride, geometry.select, geometry.top, printed, scale, cu_seqlens, query_start
    )


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    *,
    block: int = 64,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    query_start: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Causal attention of each query over the tokens of its own blocks.

    block_index (B,T,G,top) int32: blocks of `block` tokens counted from the start of the query's document, each at most
    once (else the result is undefined), in any order; below 0, or later than the query's own block: none. The H/G query
    heads of a key/value head share them. query_start as in `compressed_attention`. Keys and values beyond a query
    have no weight but may be read, past the last query's place too: they must be finite (0 x NaN = NaN).

    Returns out like q (0 where a query has no block); with return_lse also lse (B,T,H). Differentiable once in q, k, v.
    Raises ValueError naming the argument, after a look at values as in `compressed_attention`; never at block_index's.
    """
    _check_qkv("k and v", q, k, v)
    if not block >= 1:
        raise ValueError(f"block is {block}: it must be at least 1")
    expected = (*q.shape[:2], k.shape[2])
    fits = block_index.dim() == 4 and block_index.shape[:3] == expected and block_index.shape[3] > 0
    if not fits or block_index.dtype != torch.int32:
        shape = f"{block_index.dtype} {tuple(block_index.shape)}"
        raise ValueError(
            f"block_index must be int32 (B, T, G, top) with (B, T, G) = {tuple(expected)}, top 1 or more, got {shape}"
        )
    if block_index.device != q.device:
        raise ValueError(f"block_index is on {block_index.device}, q on {q.device}: they must be on one device")
    scale = _check_places(q, scale, cu_seqlens, query_start)
    if cu_seqlens is not None and k.shape[1] != q.shape[1]:
        raise ValueError(f"cu_seqlens needs as many keys as queries, got {_shapes(q, k)}")
    out, lse = _selected_attention(q, k, v, block_index, block, scale, cu_seqlens, query_start)
    return (out, lse) if return_lse else out


# ------------------------------------------------------------------------------------------------------------ places


def _places(q: Tensor, select: int, limit: int, cu_seqlens: Tensor | None, query_start: Tensor | None) -> Places:
    """`limit`: positions from there on belong to the padding of a ragged row; they are treated as the last one."""
    place, first_key, first_block = kernels(q).locate(q, select, limit, cu_seqlens, query_start)
    return Places(place, first_key, first_block, 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1)


# --------------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("zoo::compressed_attention", mutates_args=())
def _compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    stride: int,
    select: int,
    top: int,
    printed: bool,
    scale: float,
    cu_seqlens: Tensor | None,
    query_start: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = Geometry(block, stride, select, top, printed)
    _check_values(q, _compressed_limit(k, geometry) - 1, cu_seqlens, query_start)
    places = _compressed_places(q, k, geometry, cu_seqlens, query_start)
    with torch.autocast(q.device.type, enabled=False):
        return kernels(q).compressed_forward(q, k, v, places, geometry, scale)


@_compressed_attention.register_fake
def _(q, k, v, block, stride, select, top, printed, scale, cu_seqlens, query_start):
    lse = q.new_empty(q.shape[:3], dtype=reference.accumulator(q.dtype))
    return q.new_empty(q.shape), lse, q.new_empty((*q.shape[:2], k.shape[2], top), dtype=torch.int32)


@torch.library.custom_op("zoo::compressed_attention_backward", mutates_args=())
def _compressed_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block: int,
    stride: int,
    select: int,
    scale: float,
    cu_seqlens: Tensor | None,
    query_start: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = Geometry(block, stride, select, 0)
    places = _compressed_places(q, k, geometry, cu_seqlens, query_start)
    with torch.autocast(q.device.type, enabled=False):
        return kernels(q).compressed_backward(dout, dlse, q, k, v, out, lse, places, geometry, scale)


@_compressed_attention_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, block, stride, select, scale, cu_seqlens, query_start):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_compressed(ctx, inputs, output) -> None:
    q, k, v, block, stride, select, _, _, scale, cu_seqlens, query_start = inputs
    out, lse, block_index = output
    ctx.mark_non_differentiable(block_index)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, query_start)
    ctx.options = block, stride, select, scale
    ctx.set_materialize_grads(False)


def _backward_compressed(ctx, dout: Tensor | None, dlse: Tensor | None, _):
    q, k, v, out, lse, cu_seqlens, query_start = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    grads = _compressed_attention_backward(dout, dlse, q, k, v, out, lse, *ctx.options, cu_seqlens, query_start)
    return *grads, None, None, None, None, None, None, None, None


_compressed_attention.register_autograd(_backward_compressed, setup_context=_save_compressed)
stack_rows(_compressed_attention, packed=9)
stack_rows(_compressed_attention_backward, packed=11)


@torch.library.custom_op("zoo::selected_attention", mutates_args=())
def _selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block: int,
    scale: float,
    cu_seqlens: Tensor | None,
    query_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _check_values(q, k.shape[1], cu_seqlens, query_start)
    places = _places(q, block, k.shape[1], cu_seqlens, query_start)
    with torch.autocast(q.device.type, enabled=False):
        return kernels(q).selected_forward(q, k, v, block_index, places, block, scale)


@_selected_attention.register_fake
def _(q, k, v, block_index, block, scale, cu_seqlens, query_start):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=reference.accumulator(q.dtype))


@torch.library.custom_op("zoo::selected_attention_backward", mutates_args=())
def _selected_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_index: Tensor,
    block: int,
    scale: float,
    cu_seqlens: Tensor | None,
    query_start: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    places = _places(q, block, k.shape[1], cu_seqlens, query_start)
    with torch.autocast(q.device.type, enabled=False):
        return kernels(q).selected_backward(dout, dlse, q, k, v, out, lse, block_index, places, block, scale)


@_selected_attention_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, block_index, block, scale, cu_seqlens, query_start):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_selected(ctx, inputs, output) -> None:
    q, k, v, block_index, block, scale, cu_seqlens, query_start = inputs
    ctx.save_for_backward(q, k, v, *output, block_index, cu_seqlens, query_start)
    ctx.options = block, scale
    ctx.set_materialize_grads(False)


def _backward_selected(ctx, dout: Tensor | None, dlse: Tensor | None):
    q, k, v, out, lse, block_index, cu_seqlens, query_start = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    grads = _selected_attention_backward(
        dout, dlse, q, k, v, out, lse, block_index, *ctx.options, cu_seqlens, query_start
    )
    return *grads, None, None, None, None, None


_selected_attention.register_autograd(_backward_selected, setup_context=_save_selected)
stack_rows(_selected_attention, packed=6)
stack_rows(_selected_attention_backward, packed=10)


@torch.library.custom_op("zoo::mix_branches", mutates_args=())
def _mix_branches(gates: Tensor, compressed: Tensor | None, selected: Tensor | None, near: Tensor | None) -> Tensor:
    branches = (compressed, selected, near)
    return kernels(_first(branches)).mix_forward(gates, branches)


@_mix_branches.register_fake
def _(gates, compressed, selected, near):
    first = _first((compressed, selected, near))
    return first.new_empty(first.shape)


@torch.library.custom_op("zoo::mix_branches_backward", mutates_args=())
def _mix_branches_backward(
    dout: Tensor, gates: Tensor, compressed: Tensor | None, selected: Tensor | None, near: Tensor | None
) -> list[Tensor]:
    return kernels(dout).mix_backward(dout, gates, (compressed, selected, near))


@_mix_branches_backward.register_fake
def _(dout, gates, compressed, selected, near):
    return [x.new_empty(x.shape) for x in (gates, compressed, selected, near) if x is not None]


def _save_mix(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward_mix(ctx, dout: Tensor):
    inputs = ctx.saved_tensors
    grads = iter(_mix_branches_backward(dout, *inputs))
    return tuple(None if x is None else next(grads) for x in inputs)


_mix_branches.register_autograd(_backward_mix, setup_context=_save_mix)
stack_rows(_mix_branches)
stack_rows(_mix_branches_backward)


@torch.library.custom_op("zoo::selected_mix", mutates_args=())
def _selected_mix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    gates: Tensor,
    compressed: Tensor,
    near: Tensor,
    block: int,
    scale: float,
    cu_seqlens: Tensor | None,
    query_start: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_mix_branches` where `_selected_attention` writes: the selected branch is not read again, and not written unless
    a backward will want it (`keep`)."""
    _check_values(q, k.shape[1], cu_seqlens, query_start)
    places = _places(q, block, k.shape[1], cu_seqlens, query_start)
    with torch.autocast(q.device.type, enabled=False):
        return kernels(q).selected_mix_forward(
            q, k, v, block_index, gates, compressed, near, places, block, scale, keep
        )


@_selected_mix.register_fake
def _(q, k, v, block_index, gates, compressed, near, block, scale, cu_seqlens, query_start, keep):
    kept = q.shape if keep else (q.shape[0], 0, *q.shape[2:])
    lse = q.new_empty(q.shape[:3], dtype=reference.accumulator(q.dtype))
    return q.new_empty(q.shape), q.new_empty(kept), lse


def _save_selected_mix(ctx, inputs, output) -> None:
    q, k, v, block_index, gates, compressed, near, block, scale, cu_seqlens, query_start, _ = inputs
    _, selected, lse = output
    ctx.mark_non_differentiable(selected, lse)
    ctx.save_for_backward(q, k, v, block_index, gates, compressed, near, selected, lse, cu_seqlens, query_start)
    ctx.options = block, scale
    ctx.set_materialize_grads(False)


def _backward_selected_mix(ctx, dout: Tensor, _, __):
    q, k, v, block_index, gates, compressed, near, selected, lse, cu_seqlens, query_start = ctx.saved_tensors
    dgates, dcompressed, dselected, dnear = _mix_branches_backward(dout, gates, compressed, selected, near)
    grads = _selected_attention_backward(
        dselected, None, q, k, v, selected, lse, block_index, *ctx.options, cu_seqlens, query_start
    )
    return *grads, None, dgates, dcompressed, dnear, None, None, None, None, None


_selected_mix.register_autograd(_backward_selected_mix, setup_context=_save_selected_mix)
stack_rows(_selected_mix, packed=9)


def _first(branches: tuple[Tensor | None, ...]) -> Tensor:
    return next(x for x in branches if x is not None)


def _compressed_places(
    q: Tensor, k: Tensor, geometry: Geometry, cu_seqlens: Tensor | None, query_start: Tensor | None
) -> Places:
    return _places(q, geometry.select, _compressed_limit(k, geometry), cu_seqlens, query_start)


def _compressed_limit(k: Tensor, geometry: Geometry) -> int:
    """The first position that would see a block beyond the last."""
    return k.shape[1] * geometry.stride + geometry.block


# -------------------------------------------------------------------------------------------------------- the checks


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)


def _check_qkv(names: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    if not (q.dim() == k.dim() == v.dim() == 4) or k.shape != v.shape:
        raise ValueError(f"q must be (B, T, H, D), {names} alike and (B, N, G, D), got {_shapes(q, k, v)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{names} must have the B and D of q, got {_shapes(q, k, v)}")
    if q.shape[3] < 1 or k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads, {names} {k.shape[2]}: the first must be a multiple of the second")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"q, k, v must be of one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k, v must be on one device, got {q.device}, {k.device}, {v.device}")


def _geometry(block: int, stride: int | None, select: int | None, top: int) -> Geometry:
    stride, select = stride or block, select or block
    if block < 1 or stride < 1 or block % stride or select % stride or select < block:
        raise ValueError(
            f"block {block}, stride {stride}, select {select}: stride must divide both, and block be at most select"
        )
    if top and top < FORCED:
        raise ValueError(
            f"top is {top}: it must be at least {FORCED}, the first, previous and own block, or 0 for none"
        )
    return Geometry(block, stride, select, top)


def _check_places(q: Tensor, scale: float | None, cu_seqlens: Tensor | None, query_start: Tensor | None) -> float:
    """The scale to use, once the rest is in order."""
    if cu_seqlens is not None and query_start is not None:
        raise ValueError("cu_seqlens and query_start can't be given together")
    for name, index in (("cu_seqlens", cu_seqlens), ("query_start", query_start)):
        if index is not None:
            check_index(name, index, q)
    if cu_seqlens is not None and q.shape[0] != 1:
        raise ValueError(f"cu_seqlens packs documents in one row: it needs B = 1, got q {_shapes(q)}")
    if query_start is not None and query_start.shape[0] != q.shape[0]:
        raise ValueError(f"query_start has shape {_shapes(query_start)}, it must be (B,) = ({q.shape[0]},)")
    return q.shape[3] ** -0.5 if scale is None else float(scale)


def _check_values(q: Tensor, last: int, cu_seqlens: Tensor | None, query_start: Tensor | None) -> None:
    """What only the values tell, as `window_attention` looks at them. last: where a row's queries may begin at most."""
    if not backend.may_look(q):
        return
    if cu_seqlens is not None:
        check_documents(cu_seqlens, q.shape[1])
    if query_start is not None and bool(((query_start < 0) | (query_start > last)).any()):
        raise ValueError(f"query_start must lie between 0 and {last}, got {query_start.tolist()[:8]}")
