"""Gated sliding-window attention as an operator: checks, custom op, autograd (GatedFWA, SPEC.md 1.4).

    out_t = sum_j p_tj v_j,   p_t = softmax_j(scale * q_t . k_j + sum_{i=j+1..t} log_decay_i)

Every combination is one operator, `zoo::window_attention`: no gate is sliding-window attention, window None with a gate
the Forgetting Transformer, neither plain causal attention. B batch, T queries, N >= T keys, H query heads, G key/value
heads (H a multiple of G), D head dim.
"""

from typing import Any

import torch
from torch import Tensor

from zoo.ops import backend, reference
from zoo.ops.gate import check_gate
from zoo.ops.prune import kept_tiles
from zoo.ops.stacking import stack_rows


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    key_start: Tensor | None = None,
    prune: float | None = None,
) -> Any:
    """Causal attention over the last `window` keys, each logit lowered by what the gates between key and query forgot.

    q (B,T,H,D); k, v (B,N,G,D): the queries are the last T of the N positions.
    log_decay (B,N,H) float32 <= 0 (float64 with float64 q): the query's own gate counts, the key's own does not, so the
    first one never has an effect. None: no gate.
    window: number of visible keys, the token itself included. None: all earlier ones. scale: default D ** -0.5.
    cu_seqlens (documents + 1,) int32, from 0 to T: B = 1 and N = T, nothing passes from one document to the next;
    documents may be empty. key_start (B,) int32: each row's first valid key. Not both.
    prune: the share of its probability that a row may lose, above 0 and below 1. Tiles of keys which the gate has made
    that negligible are skipped, forward and backward: out moves by at most 2 prune max |v| (proof: zoo/ops/prune.py).
    Needs log_decay. None skips nothing.

    Returns out like q; with return_lse also the natural-log normaliser (B,T,H), float32 (float64 for float64 q). A
    query that sees no key gets out 0 and lse -inf. Differentiable once in q, k, v and log_decay, through out and lse.
    Raises ValueError naming the argument. Values (log_decay <= 0, cu_seqlens, key_start) are looked at on the CPU, and
    on other devices under ZOO_DEBUG=1 only.
    """
    _check_tensors(q, k, v)
    if log_decay is not None:
        _check_like_keys("log_decay", log_decay, q, k)
        if log_decay.dtype not in {torch.float32, reference.accumulator(q.dtype)}:
            allowed = "float32 or float64" if q.dtype == torch.float64 else "float32"
            raise ValueError(f"log_decay is {log_decay.dtype}: with q in {q.dtype} it must be {allowed}")
    scale = _check_options(q, k, window, scale, cu_seqlens, key_start)
    kept = _kept_tiles(q, k, _gate(log_decay, None, None), window, scale, prune)
    out, lse = _window_attention(q, k, v, log_decay, None, None, window, scale, cu_seqlens, key_start, *kept)
    return (out, lse) if return_lse else out


def gated_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    u: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: Tensor | None = None,
    prune: float | None = None,
) -> Tensor:
    """`window_attention(q, k, v, log_decay(z, u), ...)` with the gate computed in one pass and never stored.

    z, u (B,N,H): one float dtype, not necessarily q's. Differentiable in q, k, v, z and u. The rest as there.
    """
    _check_tensors(q, k, v)
    check_gate(z, u)
    _check_like_keys("z", z, q, k)
    scale = _check_options(q, k, window, scale, cu_seqlens, key_start)
    kept = _kept_tiles(q, k, (z, u), window, scale, prune)
    return _window_attention(q, k, v, None, z, u, window, scale, cu_seqlens, key_start, *kept)[0]


def _kept_tiles(
    q: Tensor, k: Tensor, gate: tuple[Tensor, ...], window: int | None, scale: float, prune: float | None
) -> tuple[Tensor | None, Tensor | None]:
    if prune is None:
        return None, None
    if not gate:
        raise ValueError("prune needs log_decay: without a gate no key is known to be negligible")
    if not 0 < prune < 1:
        raise ValueError(f"prune is {prune!r}: it is a share of the probability, above 0 and below 1, or None")
    return kept_tiles(q, k, gate, window=window, scale=scale, prune=prune) if q.numel() else (None, None)


