"""Who `zoo bench kernels` measures, and on what: shapes, random inputs, and each peer's call on them.

A peer is imported when it is made, so that one that is not installed is left out by name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import ops
from zoo.mixers.base import visible_pairs

TILE = 64
Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    tokens: int
    head_dim: int
    window: int

    def flops(self, pairs: int) -> float:
        return 4.0 * self.batch * self.heads * self.head_dim * pairs

    @property
    def exact(self) -> float:
        return self.flops(visible_pairs(self.tokens, self.window))

    @property
    def tiled(self) -> float:
        return self.flops(tile_pairs(self.tokens, self.window))

    def __str__(self) -> str:
        return f"B{self.batch} H{self.heads} T{self.tokens} D{self.head_dim} W{self.window}"


def tile_pairs(tokens: int, window: int, tile: int = TILE) -> int:
    """Pairs in the tile x tile blocks that hold at least one visible pair."""
    touched = 0
    for first in range(0, tokens, tile):
        last = min(first + tile, tokens) - 1
        touched += last // tile - max(0, first - window + 1) // tile + 1
    return touched * tile * tile


@dataclass(frozen=True)
class Inputs:
    """q, k, v, dout (B, T, H, D) bf16 and log_decay (B, T, H) float32, random; gates as a trained model has them."""

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    log_decay: Tensor

    @classmethod
    def random(cls, shape: Shape, seed: int = 0) -> "Inputs":
        generator = torch.Generator("cuda").manual_seed(seed)
        size = (shape.batch, shape.tokens, shape.heads, shape.head_dim)
        tensors = [torch.randn(size, device="cuda", generator=generator).bfloat16() for _ in range(4)]
        z = 4 + torch.randn(size[:3], device="cuda", generator=generator)
        q, k, v = (x.requires_grad_() for x in tensors[:3])
        return cls(shape, q, k, v, tensors[3], F.logsigmoid(z).requires_grad_())


@dataclass(frozen=True)
class Peer:
    """`make(inputs)` gives (a forward call, the tensors to differentiate, dout in the peer's layout). It may raise
    ImportError, or Skip for a shape that the peer does not do."""

    name: str
    gated: bool
    make: Callable[[Inputs], tuple[Call, list[Tensor], Tensor]]


class Skip(Exception):
    pass


def ours(
    gated: bool, prune: float | None = None, closer: float = 0, document: int | None = None
) -> Callable[[Inputs], tuple[Call, list, Tensor]]:
    """closer: how much lower than those of Inputs (normal around 4) the gates' pre-activations are. document: the rows
    of a batch are one after another, in documents of so many tokens."""

    def make(x: Inputs) -> tuple[Call, list[Tensor], Tensor]:
        decay = x.log_decay if gated else None
        if decay is not None and closer:
            z = decay.detach() - torch.log(-torch.expm1(decay.detach().double())).float()  # logit of e^decay
            decay = F.logsigmoid(z - closer).requires_grad_()
        leaves = [x.q, x.k, x.v, *([] if decay is None else [decay])]
        options: dict[str, Any] = {"window": x.shape.window, "prune": prune}
        if document is None:
            return partial(ops.window_attention, x.q, x.k, x.v, decay, **options), leaves, x.dout
        total = x.shape.batch * x.shape.tokens
        starts = [*range(0, total, document), total]
        options["cu_seqlens"] = torch.tensor(starts, dtype=torch.int32, device=x.q.device)

        def packed() -> Tensor:
            q, k, v = (t.flatten(0, 1)[None] for t in (x.q, x.k, x.v))
            return ops.window_attention(q, k, v, None if decay is None else decay.flatten(0, 1)[None], **options)

        return packed, leaves, x.dout.flatten(0, 1)[None]

    return make


def flash_attention_4(x: Inputs) -> tuple[Call, list[Tensor], Tensor]:
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]

    def call() -> Tensor:
        out = flash_attn_func(x.q, x.k, x.v, causal=True, window_size=(x.shape.window - 1, 0))
        return out[0] if isinstance(out, tuple) else out

    return call, [x.q, x.k, x.v], x.dout


def fla_forgetting(x: Inputs) -> tuple[Call, list[Tensor], Tensor]:
    from fla.ops.forgetting_attn import parallel_forgetting_attn  # type: ignore[import-not-found]

    def call() -> Tensor:
        return parallel_forgetting_attn(x.q, x.k, x.v, x.log_decay, window_size=x.shape.window)

    return call, [x.q, x.k, x.v, x.log_decay], x.dout


def by_head(x: Tensor) -> Tensor:
    return x.detach().transpose(1, 2).contiguous().requires_grad_(x.requires_grad)


def flex(gated: bool) -> Callable[[Inputs], tuple[Call, list[Tensor], Tensor]]:
    """torch.compile(flex_attention) with the key-side bias: what a user would write (SPEC.md 0.1)."""

    def make(x: Inputs) -> tuple[Call, list[Tensor], Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        window, tokens = x.shape.window, x.shape.tokens
        mask = create_block_mask(
            lambda b, h, i, j: (j <= i) & (i - j < window), None, None, tokens, tokens, _compile=True
        )
        q, k, v, dout = (by_head(t) for t in (x.q, x.k, x.v, x.dout))
        bias = (-x.log_decay.detach().cumsum(1)).transpose(1, 2).contiguous().requires_grad_(gated)
        score = (lambda s, b, h, i, j: s + bias[b, h, j]) if gated else None
        compiled = torch.compile(flex_attention)
        leaves = [q, k, v, *([bias] if gated else [])]
        return (lambda: compiled(q, k, v, score_mod=score, block_mask=mask)), leaves, dout

    return make


def sdpa(kind: str) -> Callable[[Inputs], tuple[Call, list[Tensor], Tensor]]:
    """Full causal attention, for scale: its own FLOPs are counted."""

    def make(x: Inputs) -> tuple[Call, list[Tensor], Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if x.shape.tokens > 65536:
            raise Skip("full attention over a million tokens")
        q, k, v, dout = (by_head(t) for t in (x.q, x.k, x.v, x.dout))

        def call() -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, kind)):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return call, [q, k, v], dout

    return make


PEERS = (
    Peer("zoo", True, ours(True)),
    Peer("zoo no gate", False, ours(False)),
    Peer("zoo pruned 1e-3, z 4", True, ours(True, 1e-3)),  # gates normal around z, deviation 1; all tiles are counted
    Peer("zoo pruned 1e-3, z 2", True, ours(True, 1e-3, closer=2)),
    Peer("zoo documents 1500", True, ours(True, document=1500)),  # as many pairs are counted as without
    Peer("flash-attention-4", False, flash_attention_4),
    Peer("fla forgetting", True, fla_forgetting),
    Peer("flex", True, flex(True)),
    Peer("flex no gate", False, flex(False)),
    Peer("cudnn full", False, sdpa("CUDNN_ATTENTION")),
    Peer("fa2 full", False, sdpa("FLASH_ATTENTION")),
)
