"""NSA's blocks of tokens: how many suffice, gathered, and their means as operators (zoo/ops/nsa.py)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops import backend, reference
from zoo.ops.stacking import stack_rows


def kernels(q: Tensor) -> Any:
    return backend.choose("nsa", q.device, q.dtype, q.shape[3])


def runs_dense(keys: int, block: int, top: int) -> bool:
    """Whether the selected branch runs as dense causal attention: every block is chosen, so that both are the same."""
    return keys <= top * block


def pool_blocks(x: Tensor, block: int, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """Means over the blocks of `gather_blocks`, (B,N,G,D) to (B,M,G,D), summed in float32 at least. Differentiable once
    (packed documents: as often as wanted)."""
    return pool_each([x], block, cu_seqlens=cu_seqlens)[0]


def pool_each(tensors: list[Tensor], block: int, *, cu_seqlens: Tensor | None = None) -> list[Tensor]:
    """`pool_blocks` of one or two of one shape and dtype, in one launch where there are no documents."""
    if cu_seqlens is None:
        return _pool(tensors, block)
    blocks = [gather_blocks(x, block, cu_seqlens=cu_seqlens) for x in tensors]
    return [x.mean(2, dtype=reference.accumulator(x.dtype)).to(x.dtype) for x in blocks]


def gather_blocks(
    x: Tensor, block: int, stride: int | None = None, *, select: int | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The tokens of each block, (B,N,G,D) to (B,M,block,G,D): block c holds [c * stride, c * stride + block).

    The last ones are incomplete, filled up with zeros: nobody sees them, and M is never 0 or 1, for which torch.compile
    would make a graph of its own. With cu_seqlens the blocks of document i begin at place (cu_seqlens[i] // select + i)
    * (select // stride), a bound that is known without looking at the values; between documents there are zeros.
    """
    stride = stride or block
    if cu_seqlens is None:
        count = (x.shape[1] + 2 * stride - 1) // stride
        x = F.pad(x, (0, 0, 0, 0, 0, (count - 1) * stride + block - x.shape[1]))
        return x.unflatten(1, (count, block)) if stride == block else x.unfold(1, block, stride).movedim(-1, 2)
    select = select or block
    ratio, length, documents = select // stride, x.shape[1], cu_seqlens.shape[0] - 1
    place = torch.arange(ratio * _block_places(length, documents, select), device=x.device)
    bounds = cu_seqlens.long()
    base = (bounds[:-1] // select + torch.arange(documents, device=x.device)) * ratio
    document = torch.searchsorted(base, place, right=True) - 1
    first = bounds[document] + (place - base[document]) * stride
    complete = first + block <= bounds[document + 1]
    token = torch.where(complete[:, None], first[:, None] + torch.arange(block, device=x.device), 0)
    blocks = x[0].index_select(0, token.flatten()).view(1, *token.shape, *x.shape[2:])
    return blocks.masked_fill(~complete[None, :, None, None, None], 0)


def _block_places(length: int, documents: int, select: int) -> int:
    """Places for the selection blocks of `documents` packed documents, the incomplete last ones included."""
    return length // select + documents


# --------------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("zoo::pool_blocks", mutates_args=())
def _pool(tensors: list[Tensor], block: int) -> list[Tensor]:
    return kernels(tensors[0]).pool_forward(tensors, block)


@_pool.register_fake
def _(tensors, block):
    return [x.new_empty((x.shape[0], (x.shape[1] + 2 * block - 1) // block, *x.shape[2:])) for x in tensors]


@torch.library.custom_op("zoo::pool_blocks_backward", mutates_args=())
def _pool_backward(dmeans: list[Tensor], length: int, block: int) -> list[Tensor]:
    return kernels(dmeans[0]).pool_backward(dmeans, length, block)


@_pool_backward.register_fake
def _(dmeans, length, block):
    return [x.new_empty((x.shape[0], length, *x.shape[2:])) for x in dmeans]


def _save_pool(ctx, inputs, output) -> None:
    tensors, ctx.block = inputs
    ctx.length = tensors[0].shape[1]


def _backward_pool(ctx, dmeans: list[Tensor]):
    return _pool_backward(dmeans, ctx.length, ctx.block), None


_pool.register_autograd(_backward_pool, setup_context=_save_pool)
stack_rows(_pool)
stack_rows(_pool_backward)
