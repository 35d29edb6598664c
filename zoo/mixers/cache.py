"""Keys and values of the past, for attention mixers: a ring of `slots` tokens, or all of them when it never wraps.

Token p lives in slot p % slots. Where a token would still be visible when its slot is taken again (fewer slots than the
window, or no window), a row may not outgrow them: `check_room`. A gated cache keeps, per slot and query head, the
log-decay from that slot's token to the newest one (<= 0): a step adds its own log-decay to every slot and writes 0 in
the new one, so no prefix grows and precision does not depend on position.

    k, v    (B, slots, G, D)
    decay   (B, slots, H) float32 (float64 for a float64 cache), only with a gate
"""

from typing import Any

import torch
from torch import Tensor

from zoo import ops
from zoo.mixers.base import Context, Dims

Cache = dict[str, Any]


def init_cache(batch: int, slots: int, dims: Dims, gated: bool, *, device: Any, dtype: Any) -> Cache:
    shape = (batch, slots, dims.kv_heads, dims.head_dim)
    cache = {name: torch.zeros(shape, device=device, dtype=dtype) for name in ("k", "v")}
    if gated:
        wide = torch.promote_types(dtype, torch.float32)
        cache["decay"] = torch.zeros(batch, slots, dims.heads, device=device, dtype=wide)
    return cache


def cache_bytes(slots: int, dims: Dims, gated: bool, element_size: int) -> int:
    return slots * (
        2 * dims.kv_heads * dims.head_dim * element_size + (max(4, element_size) * dims.heads if gated else 0)
    )


def start_of(ctx: Context, like: Tensor) -> Tensor:
    """(B,) tokens that each row has seen before this call."""
    return ctx.start if ctx.start is not None else torch.zeros(like.shape[0], dtype=torch.int64, device=like.device)


def check_room(slots: int, start: Tensor, new: int | Tensor) -> None:
    """For a cache that may not wrap: raises ValueError when rows of `start` (B,) tokens get `new` more, an int or (B,),
    and one has then more than `slots`. Known from the shapes alone, or looked at where `ops.may_look` allows."""
    longest = new if isinstance(new, int) else 0
    if longest <= slots and start.numel() and ops.may_look(start):
        longest = int((start + new).max())
    if longest > slots:
        raise ValueError(
            f"a state for rows of at most max_len = {slots} tokens is given a row of {longest}: "
            "make it with the longest length that the rows will reach (init_cache)"
        )


def put_token(cache: Cache, k: Tensor | None, v: Tensor | None, log_decay: Tensor | None, start: Tensor) -> Tensor:
    """Write one token (k, v (B, 1, G, D), log_decay (B, 1, H)) in place, what the cache holds of it; returns live (B,)
    int32: slots [0, live) hold tokens."""
    rows = torch.arange(start.shape[0], device=start.device)
    slots = 0
    for name, token in (("k", k), ("v", v)):
        if token is not None and name in cache:
            slots = cache[name].shape[1]
            cache[name].index_put_((rows, start % slots), token[:, 0].to(cache[name].dtype))
    if log_decay is not None:
        slots = cache["decay"].shape[1]
        cache["decay"].add_(log_decay)
        cache["decay"].index_put_((rows, start % slots), cache["decay"].new_zeros(()))
    return (start + 1).clamp(max=slots).to(torch.int32)


def put(
    cache: Cache, k: Tensor | None, v: Tensor | None, log_decay: Tensor | None, start: Tensor, lengths: Tensor | None
) -> None:
    """`put_token` or `put_chunk`."""
    if lengths is None and all(x is None or x.shape[1] == 1 for x in (k, v, log_decay)):
        put_token(cache, k, v, log_decay, start)
    else:
        put_chunk(cache, k, v, log_decay, start, lengths)


