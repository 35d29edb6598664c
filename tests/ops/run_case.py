"""Runs a Case of tests/ops/definition.py through the public functions."""

import torch
from torch import Tensor

from tests.ops.definition import Case
from zoo.ops import gated_window_attention, window_attention


def run(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """out, lse and every gradient, named like those of `Case.expected`, on the tensors' device and in their dtype."""
    device = tensors["q"].device
    inputs = {name: x.detach().requires_grad_() for name, x in tensors.items() if name not in ("dout", "dlse")}
    options = {"window": case.window}
    for name, index in (("cu_seqlens", case.cu_seqlens), ("key_start", case.key_start)):
        options[name] = None if index is None else torch.tensor(index, dtype=torch.int32, device=device)
    if case.gate == "fused":
        out = gated_window_attention(**inputs, **options)
        results, loss = {"out": out}, (out * tensors["dout"]).sum()
    else:
        out, lse = window_attention(**inputs, **options, return_lse=True)
        results = {"out": out, "lse": lse}
        loss = (out * tensors["dout"]).sum() + (lse * tensors["dlse"])[lse > -torch.inf].sum()
    grads = torch.autograd.grad(loss, list(inputs.values()))
    return {name: x.detach() for name, x in results.items()} | {
        f"d{name}": x for name, x in zip(inputs, grads, strict=True)
    }
