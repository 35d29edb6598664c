"""Runs an NSACase of tests/ops/definition_nsa.py through the public function."""

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