# ------------------------------------------------------------------------------------------------------ the operator


@torch.library.custom_op("zoo::window_attention", mutates_args=())
def _window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    z: Tensor | None,
    u: Tensor | None,
    window: int | None,
    scale: float,
    cu_seqlens: Tensor | None,
    key_start: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _check_values(q, k, log_decay, cu_seqlens, key_start)
    kernels = backend.choose("window", q.device, q.dtype, q.shape[3])
    bounds = {"spans": _spans(k, cu_seqlens, key_start), "kept": _kept(first, last)}
    with torch.autocast(q.device.type, enabled=False):  # the op chooses its own dtypes, accumulators above all
        return kernels.window_forward(q, k, v, _gate(log_decay, z, u), window=window, scale=scale, **bounds)


@_window_attention.register_fake
def _(q, k, v, log_decay, z, u, window, scale, cu_seqlens, key_start, first, last):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=reference.accumulator(q.dtype))


@torch.library.custom_op("zoo::window_attention_backward", mutates_args=())
def _window_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    log_decay: Tensor | None,
    z: Tensor | None,
    u: Tensor | None,
    window: int | None,
    scale: float,
    cu_seqlens: Tensor | None,
    key_start: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
) -> list[Tensor]:
    """dq, dk, dv, then the gradients of log_decay, or of z and u."""
    kernels = backend.choose("window", q.device, q.dtype, q.shape[3])
    gate, bounds = _gate(log_decay, z, u), {"spans": _spans(k, cu_seqlens, key_start), "kept": _kept(first, last)}
    with torch.autocast(q.device.type, enabled=False):
        dq, dk, dv, dgate = kernels.window_backward(
            dout, dlse, q, k, v, out, lse, gate, window=window, scale=scale, **bounds
        )
    return [dq, dk, dv, *dgate]


@_window_attention_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, log_decay, z, u, window, scale, cu_seqlens, key_start, first, last):
    return [x.new_empty(x.shape) for x in (q, k, v, *_gate(log_decay, z, u))]


def _save(ctx, inputs, output) -> None:
    q, k, v, log_decay, z, u, window, scale, cu_seqlens, key_start, first, last = inputs
    ctx.save_for_backward(q, k, v, *output, log_decay, z, u, cu_seqlens, key_start, first, last)
    ctx.window, ctx.scale = window, scale
    ctx.set_materialize_grads(False)  # an lse that nobody used costs nothing


def _backward(ctx, dout: Tensor | None, dlse: Tensor | None):
    q, k, v, out, lse, log_decay, z, u, cu_seqlens, key_start, first, last = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, *dgate = _window_attention_backward(
        dout, dlse, q, k, v, out, lse, log_decay, z, u, ctx.window, ctx.scale, cu_seqlens, key_start, first, last
    )
    dlog_decay = dgate[0] if log_decay is not None else None
    dz, du = dgate if z is not None else (None, None)
    return dq, dk, dv, dlog_decay, dz, du, None, None, None, None, None, None


_window_attention.register_autograd(_backward, setup_context=_save)
stack_rows(_window_attention, packed=8)
stack_rows(_window_attention_backward, packed=12)


