"""Runs an NSACase of tests/ops/definition_nsa.py through the public function; reads the inverse index."""

from typing import Any

import torch
from torch import Tensor

from tests.ops.definition_nsa import NSACase
from zoo.ops import nsa_attention


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
