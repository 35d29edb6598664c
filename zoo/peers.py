"""Who `zoo bench kernels` measures, and on what: shapes, random inputs, and each peer's call on them.

A peer is imported when it is made, so that one that is not installed is left out by name.

    keep_config   of kernels that tune themselves when they first run: no tuning, one configuration
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
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
    """One call: `batch` rows of `tokens`. kv_heads: key/value heads, 0: as many as heads. document: the rows, one after
    another, are packed as documents of so many tokens, 0: they are not."""

    batch: int
    heads: int
    tokens: int
    head_dim: int
    window: int
    kv_heads: int = 0
    document: int = 0

    def flops(self, window: int | None) -> float:
        """Of the forward's two products on visible pairs, all rows."""
        whole, rest = divmod(self.batch * self.tokens, self.document or self.tokens)
        pairs = whole * visible_pairs(self.document or self.tokens, window) + visible_pairs(rest, window)
        return 4.0 * self.heads * self.head_dim * pairs

    @property
    def exact(self) -> float:
        return self.flops(self.window)

    @property
    def tiled(self) -> float:
        """The same on all pairs of the tiles that hold a visible one."""
        rows, tokens = (1, self.batch * self.tokens) if self.document else (self.batch, self.tokens)
        pairs = tile_pairs(tokens, self.window, document=self.document)
        return 4.0 * rows * self.heads * self.head_dim * pairs

    @property
    def bytes(self) -> int:
        """What the forward moves at least: q, k and v once, out and lse once."""
        kv = self.kv_heads or self.heads
        return self.batch * self.tokens * ((2 * self.heads + 2 * kv) * 2 * self.head_dim + 4 * self.heads)

    def __str__(self) -> str:
        text = f"B{self.batch} H{self.heads} T{self.tokens} D{self.head_dim} W{self.window}"
        grouped, packed = f" G{self.kv_heads}", f" documents of {self.document}"
        return text + grouped * bool(self.kv_heads) + packed * bool(self.document)


