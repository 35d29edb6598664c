"""The operators' definition in scalar float64 loops, written from SPEC.md 1.3 and 1.4 and sharing no code with zoo."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def log_decay_loops(z: Tensor, u: Tensor) -> Tensor:
    """-softplus(-beta z) / (beta + 0.001), beta = 1 + elu(u), one element at a time."""
    values = []
    for z_i, u_i in zip(z.flatten(), u.flatten(), strict=True):
        beta = 1 + u_i if u_i > 0 else torch.exp(u_i)
        s = -beta * z_i
        softplus = s + torch.log1p(torch.exp(-s)) if s > 0 else torch.log1p(torch.exp(s))
        values.append(-softplus / (beta + 0.001))
    return torch.stack(values).view(z.shape)


def attention_loops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: list[int] | None = None,
    key_start: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """out and natural-log lse: for each row, head and query, a walk over the keys it sees, from itself backwards."""
    batch, length, heads, dim = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    out, lse = [], []
    for b in range(batch):
        for i in range(length):
            t = keys - length + i
            for h in range(heads):
                g = h // (heads // kv_heads)
                first = 0 if key_start is None else key_start[b]
                if cu_seqlens is not None:
                    first = max(start for start in cu_seqlens if start <= t)
                if window is not None:
                    first = max(first, t - window + 1)
                logits, values, bias = [], [], torch.zeros((), dtype=q.dtype)
                for j in range(t, first - 1, -1):
                    logits.append((q[b, i, h] * k[b, j, g]).sum() * scale + bias)
                    values.append(v[b, j, g])
                    if log_decay is not None:
                        bias = bias + log_decay[b, j, h]
                if not logits:
                    out.append(torch.zeros(dim, dtype=q.dtype))
                    lse.append(torch.tensor(-math.inf, dtype=q.dtype))
                    continue
                top = max(float(x.detach()) for x in logits)
                weights = [torch.exp(x - top) for x in logits]
                total = sum(weights, torch.zeros((), dtype=q.dtype))
                mixed = torch.zeros(dim, dtype=q.dtype)
                for weight, value in zip(weights, values, strict=True):
                    mixed = mixed + weight * value
                out.append(mixed / total)
                lse.append(torch.log(total) + top)
    return torch.stack(out).view(q.shape), torch.stack(lse).view(q.shape[:3])


@dataclass(frozen=True)
class Case:
    """One call: shapes, options, and which gate ("none", "log_decay", "fused")."""

    name: str
    queries: int
    window: int | None
    gate: str = "log_decay"
    keys: int | None = None  # as many as queries
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    dim: int = 8
    cu_seqlens: tuple[int, ...] | None = None
    key_start: tuple[int, ...] | None = None
    seed: int = field(default=0, compare=False)

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """q, k, v, then log_decay or z and u, then the gradients of out and lse: rounded to dtype, from one seed."""
        generator = torch.Generator().manual_seed(self.seed)
        keys = self.keys or self.queries

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        tensors = {
            "q": normal(self.batch, self.queries, self.heads, self.dim),
            "k": normal(self.batch, keys, self.kv_heads, self.dim),
            "v": normal(self.batch, keys, self.kv_heads, self.dim),
        }
        if self.gate == "log_decay":
            tensors["log_decay"] = -torch.rand(self.batch, keys, self.heads, generator=generator, dtype=torch.float64)
        if self.gate == "fused":
            tensors["z"] = 1 + normal(self.batch, keys, self.heads)
            tensors["u"] = 0.5 * normal(self.batch, keys, self.heads)
        tensors["dout"] = normal(self.batch, self.queries, self.heads, self.dim)
        tensors["dlse"] = normal(self.batch, self.queries, self.heads)
        return {name: x.to(dtype) for name, x in tensors.items()}

    def expected(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """out, lse and every gradient by the loops, in float64, for exactly these tensors."""
        inputs = {name: x.double().requires_grad_() for name, x in tensors.items() if name not in ("dout", "dlse")}
        decay = log_decay_loops(inputs["z"], inputs["u"]) if self.gate == "fused" else inputs.get("log_decay")
        out, lse = attention_loops(
            inputs["q"], inputs["k"], inputs["v"], decay, window=self.window,
            cu_seqlens=None if self.cu_seqlens is None else list(self.cu_seqlens),
            key_start=None if self.key_start is None else list(self.key_start),
        )  # fmt: skip
        loss = (out * tensors["dout"].double()).sum()
        if self.gate != "fused":  # gated_window_attention returns no lse
            loss = loss + (lse * tensors["dlse"].double())[lse > -math.inf].sum()
        grads = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)
        grads = {f"d{name}": x for name, x in zip(inputs, grads, strict=True)}
        return {"out": out.detach(), "lse": lse.detach()} | grads


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected value (over 1 if all are 0). Infinities must agree."""
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite), "infinite or NaN in other places"
    error = (actual.double() - expected)[finite].abs()
    size = expected[finite].abs()
    top = float(size.max()) if size.numel() else 0.0
    return float(error.max()) / (top if top > 1e-9 else 1.0) if error.numel() else 0.0


def root_mean_square_error(actual: Tensor, expected: Tensor) -> float:
    """Of the error, over that of the expected values (over 1 if all are 0)."""
    error, size = ((x.double().square().mean().sqrt()) for x in (actual.double() - expected, expected))
    return float(error) / (float(size) if size > 1e-9 else 1.0)


def is_negligible(first, q, k, log_decay, *, window, scale, prune) -> bool:
    """Whether the newest key tile that each query tile drops, tile first - 1 of 64 positions, obeys the rule in
    zoo/ops/prune.py, in float64: older ones then do too. For each query head that shares the tiles; (B,G,tiles)."""
    (_, length, heads, _), keys = q.shape, k.shape[1]
    k_norm = k.double().norm(dim=-1).repeat_interleave(heads // k.shape[2], dim=2)
    q_norm = torch.zeros_like(k_norm)
    q_norm[:, keys - length :] = q.double().norm(dim=-1)
    first = first.long().repeat_interleave(heads // k.shape[2], dim=1)
    tiles = first.shape[2]
    limit = math.log(prune / min(keys, window or keys))
    padded = torch.zeros(q.shape[0], 64 * tiles, heads, dtype=torch.float64, device=q.device)
    sums = [padded.clone() for _ in range(3)]
    for x, y in zip(sums, (log_decay.double(), q_norm, q_norm * k_norm), strict=True):
        x[:, :keys] = y
    gates, largest, product = (x.unflatten(1, (tiles, 64)).movedim(3, 1) for x in sums)  # (B,H,tiles,64)
    room = abs(scale) * (k_norm.amax(1)[..., None] * largest.amax(3) + product.amax(3))
    through = gates.sum(3).cumsum(2)
    before = torch.nn.functional.pad(through, (1, 0))  # of tiles before each one
    between = before[..., :tiles] - before.gather(2, first)  # tiles first .. b - 1
    return bool((between + room < limit)[first > 0].all())
