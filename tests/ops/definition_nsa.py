"""Native Sparse Attention in scalar loops, written from SPEC.md 5.1 and sharing no code with zoo."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def softmax_mix(q: Tensor, keys: list[Tensor], values: list[Tensor], scale: float, bias: list | None = None):
    """(out, probabilities) of one query over a list of keys; zero over none."""
    if not keys:
        return torch.zeros_like(q), []
    logits = [(q * key).sum() * scale for key in keys]
    if bias is not None:
        logits = [x + b for x, b in zip(logits, bias, strict=True)]
    top = max(float(x.detach()) for x in logits)
    weights = [torch.exp(x - top) for x in logits]
    total = sum(weights[1:], weights[0])
    out = torch.zeros_like(q)
    for weight, value in zip(weights, values, strict=True):
        out = out + weight / total * value
    return out, [float((weight / total).detach()) for weight in weights]


def chosen_blocks(
    probabilities: list[list[float]], t: int, block: int, stride: int, select: int, top: int, importance: str
) -> set[int]:
    """probabilities: for each head of the group those of the compressed blocks visible to token t."""
    own = t // select
    forced = {0, own} | ({own - 1} if own else set())
    score = {}
    for j in range(own + 1):
        if j in forced:
            continue
        score[j] = 0.0
        for m in range(select // stride):
            for n in range(block // stride):
                i = select // stride * j + (m if importance == "spatial" else -m) - n
                if 0 <= i < len(probabilities[0]):
                    score[j] += sum(p[i] for p in probabilities)
    ranked = sorted(score, key=lambda j: (-score[j], j))
    return forced | set(ranked[: top - 3])


def nsa_loops(
    q, k, v, branch_gates, log_decay=None, *,
    block, top, window, cu_seqlens=None, stride=None, select=None, importance="spatial",
):  # fmt: skip
    """out (B,T,H,D) with mean-pooled blocks, and the chosen blocks as sets by (row, token, kv head)."""
    stride, select = stride or block, select or block
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    group, scale = heads // kv_heads, 1 / math.sqrt(dim)
    bounds = [0, length] if cu_seqlens is None else list(cu_seqlens)
    outs, choice = {}, {}
    for b in range(batch):
        for first, last in zip(bounds, bounds[1:], strict=False):
            for t in range(last - first):
                for g in range(kv_heads):
                    past_k, past_v = k[b, first : first + t + 1, g], v[b, first : first + t + 1, g]
                    spans = [(s, s + block) for s in range(0, t + 1, stride) if s + block <= t + 1]
                    means_k, means_v = ([x[s:e].mean(0) for s, e in spans] for x in (past_k, past_v))
                    members = range(g * group, (g + 1) * group)
                    compressed, p = {}, []
                    for h in members:
                        compressed[h], weights = softmax_mix(q[b, first + t, h], means_k, means_v, scale)
                        p.append(weights)
                    blocks = chosen_blocks(p, t, block, stride, select, top, importance)
                    choice[b, first + t, g] = blocks
                    places = [i for j in sorted(blocks) for i in range(j * select, min((j + 1) * select, t + 1))]
                    near = range(max(0, t - window + 1), t + 1)
                    for h in members:
                        query, gates = q[b, first + t, h], branch_gates[b, first + t, h]
                        detail, _ = softmax_mix(query, [past_k[i] for i in places], [past_v[i] for i in places], scale)
                        bias = None
                        if log_decay is not None:
                            bias = [log_decay[b, first + i + 1 : first + t + 1, h].sum() for i in near]
                        local, _ = softmax_mix(query, [past_k[i] for i in near], [past_v[i] for i in near], scale, bias)
                        outs[b, first + t, h] = gates[0] * compressed[h] + gates[1] * detail + gates[2] * local
    return torch.stack([outs[place] for place in sorted(outs)]).view(q.shape), choice


@dataclass(frozen=True)
class NSACase:
    """One call of nsa_attention."""

    name: str
    tokens: int
    group: int = 4
    kv_heads: int = 1
    batch: int = 1
    dim: int = 8
    block: int = 4
    top: int = 4
    window: int = 6
    gated: bool = True
    cu_seqlens: tuple[int, ...] | None = None
    seed: int = field(default=0, compare=False)

    @property
    def options(self) -> dict:
        return {"block": self.block, "top": self.top, "window": self.window}

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        heads = self.group * self.kv_heads

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        tensors = {
            "q": 2 * normal(self.batch, self.tokens, heads, self.dim),
            "k": 2 * normal(self.batch, self.tokens, self.kv_heads, self.dim),
            "v": normal(self.batch, self.tokens, self.kv_heads, self.dim),
            "branch_gates": normal(self.batch, self.tokens, heads, 3).sigmoid(),
        }
        if self.gated:
            tensors["log_decay"] = -torch.rand(self.batch, self.tokens, heads, generator=generator, dtype=torch.float64)
        tensors["dout"] = normal(self.batch, self.tokens, heads, self.dim)
        return {name: x.to(dtype) for name, x in tensors.items()}

    def expected(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """out and every gradient by the loops, in float64, for exactly these tensors."""
        inputs = {name: x.double().requires_grad_() for name, x in tensors.items() if name != "dout"}
        out, _ = nsa_loops(**inputs, **self.options, cu_seqlens=self.cu_seqlens)
        grads = torch.autograd.grad((out * tensors["dout"].double()).sum(), list(inputs.values()))
        return {"out": out.detach()} | {f"d{name}": x for name, x in zip(inputs, grads, strict=True)}


CASES = [
    NSACase("group_1", 37, group=1, kv_heads=2),
    NSACase("group_4", 33, group=4, batch=2),
    NSACase("group_16", 26, group=16, block=3),
    NSACase("group_3", 30, group=3, gated=False),
    NSACase("below_one_block", 3),
    NSACase("one_token", 1, group=2),
    NSACase("below_top_blocks", 14, group=2),
    NSACase("block_5", 43, group=2, block=5, top=5, window=3),
    NSACase("top_3", 40, group=2, top=3),
    NSACase("documents", 60, group=2, cu_seqlens=(0, 0, 2, 27, 27, 28, 60)),
    NSACase("dim_20", 33, group=2, dim=20, kv_heads=2),
]
