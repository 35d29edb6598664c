"""Where each query stands, in one launch: `locate` of zoo/ops/reference_nsa.py (zoo/kernels/nsa.py)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.launch import on_device

TOKENS = 1024  # of a program


def locate(
    q: Tensor, select: int, limit: int, cu_seqlens: Tensor | None, query_start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """place, first_key and first_block of Places, (B,T) int32."""
    place, first_key, first_block = (torch.empty(q.shape[:2], dtype=torch.int32, device=q.device) for _ in range(3))
    if place.numel() == 0:
        return place, first_key, first_block
    packed, start = (None if x is None else x.contiguous() for x in (cu_seqlens, query_start))
    with on_device(q):
        _locate[triton.cdiv(place.numel(), TOKENS),](
            packed, start, place, first_key, first_block, q.shape[1], place.numel(),
            0 if packed is None else packed.shape[0] - 1, max(limit - 1, 0), SELECT=select, BLOCK_N=TOKENS,
            num_warps=4,
        )  # fmt: skip
    return place, first_key, first_block


@triton.jit(do_not_specialize=["T", "total", "documents", "last"])
def _locate(
    cu_ptr, start_ptr, place_ptr, first_key_ptr, first_block_ptr, T, total, documents, last,
    SELECT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = at < total
    token = at % T
    first, document = at * 0, at * 0
    if cu_ptr is not None:
        beyond = document + documents  # the last document that begins at the token or before it lies below this one
        left = documents
        while left > 1:
            middle = (document + beyond) // 2
            below = tl.load(cu_ptr + middle) <= token
            document, beyond = tl.where(below, middle, document), tl.where(below, beyond, middle)
            left = (left + 1) // 2
        first = tl.load(cu_ptr + document)
        place = token - first
    else:
        place = token
        if start_ptr is not None:
            place += tl.load(start_ptr + at // T, mask=inside, other=0)
        place = tl.minimum(place, last)
    tl.store(place_ptr + at, place, mask=inside)
    tl.store(first_key_ptr + at, first, mask=inside)
    tl.store(first_block_ptr + at, first // SELECT + document, mask=inside)
