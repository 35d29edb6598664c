"""Compressed and selected attention in plain PyTorch: the path that CPUs run, float64 included (SPEC.md 5.1).

The same functions as `zoo.kernels.nsa`, on checked tensors and without autograd. The queries are walked in chunks,
so that no tensor grows with T times the number of keys or blocks: memory is linear in T.

Shapes: q (B,T,H,D); k, v (B,N,G,D); compressed keys and values (B,M,G,D); block_index (B,T,G,top) int32. R = H/G query
heads share one key/value head. Where a query stands is a `Places`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops.reference import accumulator

CHUNK_ELEMENTS = 1 << 21  # of the largest tensor of a chunk
SHORT = 3  # up to so many times the keys that a query chose, all keys are computed with and the others masked

Mask = Callable[[int, int], Tensor]  # for queries first .. last: the keys that each sees, (B, 1 or G, t, M) bool


@dataclass(frozen=True)
class Places:
    """Where each query stands, (B,T) int32 each; without packed documents the last two are zero.

    place        its position in its document: it sees that document's tokens 0 .. place
    first_key    where that document begins among the keys
    first_block  where its blocks begin among the places of blocks: block j of the document has place first_block + j,
                 its compressed blocks begin at first_block * (select // stride)
    documents    how many are packed; 0: they are not
    """

    place: Tensor
    first_key: Tensor
    first_block: Tensor
    documents: int = 0

    def slice(self, first: int, last: int) -> "Places":
        place, first_key, first_block = (x[:, first:last] for x in (self.place, self.first_key, self.first_block))
        return Places(place, first_key, first_block, self.documents)


@dataclass(frozen=True)
class Geometry:
    """Compressed block c covers tokens [c * stride, c * stride + block) of its document, selection block j
    [j * select, (j + 1) * select). `top` selection blocks are chosen, or none with 0. printed: a selection block's
    importance as the paper prints it, from compressed blocks that lie `shift` strides earlier (SPEC.md 5.1)."""

    block: int
    stride: int
    select: int
    top: int
    printed: bool = False

    @property
    def ratio(self) -> int:
        return self.select // self.stride

    @property
    def overlap(self) -> int:
        return self.block // self.stride

    @property
    def shift(self) -> int:
        return self.ratio - 1 if self.printed else 0

    def weights(self) -> dict[int, int]:
        """How often compressed block ratio * j + offset counts for selection block j: over m < ratio and n < overlap
        the offsets m - n, or -m - n as printed, which are the same sums `shift` earlier."""
        offsets = range(1 - self.overlap, self.ratio)
        return {o - self.shift: min(o + self.overlap, self.ratio - o, self.overlap, self.ratio) for o in offsets}

    def visible(self, place: Tensor) -> Tensor:
        """How many compressed blocks lie entirely at or before `place`."""
        return (torch.div(place + 1 - self.block, self.stride, rounding_mode="floor") + 1).clamp(min=0)


# ------------------------------------------------------------------------------------------------- compressed blocks


def locate(
    q: Tensor, select: int, limit: int, cu_seqlens: Tensor | None, query_start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """place, first_key and first_block of the T queries of each row; positions from `limit` on become the last one."""
    token = torch.arange(q.shape[1], device=q.device, dtype=torch.int32)
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens, token, right=True) - 1
        first = cu_seqlens[document]
        block = torch.div(first, select, rounding_mode="floor") + document
        place, first_key, first_block = (x[None].int() for x in (token - first, first, block))
        return place, first_key, first_block
    place = token[None].expand(q.shape[0], -1)
    if query_start is not None:
        place = place + query_start[:, None]
    zero = torch.zeros_like(place)
    return place.clamp(max=max(limit - 1, 0)).contiguous(), zero, zero


def compressed_forward(
    q: Tensor, k: Tensor, v: Tensor, places: Places, geometry: Geometry, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """out like q, natural-log lse (B,T,H), block_index (B,T,G,top), ascending, -1 where fewer blocks exist."""
    index = torch.empty(*q.shape[:2], k.shape[2], geometry.top, dtype=torch.int32, device=q.device)

    def choose(first: int, last: int, p: Tensor) -> None:
        if geometry.top:
            index[:, first:last] = _choose(p.sum(2), places.slice(first, last), geometry).transpose(1, 2)

    out, lse = _masked_forward(q, k, v, _complete(k, places, geometry), scale, choose)
    return out, lse, index


def compressed_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    places: Places,
    geometry: Geometry,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; nothing flows through the choice."""
    return _masked_backward(dout, dlse, q, k, v, out, lse, _complete(k, places, geometry), scale)


def _complete(k: Tensor, places: Places, geometry: Geometry) -> Mask:
    """Of the compressed keys: those whose block is over and of the query's document."""
    slot = torch.arange(k.shape[1], device=k.device)

    def visible(first: int, last: int) -> Tensor:
        here = places.slice(first, last)
        lowest = (here.first_block * geometry.ratio)[..., None]
        return ((slot >= lowest) & (slot < lowest + geometry.visible(here.place)[..., None]))[:, None]

    return visible


def _choose(importance: Tensor, places: Places, geometry: Geometry) -> Tensor:
    """Compressed blocks' probabilities (B,G,t,M) to the chosen blocks (B,G,t,top)."""
    ratio, weights = geometry.ratio, geometry.weights()
    count, before = -(-importance.shape[-1] // ratio), -min(weights)
    padded = F.pad(importance, (before, count * ratio - importance.shape[-1] + ratio))
    score = sum(weight * padded[..., before + o :: ratio][..., :count] for o, weight in weights.items())
    assert isinstance(score, Tensor)
    block = torch.arange(count, device=importance.device) - places.first_block[..., None]  # (B,t,count)
    own = torch.div(places.place, geometry.select, rounding_mode="floor")[..., None]
    free = (block >= 1) & (block <= own - 2)
    score = score.masked_fill(~free[:, None], -1)
    best, slot = score.sort(dim=-1, descending=True, stable=True)
    chosen = (slot - places.first_block[:, None, :, None]).masked_fill(best < 0, -1)[..., : geometry.top - 3]
    forced = torch.cat((own, own - 1, torch.where(own >= 2, 0, -1)), -1)  # -1: there is no such block
    chosen = torch.cat((chosen, forced[:, None].expand(*chosen.shape[:3], 3)), -1)
    chosen = F.pad(chosen, (0, geometry.top - chosen.shape[-1]), value=-1)
    none = torch.iinfo(torch.int32).max
    ordered = chosen.masked_fill(chosen < 0, none).sort(-1).values
    return ordered.masked_fill(ordered == none, -1).int()


# --------------------------------------------------------------------------------------------------- selected blocks


def selected_forward(
    q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, places: Places, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """out like q and natural-log lse (B,T,H)."""
    batch, length, heads, dim = q.shape
    wide, kv_heads = accumulator(q.dtype), k.shape[2]
    if _is_short(k, block_index, block):
        return _masked_forward(q, k, v, _chosen(k, block_index, places, block), scale)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((batch, length, heads), dtype=wide)
    keys, values = (_by_head(x, wide).flatten(0, 2) for x in (k, v))
    for first, last in _chunks(length, batch * kv_heads * block_index.shape[3] * block * max(dim, heads // kv_heads)):
        chosen, visible = _gather_index(block_index[:, first:last], places.slice(first, last), k, block)
        logits = _selected_logits(q[:, first:last], keys[chosen], visible, scale)
        row_lse = logits.logsumexp(-1)
        p = (logits - row_lse.masked_fill(row_lse == -torch.inf, 0)[..., None]).exp_()
        out[:, first:last] = torch.einsum("btgrn,btgnd->btgrd", p, values[chosen]).flatten(2, 3)
        lse[:, first:last] = row_lse.flatten(2)
    return out, lse


def selected_mix_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    gates: Tensor,
    compressed: Tensor,
    window: Tensor,
    places: Places,
    block: int,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the three branches, and the selected one's out, of no tokens unless `keep`, and lse."""
    selected, lse = selected_forward(q, k, v, block_index, places, block, scale)
    return mix_forward(gates, (compressed, selected, window)), selected if keep else selected[:, :0].clone(), lse


def selected_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_index: Tensor,
    places: Places,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    if _is_short(k, block_index, block):
        return _masked_backward(dout, dlse, q, k, v, out, lse, _chosen(k, block_index, places, block), scale)
    batch, length, heads, dim = q.shape
    wide, kv_heads = accumulator(q.dtype), k.shape[2]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    keys, values = (_by_head(x, wide).flatten(0, 2) for x in (k, v))
    dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
    delta, lse = (x.unflatten(2, (kv_heads, -1)) for x in _rows(dout, dlse, out, lse, wide))
    for first, last in _chunks(length, batch * kv_heads * block_index.shape[3] * block * max(dim, heads // kv_heads)):
        chosen, visible = _gather_index(block_index[:, first:last], places.slice(first, last), k, block)
        near = keys[chosen]  # (B,t,G,n,D)
        p = _selected_logits(q[:, first:last], near, visible, scale)
        p = (p - lse[:, first:last, ..., None]).exp_()
        douts, queries = (x[:, first:last].to(wide).unflatten(2, (kv_heads, -1)) for x in (dout, q))
        ds = torch.einsum("btgrd,btgnd->btgrn", douts, values[chosen])
        ds = ds.sub_(delta[:, first:last, ..., None]).mul_(p).mul_(scale)
        dq[:, first:last] = torch.einsum("btgrn,btgnd->btgrd", ds, near).flatten(2, 3)
        place = chosen.flatten()
        dkeys.index_add_(0, place, torch.einsum("btgrn,btgrd->btgnd", ds, queries).flatten(0, 3))
        dvalues.index_add_(0, place, torch.einsum("btgrn,btgrd->btgnd", p, douts).flatten(0, 3))
    shape = (batch, kv_heads, k.shape[1], dim)
    dk, dv = (x.view(shape).transpose(1, 2).to(k.dtype).contiguous() for x in (dkeys, dvalues))
    return dq, dk, dv


def _is_short(k: Tensor, block_index: Tensor, block: int) -> bool:
    """Whether all the keys under a mask cost less than gathering the chosen ones (measured on a CPU)."""
    return k.shape[1] <= SHORT * block_index.shape[3] * block


def _chosen(k: Tensor, block_index: Tensor, places: Places, block: int) -> Mask:
    """Of all the keys: those at or before the query in a block that it chose."""
    key, count = torch.arange(k.shape[1], device=k.device), -(-k.shape[1] // block)
    listed = torch.where((block_index >= 0) & (block_index < count), block_index, count).long().transpose(1, 2)

    def visible(first: int, last: int) -> Tensor:
        here, some = places.slice(first, last), listed[:, :, first:last]
        taken = torch.zeros(*some.shape[:3], count + 1, dtype=torch.bool, device=k.device).scatter_(3, some, True)
        place = key - here.first_key[..., None]  # (B,t,N) of each key in the query's document
        seen = (place >= 0) & (place <= here.place[..., None])
        of_key = torch.div(place.clamp_(0), block, rounding_mode="floor")[:, None].expand(-1, some.shape[1], -1, -1)
        return taken.gather(3, of_key) & seen[:, None]

    return visible


def _gather_index(block_index: Tensor, places: Places, k: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Rows of the flattened (B*G*N, D) keys that each query reads, (B,t,G,top*block), and which of them it sees."""
    batch, _, kv_heads, _ = block_index.shape
    place = block_index.long()[..., None] * block + torch.arange(block, device=k.device)
    visible = (block_index[..., None] >= 0) & (place <= places.place[:, :, None, None, None])
    token = (place + places.first_key[:, :, None, None, None]).clamp(0, k.shape[1] - 1)
    row = torch.arange(batch * kv_heads, device=k.device).view(batch, 1, kv_heads, 1, 1) * k.shape[1]
    return (row + token).flatten(3), visible.flatten(3)


def _selected_logits(q: Tensor, near: Tensor, visible: Tensor, scale: float) -> Tensor:
    queries = q.to(near.dtype).unflatten(2, (near.shape[2], -1))
    logits = torch.einsum("btgrd,btgnd->btgrn", queries, near) * scale
    return logits.masked_fill_(~visible[..., None, :], -torch.inf)


# ------------------------------------------------------------------------------------------------- keys under a mask


def _masked_forward(
    q: Tensor, k: Tensor, v: Tensor, visible: Mask, scale: float, look: Callable[[int, int, Tensor], None] | None = None
) -> tuple[Tensor, Tensor]:
    """out like q and lse (B,T,H); `look` is shown each chunk's probabilities (B,G,R,t,M)."""
    batch, length, heads, _ = q.shape
    wide, kv_heads = accumulator(q.dtype), k.shape[2]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((batch, length, heads), dtype=wide)
    keys, values = _by_head(k, wide), _by_head(v, wide)
    for first, last in _chunks(length, batch * heads * keys.shape[2]):
        logits = _masked_logits(_grouped(q[:, first:last].to(wide), kv_heads), keys, visible(first, last), scale)
        top = logits.amax(-1, keepdim=True)
        p = logits.sub_(top.masked_fill(top == -torch.inf, 0)).exp_()  # (B,G,R,t,M); 0 in a row that sees nothing
        total = p.sum(-1, keepdim=True)
        p /= total.clamp_min(torch.finfo(wide).tiny)
        out[:, first:last] = torch.einsum("bgrtm,bgmd->btgrd", p, values).flatten(2, 3)
        lse[:, first:last] = total.log_().add_(top).squeeze(-1).permute(0, 3, 1, 2).flatten(2)
        if look is not None:
            look(first, last, p)
    return out, lse


def _masked_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    visible: Mask,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    batch, length, heads, _ = q.shape
    wide, kv_heads = accumulator(q.dtype), k.shape[2]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    keys, values = _by_head(k, wide), _by_head(v, wide)
    dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
    delta, lse = _rows(dout, dlse, out, lse, wide)
    for first, last in _chunks(length, batch * heads * keys.shape[2]):
        queries, douts = (_grouped(x[:, first:last].to(wide), kv_heads) for x in (q, dout))  # (B,G,R,t,D)
        p = _masked_logits(queries, keys, visible(first, last), scale)
        p = p.sub_(_grouped(lse[:, first:last], kv_heads)[..., None]).exp_()
        dvalues += torch.einsum("bgrtm,bgrtd->bgmd", p, douts)
        ds = torch.einsum("bgrtd,bgmd->bgrtm", douts, values)
        ds = ds.sub_(_grouped(delta[:, first:last], kv_heads)[..., None]).mul_(p).mul_(scale)
        dkeys += torch.einsum("bgrtm,bgrtd->bgmd", ds, queries)
        dq[:, first:last] = torch.einsum("bgrtm,bgmd->btgrd", ds, keys).flatten(2, 3)
    dk, dv = (x[:, :, : k.shape[1]].transpose(1, 2).to(k.dtype).contiguous() for x in (dkeys, dvalues))
    return dq, dk, dv


def _masked_logits(queries: Tensor, keys: Tensor, visible: Tensor, scale: float) -> Tensor:
    """(B,G,R,t,M), -inf where not visible (B,1 or G,t,M)."""
    logits = torch.einsum("bgrtd,bgmd->bgrtm", queries, keys).mul_(scale)
    if visible.shape[-1] < keys.shape[2]:  # no keys at all, but for the row that `_by_head` adds
        visible = F.pad(visible, (0, keys.shape[2] - visible.shape[-1]))
    return logits.masked_fill_(~visible[:, :, None], -torch.inf)


# ------------------------------------------------------------------------------------------------------------ shared


def _chunks(length: int, elements: int) -> Iterator[tuple[int, int]]:
    """Ranges of queries; `elements` is what one query takes."""
    size = max(1, CHUNK_ELEMENTS // max(1, elements))
    for first in range(0, length, size):
        yield first, min(first + size, length)


def _by_head(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B,N,G,D) to contiguous (B,G,N,D); at least one row, which nobody sees."""
    x = x.to(dtype).transpose(1, 2).contiguous()
    return x if x.shape[2] else F.pad(x, (0, 0, 0, 1))


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(B,t,H,...) to (B,G,R,t,...)."""
    return x.unflatten(2, (kv_heads, -1)).movedim(1, 3)


def _rows(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """delta (B,T,H), and lse with +inf for rows that saw nothing, which makes their p zero."""
    delta = (out.to(wide) * dout.to(wide)).sum(-1)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    if dlse is not None:
        delta = delta - dlse.to(wide).masked_fill(lse == torch.inf, 0)
    return delta, lse


# ------------------------------------------------------------------------------------------------------ means of blocks


def pool_forward(tensors: Sequence[Tensor], block: int) -> list[Tensor]:
    """Of each (B,N,G,D) its (B,M,G,D): block c holds [c * block, (c + 1) * block), zeros beyond the last token. One
    block more than hold a token."""
    means = []
    for x in tensors:
        count = (x.shape[1] + 2 * block - 1) // block
        padded = F.pad(x, (0, 0, 0, 0, 0, count * block - x.shape[1])).unflatten(1, (count, block))
        means.append(padded.mean(2, dtype=accumulator(x.dtype)).to(x.dtype))
    return means


def pool_backward(dmeans: Sequence[Tensor], length: int, block: int) -> list[Tensor]:
    """dx (B,length,G,D) of each."""
    shares = [(x.to(accumulator(x.dtype)) / block).to(x.dtype) for x in dmeans]
    return [share.repeat_interleave(block, 1)[:, :length].contiguous() for share in shares]


# -------------------------------------------------------------------------------------------------- the sum of branches


def mix_forward(gates: Tensor, branches: Sequence[Tensor | None]) -> Tensor:
    """Of (B,T,H,D) weighted by gates (B,T,H,3), like the first that there is."""
    there = [(x, gates[..., i, None]) for i, x in enumerate(branches) if x is not None]
    kind = there[0][0].dtype
    (out, gate), *others = there
    out = out * gate.to(kind)
    for x, gate in others:
        out = torch.addcmul(out, x.to(kind), gate.to(kind))
    return out


def mix_backward(dout: Tensor, gates: Tensor, branches: Sequence[Tensor | None]) -> list[Tensor]:
    """dgates, and the gradients of the branches that there are."""
    dgates = torch.zeros_like(gates)
    grads = []
    for i, x in enumerate(branches):
        if x is not None:
            dgates[..., i] = (dout * x).sum(-1, dtype=accumulator(x.dtype))
            grads.append((dout * gates[..., i, None].to(dout.dtype)).to(x.dtype))
    return [dgates, *grads]