def past_in_order(cache: Cache, start: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The last `count` tokens before `start`, oldest first: k, v (B, count, G, D), log_decay (B, count, H) or None, and
    key_start (B,) int32, how many leading places hold no token."""
    place = start.unsqueeze(1) - count + torch.arange(count, device=start.device)  # (B, count), negative: no token
    k, v = (take(cache[name], place % cache[name].shape[1]) for name in ("k", "v"))
    key_start = (count - start).clamp(min=0).to(torch.int32)
    if "decay" not in cache:
        return k, v, None, key_start
    # decay(p) sums the log-decays after p, so a token's own is the step between neighbours; the oldest one's has no
    # effect on any visible pair.
    to_now = take(cache["decay"], place % cache["decay"].shape[1])
    own = torch.zeros_like(to_now)
    own[:, 1:] = to_now[:, :-1] - to_now[:, 1:]
    own = torch.where((place > 0).unsqueeze(-1), own, 0).clamp(max=0)
    return k, v, own, key_start


def put_chunk(
    cache: Cache, k: Tensor | None, v: Tensor | None, log_decay: Tensor | None, start: Tensor, lengths: Tensor | None
) -> None:
    """Write the first `lengths` (B,) of T tokens (k, v (B, T, G, D), log_decay (B, T, H)) in place, as far as the cache
    holds them; None: all T, which touches no other slot."""
    if lengths is None:
        _put_whole_chunk(cache, k, v, log_decay, start)
        return
    for name, chunk in (("k", k), ("v", v)):
        if chunk is not None and name in cache:
            fresh, source = _landing(cache[name].shape[1], chunk.shape[1], start, lengths)
            landed = take(chunk, source).to(cache[name].dtype)
            cache[name].copy_(torch.where(fresh[..., None, None], landed, cache[name]))
    if log_decay is not None:
        fresh, source = _landing(cache["decay"].shape[1], log_decay.shape[1], start, lengths)
        valid = torch.arange(log_decay.shape[1], device=start.device) < lengths.unsqueeze(1)
        suffix = torch.where(valid.unsqueeze(-1), log_decay, 0).flip(1).cumsum(1).flip(1)  # own one included
        after = (suffix - torch.where(valid.unsqueeze(-1), log_decay, 0)).clamp(max=0)
        kept = cache["decay"] + suffix[:, :1]
        cache["decay"].copy_(torch.where(fresh.unsqueeze(-1), take(after, source), kept))


def _put_whole_chunk(cache: Cache, k: Tensor | None, v: Tensor | None, log_decay: Tensor | None, start: Tensor) -> None:
    def write(name: str, chunk: Tensor) -> None:
        slots, tokens = cache[name].shape[1], chunk.shape[1]
        kept = min(slots, tokens)
        place = start.unsqueeze(1) + torch.arange(tokens - kept, tokens, device=start.device)
        rows = torch.arange(start.shape[0], device=start.device).unsqueeze(1)
        cache[name].index_put_((rows, place % slots), chunk[:, tokens - kept :].to(cache[name].dtype))

    for name, chunk in (("k", k), ("v", v)):
        if chunk is not None and name in cache:
            write(name, chunk)
    if log_decay is not None:
        suffix = log_decay.flip(1).cumsum(1).flip(1)  # own one included
        cache["decay"].add_(suffix[:, :1])
        write("decay", (suffix - log_decay).clamp(max=0))


def _landing(slots: int, tokens: int, start: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """For every slot, whether one of the chunk's tokens lands in it, and the newest that does; (B, slots)."""
    newest = (start + lengths).unsqueeze(1) - 1  # (B, 1)
    lands = newest - (newest - torch.arange(slots, device=start.device)) % slots - start.unsqueeze(1)
    return lands >= 0, lands.clamp(min=0, max=tokens - 1)


def take(x: Tensor, place: Tensor) -> Tensor:
    """x (B, S, …) at place (B, N) -> (B, N, …)."""
    if x.is_contiguous():  # whole tokens are copied at once: on a CPU 20 times as fast as gathering elements
        first = torch.arange(x.shape[0], device=x.device).unsqueeze(1) * x.shape[1]
        rows = x.flatten(0, 1).index_select(0, (first + place).flatten())
        return rows.view(*place.shape, *x.shape[2:])
    place = place.reshape(*place.shape, *(1,) * (x.dim() - 2)).expand(*place.shape, *x.shape[2:])
    return x.gather(1, place)