def _gate(log_decay: Tensor | None, z: Tensor | None, u: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(x for x in (log_decay, z, u) if x is not None)


def _spans(k: Tensor, cu_seqlens: Tensor | None, key_start: Tensor | None) -> reference.Bounds | None:
    if cu_seqlens is not None:
        return reference.document_spans(cu_seqlens, k.shape[1])
    return None if key_start is None else reference.key_start_spans(key_start, k.shape[1])


def _kept(first: Tensor | None, last: Tensor | None) -> reference.Bounds | None:
    return None if first is None or last is None else (first, last)


# -------------------------------------------------------------------------------------------------------- the checks


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise ValueError(f"q must be (B, T, H, D) and k, v (B, N, G, D), got {shapes}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"k and v must have one shape (B, N, G, D) with the B and D of q, got {shapes}")
    if k.shape[1] < q.shape[1]:
        raise ValueError(f"the queries are the last positions of the keys: T must be at most N, got {shapes}")
    if q.shape[3] < 1 or k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads, k and v {k.shape[2]}: the first must be a multiple of the second")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"q, k, v must be of one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k, v must be on one device, got {q.device}, {k.device}, {v.device}")


def _check_like_keys(name: str, gate: Tensor, q: Tensor, k: Tensor) -> None:
    expected = (k.shape[0], k.shape[1], q.shape[2])
    if gate.shape != expected:
        raise ValueError(f"{name} has shape {tuple(gate.shape)}, it must be (B, N, H) = {tuple(expected)}")
    if gate.device != q.device:
        raise ValueError(f"{name} is on {gate.device}, q on {q.device}: they must be on one device")


def _check_options(
    q: Tensor,
    k: Tensor,
    window: int | None,
    scale: float | None,
    cu_seqlens: Tensor | None,
    key_start: Tensor | None,
) -> float:
    """The scale to use, once the rest is in order."""
    if window is not None and (isinstance(window, bool) or not isinstance(window, int | torch.SymInt) or window < 1):
        raise ValueError(f"window is {window!r}: it must be an int >= 1 (the token itself counts) or None")
    if cu_seqlens is not None and key_start is not None:
        raise ValueError("cu_seqlens and key_start can't be given together: cut the documents at cu_seqlens instead")
    if cu_seqlens is not None:
        check_index("cu_seqlens", cu_seqlens, q)
        if q.shape[0] != 1 or k.shape[1] != q.shape[1]:
            raise ValueError(
                f"cu_seqlens packs documents in one row: it needs B = 1 and as many keys as queries, "
                f"got q {tuple(q.shape)} and k {tuple(k.shape)}"
            )
    if key_start is not None:
        check_index("key_start", key_start, q)
        if key_start.shape[0] != q.shape[0]:
            raise ValueError(f"key_start has shape {tuple(key_start.shape)}, it must be (B,) = ({q.shape[0]},)")
    return q.shape[3] ** -0.5 if scale is None else float(scale)


def check_index(name: str, index: Tensor, q: Tensor) -> None:
    if index.dtype != torch.int32 or index.dim() != 1 or index.shape[0] < min(1, q.shape[0]):
        raise ValueError(f"{name} must be a non-empty int32 vector, got {index.dtype} of shape {tuple(index.shape)}")
    if index.device != q.device:
        raise ValueError(f"{name} is on {index.device}, q on {q.device}: they must be on one device")


def _check_values(
    q: Tensor, k: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, key_start: Tensor | None
) -> None:
    """What only the values tell. Runs inside the operator: not while compiling, and off the CPU only when debugging."""
    if q.device.type != "cpu" and not backend.debug():
        return
    if log_decay is not None and log_decay.numel():
        low, high = (float(x) for x in log_decay.aminmax())
        if not (high <= 0 and low > -torch.inf):  # also false for NaN
            raise ValueError(f"log_decay must be finite and <= 0, it lies in [{low}, {high}]")
    if cu_seqlens is not None:
        check_documents(cu_seqlens, q.shape[1])
    if (
        key_start is not None
        and key_start.numel()
        and not 0 <= int(key_start.min()) <= int(key_start.max()) <= k.shape[1]
    ):
        raise ValueError(f"key_start must lie between 0 and N = {k.shape[1]}, got {key_start.tolist()[:8]}")


def check_documents(cu_seqlens: Tensor, length: int) -> None:
    """Looks at the values, so only where `_check_values` may."""
    first, last, steps = int(cu_seqlens[0]), int(cu_seqlens[-1]), cu_seqlens.diff()
    if first != 0 or last != length or bool((steps < 0).any()):
        raise ValueError(
            f"cu_seqlens must go from 0 to T = {length} and never fall, "
            f"it ends at {last} and begins {cu_seqlens.tolist()[:8]}"
        )
