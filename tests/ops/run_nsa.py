"""Runs an NSACase of tests/ops/definition_nsa.py through the public function; reads the inverse index."""

from typing import Any

import torch
from torch import Tensor

from tests.ops.definition import relative_error
from tests.ops.definition_nsa import NSACase
from zoo.ops import nsa, nsa_attention


def run(case: NSACase, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """out and every gradient, named like those of `NSACase.expected`, on the tensors' device and in their dtype."""
    device = tensors["q"].device
    inputs = {name: x.detach().requires_grad_() for name, x in tensors.items() if name != "dout"}
    index = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens, dtype=torch.int32, device=device)
    out = nsa_attention(**inputs, **case.options, cu_seqlens=index)
    grads = torch.autograd.grad((out * tensors["dout"]).sum(), list(inputs.values()))
    return {"out": out.detach()} | {f"d{name}": x for name, x in zip(inputs, grads, strict=True)}


def spans(items: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of nsa_inverse.Items: (first, last, block) of each item in the order, as `item_of` computes them."""
    item = torch.nonzero(items.block < items.blocks).flatten()
    block = items.block[item].long()
    first = items.bounds[block] + (item - items.begin[block]) * items.each
    return first, torch.minimum(first + items.each, items.bounds[block + 1]), block


def selected_with_tile(kernel: str, dim: int, tile: tuple[int, ...]) -> float:
    """Largest relative difference between the selected branch of some bf16 queries with this tile and with the table's.

    On a CUDA device of sm_90, by the table's row of `dim`. For a process of its own: a kernel that faults ends it.
    """
    from zoo.kernels import nsa as kernels  # needs triton
    from zoo.kernels import nsa_selected

    tokens, kv_heads, group, block, top = 3000, 2, 16, 64, 16
    torch.manual_seed(0)
    q, dout = (torch.randn(1, tokens, kv_heads * group, dim, device="cuda").bfloat16() for _ in range(2))
    k, v = (torch.randn(1, tokens, kv_heads, dim, device="cuda").bfloat16() for _ in range(2))
    places = nsa._places(q, block, tokens, None, None)
    index = torch.rand(1, tokens, kv_heads, -(-tokens // block), device="cuda").topk(top).indices.int()

    def call() -> list[Tensor]:
        out, lse = kernels.selected_forward(q, k, v, index, places, block, 0.1)
        grads = kernels.selected_backward(dout, None, q, k, v, out, lse, index, places, block, 0.1)
        torch.cuda.synchronize()
        return [out, *grads]

    usual = call()
    nsa_selected.SM90[kernel][dim] = tile
    return max(relative_error(a, b.double()) for a, b in zip(call(), usual, strict=True))
