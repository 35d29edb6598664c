"""Cases of `attention_inputs`, and what it, `swiglu` and `add_norm` stand for, step by step, in torch's operations."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from zoo.layers import apply_rotary, token_shift
from zoo.ops import rotary_table


@dataclass(frozen=True)
class QkvCase:
    name: str
    batch: int = 2
    tokens: int = 37
    width: int = 24
    gates: int = 4
    heads: int = 3
    kv_heads: int = 3
    dim: int = 8
    norm: str = "full"
    rotary: bool = True
    own_positions: bool = False  # a table for each row
    documents: tuple[int, ...] = ()  # where they begin

    def __str__(self) -> str:
        return self.name


CASES = [
    QkvCase("plain"),
    QkvCase("per_head", norm="head", heads=6, kv_heads=2),
    QkvCase("groups", heads=4, kv_heads=1, dim=16, tokens=70, gates=3),
    QkvCase("no_norm", norm="none"),
    QkvCase("no_rotary", rotary=False),
    QkvCase("no_gates", gates=0),
    QkvCase("documents", batch=1, tokens=65, documents=(0, 1, 30, 32, 64)),
    QkvCase("own_positions", own_positions=True, dim=12, tokens=33),
    QkvCase("one_token", tokens=1),
]


def plain_swiglu(packed):
    value, gate = packed.chunk(2, dim=-1)
    return F.silu(gate) * value


def plain_add_norm(h, branch, weight, eps=1e-6):
    """In the precision of the sum's dtype and of weight's, whichever is wider."""
    total = h + branch
    wide = torch.promote_types(total.dtype, weight.dtype)
    return total, F.rms_norm(total.to(wide), weight.shape, weight.to(wide), eps).to(h.dtype)


def norm_results(function, shape, dtype, device="cpu", *, kind=None, sum_used=True, seed=0):
    """The sum, its norm, and the gradients of h, branch and weight; `kind`: computed in this dtype instead."""
    generator = torch.Generator().manual_seed(seed)
    h, branch, *grads = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(4)
    )
    weight = 1 + 0.3 * torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    weight = weight.to(device, torch.promote_types(dtype, torch.float32))
    leaves = [x.to(kind or x.dtype).requires_grad_() for x in (3 * h, branch, weight)]
    total, normed = function(*leaves)
    outputs = (total, normed) if sum_used else (normed,)
    grads = [x.to(total.dtype) for x in grads[-len(outputs) :]]
    return [x.detach() for x in (total, normed, *torch.autograd.grad(outputs, leaves, grads))]


def plain_inputs(x, weight, keep, heads, *, gates=None, bias=None, norms=None, table=None, starts=None, eps=1e-6):
    """`attention_inputs`, one step after the other."""
    wide = torch.promote_types(x.dtype, torch.float32)
    kv_heads = keep.shape[0] // 2
    qkv = F.linear(x, weight.to(x.dtype)).unflatten(-1, (heads + 2 * kv_heads, -1))
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)
    pre = x.new_empty((*x.shape[:2], 0), dtype=wide) if gates is None else F.linear(x.to(wide), gates.to(wide))
    pre = pre if bias is None else pre + bias.to(wide)
    keep_k, keep_v = F.linear(x.to(wide), keep.to(wide)).sigmoid().chunk(2, dim=-1)
    k, v = token_shift(k, keep_k, starts=starts), token_shift(v, keep_v, starts=starts)

    def normalise(x, weight):
        wide = torch.promote_types(x.dtype, weight.dtype)
        whole = x if weight.numel() == x.shape[-1] else x.flatten(2)
        return F.rms_norm(whole.to(wide), weight.shape, weight.to(wide), eps).view(x.shape)

    if norms is not None:
        q, k = normalise(q, norms[0]), normalise(k, norms[1])
    if table is not None:
        q, k = apply_rotary(q, table), apply_rotary(k, table)
    return q.to(v.dtype), k.to(v.dtype), v, pre


def input_tensors(case, dtype, device="cpu", seed=0):
    """(leaves by name, other options, gradients of q, k, v and gates). Weights are float32, or float64 with that."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape, dtype=wide):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    heads, dim, rows = case.heads + 2 * case.kv_heads, case.dim, (case.batch, case.tokens)
    sizes = (dim, dim) if case.norm == "head" else (case.heads * dim, case.kv_heads * dim)
    norms = () if case.norm == "none" else tuple((1 + 0.3 * normal(n)).requires_grad_() for n in sizes)
    places = torch.arange(case.tokens, device=device).expand(case.batch if case.own_positions else 1, -1)
    if case.own_positions:
        places = places + 100 * torch.arange(case.batch, device=device)[:, None]
    starts = None
    if case.documents:
        starts = torch.zeros(case.tokens, dtype=torch.bool, device=device)
        starts[list(case.documents)] = True
    share = case.width**-0.5
    leaves = {
        "x": normal(*rows, case.width, dtype=dtype).requires_grad_(),
        "weight": (share * normal(heads * dim, case.width)).requires_grad_(),
        "keep": (2 * share * normal(2 * case.kv_heads, case.width)).requires_grad_(),
        **({"gates": (share * normal(case.gates, case.width)).requires_grad_()} if case.gates else {}),
        **({"bias": normal(case.gates).requires_grad_()} if case.gates > 3 else {}),
        **dict(zip(("q_norm", "k_norm"), norms, strict=bool(norms))),
    }
    options = {"table": rotary_table(places, dim, 100.0) if case.rotary else None, "starts": starts}
    grads = [normal(*rows, n, dim, dtype=dtype) for n in (case.heads, case.kv_heads, case.kv_heads)]
    return leaves, options, [*grads, normal(*rows, case.gates)]


def input_results(function, case, tensors, kind=None):
    """q, k, v, gates, and the gradients of all leaves; `kind`: computed in this dtype instead."""
    leaves, options, grads = tensors
    leaves = {name: x.detach().to(kind or x.dtype).requires_grad_() for name, x in leaves.items()}
    found = called(function, case, leaves, options)
    found, grads = ([y for y, g in zip(y, grads, strict=True) if g.numel()] for y in (found, grads))
    grads = [g.to(y.dtype) for g, y in zip(grads, found, strict=True)]
    return [x.detach() for x in (*found, *torch.autograd.grad(found, list(leaves.values()), grads))]


def called(function, case, leaves, options):
    norms = (leaves["q_norm"], leaves["k_norm"]) if "q_norm" in leaves else None
    arguments = (leaves["x"], leaves["weight"], leaves["keep"], case.heads)
    return function(*arguments, gates=leaves.get("gates"), bias=leaves.get("bias"), norms=norms, **options)