# The seven shapes of the published comparison, and a million tokens.
SHAPES = (
    Shape(16, 16, 4096, 64, 512),
    Shape(4, 16, 16384, 64, 512),
    Shape(4, 16, 16384, 64, 2048),
    Shape(4, 16, 16384, 128, 512),
    Shape(4, 16, 16384, 128, 2048),
    Shape(1, 16, 65536, 64, 512),
    Shape(1, 16, 65536, 128, 1024),
    Shape(1, 4, 1 << 20, 64, 512),
    Shape(1, 4, 1 << 20, 128, 512),
)
# What must cost no more than the like of it above: shared key/value heads, packed documents.
OTHERS = (
    Shape(4, 16, 16384, 128, 512, kv_heads=4),
    Shape(1, 16, 65536, 64, 512, document=1500),
    Shape(1, 16, 65536, 128, 1024, document=6000),
)
# A million tokens in rows of other lengths: what a token costs must not depend on it.
LENGTHS = tuple(
    Shape((1 << 20) // tokens, 4, tokens, dim, 512) for dim in (64, 128) for tokens in (1 << 14, 1 << 16, 1 << 18)
)
WINDOWS = tuple(Shape(4, 16, 16384, dim, window) for dim in (64, 128) for window in (128, 256, 1024, 4096))


def tile_pairs(tokens: int, window: int, tile: int = TILE, document: int = 0) -> int:
    """Pairs in the tile x tile blocks that hold at least one visible pair."""
    touched = 0
    for first in range(0, tokens, tile):
        last = min(first + tile, tokens) - 1
        begin = first // document * document if document else 0
        touched += last // tile - max(begin, first - window + 1) // tile + 1
    return touched * tile * tile


@dataclass(frozen=True)
class Inputs:
    """q, dout (B, T, H, D), k, v (B, T, G, D) bf16 and log_decay (B, T, H) float32, random; gates as a trained model
    has them. Of packed documents B is 1, and cu_seqlens (documents + 1,) int32 says where they begin."""

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    log_decay: Tensor
    cu_seqlens: Tensor | None = None

    @classmethod
    def random(cls, shape: Shape, seed: int = 0, device: str = "cuda") -> "Inputs":
        generator = torch.Generator(device).manual_seed(seed)
        rows = (1, shape.batch * shape.tokens) if shape.document else (shape.batch, shape.tokens)

        def normal(heads: int) -> Tensor:
            return torch.randn(*rows, heads, shape.head_dim, device=device, generator=generator).bfloat16()

        q, dout = normal(shape.heads).requires_grad_(), normal(shape.heads)
        k, v = (normal(shape.kv_heads or shape.heads).requires_grad_() for _ in range(2))
        z = 4 + torch.randn(*rows, shape.heads, device=device, generator=generator)
        starts = None
        if shape.document:
            begins = [*range(0, rows[1], shape.document), rows[1]]
            starts = torch.tensor(begins, dtype=torch.int32, device=device)
        return cls(shape, q, k, v, dout, F.logsigmoid(z).requires_grad_(), starts)


@dataclass(frozen=True)
class Peer:
    """`make(inputs)` gives (a forward call, the tensors to differentiate, dout in the peer's layout). It may raise
    ImportError, or Skip for a shape that the peer does not do.

    windowed   False: full attention, for scale
    by_shape   compiled for each shape, which takes long
    """

    name: str
    gated: bool
    make: Callable[[Inputs], tuple[Call, list[Tensor], Tensor]]
    windowed: bool = True
    by_shape: bool = False


class Skip(Exception):
    pass


def ours(gated: bool, prune: float | None = None, closer: float = 0) -> Callable[[Inputs], tuple[Call, list, Tensor]]:
    """closer: how much lower than those of Inputs (normal around 4) the gates' pre-activations are."""

    def make(x: Inputs) -> tuple[Call, list[Tensor], Tensor]:
        decay = x.log_decay if gated else None
        if decay is not None and closer:
            z = decay.detach() - torch.log(-torch.expm1(decay.detach().double())).float()  # logit of e^decay
            decay = F.logsigmoid(z - closer).requires_grad_()
        leaves = [x.q, x.k, x.v, *([] if decay is None else [decay])]
        options: dict[str, Any] = {"window": x.shape.window, "prune": prune, "cu_seqlens": x.cu_seqlens}
        return partial(ops.window_attention, x.q, x.k, x.v, decay, **options), leaves, x.dout

    return make


def from_pre_activations(x: Inputs) -> tuple[Call, list[Tensor], Tensor]:
    """The gate's activation too: z whose decay is that of `x`, but for a thousandth, where u is 0."""
    decay = x.log_decay.detach()
    z = (decay - torch.log(-torch.expm1(decay.double())).float()).requires_grad_()
    u = torch.zeros_like(z).requires_grad_()
    options: dict[str, Any] = {"window": x.shape.window, "cu_seqlens": x.cu_seqlens}
    return partial(ops.gated_window_attention, x.q, x.k, x.v, z, u, **options), [x.q, x.k, x.v, z, u], x.dout


def flash_attention_4(x: Inputs) -> tuple[Call, list[Tensor], Tensor]:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func  # type: ignore[import-not-found]

    options: dict[str, Any] = {"causal": True, "window_size": (x.shape.window - 1, 0)}
    if x.cu_seqlens is not None:
        lengths: dict[str, Any] = {f"cu_seqlens_{side}": x.cu_seqlens for side in "qk"}
        lengths |= {f"max_seqlen_{side}": x.shape.document for side in "qk"}

    def call() -> Tensor:
        if x.cu_seqlens is None:
            out = flash_attn_func(x.q, x.k, x.v, **options)
        else:
            out = flash_attn_varlen_func(x.q[0], x.k[0], x.v[0], **lengths, **options)
        return out[0] if isinstance(out, tuple) else out

    return call, [x.q, x.k, x.v], x.dout if x.cu_seqlens is None else x.dout[0]


def fla_forgetting(x: Inputs) -> tuple[Call, list[Tensor], Tensor]:
    from fla.ops.forgetting_attn import parallel_forgetting_attn  # type: ignore[import-not-found]

    starts = None if x.cu_seqlens is None else x.cu_seqlens.long()

    def call() -> Tensor:
        return parallel_forgetting_attn(x.q, x.k, x.v, x.log_decay, window_size=x.shape.window, cu_seqlens=starts)

    return call, [x.q, x.k, x.v, x.log_decay], x.dout


def keep_config(module: ModuleType, number: int) -> None:
    """Of each kernel of `module` that `triton.autotune` wraps its configuration `number` alone, the last one where it
    has fewer: it is compiled and not timed. Processes side by side so compile them all; a test of results needs one."""
    from triton.runtime import Autotuner

    for kernel in vars(module).values():
        while kernel is not None and not isinstance(kernel, Autotuner):
            kernel = getattr(kernel, "fn", None)  # triton.heuristics stands around it
        if kernel is not None:
            kernel.configs = kernel.configs[: number + 1][-1:]


def by_head(x: Tensor) -> Tensor:
    return x.detach().transpose(1, 2).contiguous().requires_grad_(x.requires_grad)


def flex(gated: bool) -> Callable[[Inputs], tuple[Call, list[Tensor], Tensor]]:
    """torch.compile(flex_attention) with the key-side bias: what a user would write (SPEC.md 0.1)."""

    def make(x: Inputs) -> tuple[Call, list[Tensor], Tensor]:
        from torch._functorch import config
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if x.shape.document:
            raise Skip("no mask of documents is built for it")
        torch.compiler.reset()  # compiled for this shape, as ours is; more than eight shapes would run uncompiled
        config.donated_buffer = False  # a backward pass that gives its inputs away cannot be timed twice
        window, tokens = x.shape.window, x.shape.tokens
        mask = create_block_mask(
            lambda b, h, i, j: (j <= i) & (i - j < window), None, None, tokens, tokens, _compile=True
        )
        q, k, v, dout = (by_head(t) for t in (x.q, x.k, x.v, x.dout))
        bias = (-x.log_decay.detach().cumsum(1)).transpose(1, 2).contiguous().requires_grad_(gated)
        score = (lambda s, b, h, i, j: s + bias[b, h, j]) if gated else None
        compiled = torch.compile(flex_attention, dynamic=False)
        leaves = [q, k, v, *([bias] if gated else [])]
        options: dict[str, Any] = {"score_mod": score, "block_mask": mask, "enable_gqa": bool(x.shape.kv_heads)}
        return (lambda: compiled(q, k, v, **options)), leaves, dout

    return make


def sdpa(kind: str) -> Callable[[Inputs], tuple[Call, list[Tensor], Tensor]]:
    """Full causal attention, for scale: its own FLOPs are counted."""

    def make(x: Inputs) -> tuple[Call, list[Tensor], Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if x.shape.tokens > 65536 or x.shape.document:
            raise Skip("full attention over a million tokens, or packed documents")
        q, k, v, dout = (by_head(t) for t in (x.q, x.k, x.v, x.dout))

        def call() -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, kind)):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=bool(x.shape.kv_heads))

        return call, [q, k, v], dout

    return make


PEERS = (
    Peer("zoo", True, ours(True)),
    Peer("zoo no gate", False, ours(False)),
    Peer("zoo pruned 1e-3, z 4", True, ours(True, 1e-3)),  # gates normal around z, deviation 1; all tiles are counted
    Peer("zoo pruned 1e-3, z 2", True, ours(True, 1e-3, closer=2)),
    Peer("zoo from z, u", True, from_pre_activations),
    Peer("flash-attention-4", False, flash_attention_4),
    Peer("fla forgetting", True, fla_forgetting),
    Peer("flex", True, flex(True), by_shape=True),
    Peer("flex no gate", False, flex(False), by_shape=True),
    Peer("cudnn full", False, sdpa("CUDNN_ATTENTION"), windowed=False),
    Peer("fa2 full", False, sdpa("FLASH_ATTENTION"), windowed=False),
)
