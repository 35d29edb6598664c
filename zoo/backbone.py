"""Block and stack: hidden states in, hidden states out. No vocabulary, no domain.

Pre-norm residual blocks: h + mixer(norm(h)), then h + mlp(norm(h)); a norm at the end. A branch is added where the next
norm reads the sum: between blocks the stream is a pair, h and the branch that it still lacks. The layer pattern says
which mixer each layer uses: "gatedfwa*3, softmax" tiled over the depth.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo import config as configs
from zoo.config import Choice
from zoo.layers import MLP, PassOn, document_positions, init_normal
from zoo.mixers.base import Context, Dims, Mixer
from zoo.ops import add_norm, may_look, rotary_table
from zoo.registry import mixers, nearest
from zoo.state import State


@dataclass
class BackboneConfig:
    """A 0 stands for 'derived': kv_heads = heads, head_dim = width / heads, mlp_width = 8/3 width rounded up to 64.

    mixer          the mixer of every layer, or of those that the pattern names so
    other_mixers   configs of further mixers that the pattern names; one that is not listed has its defaults
    pattern        "" (all `mixer`), or names with repeats, "gatedfwa*3, softmax", tiled over the layers
    mlp            swiglu, gelu; identity adds the normalised stream to itself, as Zoology's models do; none
    positions      rotary (inside mixers), learned (added to the input, up to max_len) or none
    dropout        on both residual branches; drop_path drops whole branches per row, linearly more with depth
    checkpoint     recompute blocks in the backward pass instead of keeping their activations
    init_std       spread of the matrices and learned positions at the start; a mixer may begin with one of its own
    residual       the dtype of the residual stream: that of the parameters, or under autocast autocast's, as the
                   branches have it: half the memory traffic around the norms, and sums rounded once a branch
    mlp_chunk      tokens that the MLP takes at once when training, recomputing them in the backward pass: its inner
                   activations never stand for a whole long row. 0: all at once
    """

    width: int = 256
    depth: int = 4
    heads: int = 4
    kv_heads: int = 0
    head_dim: int = 0
    mixer: Choice | None = configs.choice(mixers, "gatedfwa")
    other_mixers: list[Choice] = configs.choices(mixers)
    pattern: str = ""
    mlp: Literal["swiglu", "gelu", "identity", "none"] = "swiglu"
    mlp_width: int = 0
    positions: Literal["rotary", "learned", "none"] = "rotary"
    rope_base: float = 10000.0
    max_len: int = 0
    dropout: float = 0.0
    drop_path: float = 0.0
    checkpoint: bool = False
    residual: Literal["parameters", "autocast"] = "parameters"
    mlp_chunk: int = 0
    norm_eps: float = 1e-6
    init_std: float = 0.02

    def __post_init__(self):
        for name in ("width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; it takes 1 or more")
        for name in ("kv_heads", "head_dim", "mlp_width", "max_len", "init_std"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}; it takes 0 or more")
        for name in ("rope_base", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}; it takes a number above 0")
        parse_pattern(self.pattern)
        kv_heads = self.kv_heads or self.heads
        if self.heads % kv_heads:
            raise ValueError(f"heads = {self.heads} is not a multiple of kv_heads = {kv_heads}")
        if not self.head_dim and self.width % self.heads:
            raise ValueError(f"width = {self.width} is not a multiple of heads = {self.heads}; or set head_dim")
        if self.mlp_chunk < 0:
            raise ValueError(f"mlp_chunk = {self.mlp_chunk}; it takes a number of tokens, or 0 for all at once")
        if self.positions == "rotary" and self.dims.head_dim % 2:
            raise ValueError(
                f"head_dim = {self.dims.head_dim}; rotary positions turn pairs, so it takes an even number"
            )
        if self.positions == "learned" and self.max_len < 1:
            raise ValueError(f"positions = 'learned' needs max_len, the longest sequence; got {self.max_len}")
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; it takes a number from 0 up to, not including, 1")

    @property
    def dims(self) -> Dims:
        kv_heads, head_dim = self.kv_heads or self.heads, self.head_dim or self.width // self.heads
        return Dims(self.width, self.heads, kv_heads, head_dim, self.init_std)

    def layers(self) -> list[Choice]:
        """One mixer choice per layer."""
        assert isinstance(self.mixer, Choice)
        known = {c.name: c for c in (*self.other_mixers, self.mixer)}
        names = parse_pattern(self.pattern) or [self.mixer.name]
        for name in names:
            if name not in known:
                known[name] = Choice(name, mixers.get(name).Config())
        return [known[names[i % len(names)]] for i in range(self.depth)]


def parse_pattern(pattern: str) -> list[str]:
    """'gatedfwa*3, softmax' -> ['gatedfwa', 'gatedfwa', 'gatedfwa', 'softmax']. Raises ValueError."""
    names: list[str] = []
    for part in filter(None, (part.strip() for part in pattern.split(","))):
        name, _, times = (piece.strip() for piece in part.partition("*"))
        if name not in mixers:
            raise ValueError(f"pattern {pattern!r} names an unknown mixer {name!r}{nearest(name, mixers)}")
        if times and not (times.isdigit() and int(times)):
            raise ValueError(f"pattern {pattern!r}: {part!r} should read name*count with a count of 1 or more")
        names += [name] * int(times or 1)
    return names


Stream = tuple[Tensor, Tensor | None]  # of hidden states: h and the branch that is still to be added to it


def whole(stream: Stream) -> Tensor:
    h, branch = stream
    return h if branch is None else h + branch


def norm_of_sum(stream: Stream, norm: nn.RMSNorm, narrow: bool) -> tuple[Tensor, Tensor]:
    """(h with its branch, that normalised). narrow: both in h's dtype, in one pass."""
    h, branch = stream
    if narrow and branch is not None:
        return add_norm(h, branch.to(h.dtype), norm.weight, norm.eps)  # type: ignore[arg-type]
    h = whole(stream)
    return (h, norm(h.to(norm.weight.dtype)).to(h.dtype)) if narrow else (h, norm(h))


class Block(nn.Module):
    """Stream in, stream out: the branch of the last part is left for the next norm to add."""

    def __init__(self, mixer: Mixer, config: BackboneConfig, drop_path: float):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mixer = mixer
        self.mlp_norm = self.mlp = None
        if config.mlp != "none":
            hidden = config.mlp_width or -(-8 * config.width // 3 // 64) * 64
            self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
            self.mlp = PassOn() if config.mlp == "identity" else MLP(config.width, hidden, config.mlp)
        self.mlp_chunk = config.mlp_chunk
        self.narrow = config.residual == "autocast"
        self.drop = residual_drop(config.dropout, drop_path)

    def forward(self, stream: Stream, ctx: Context, state: State | None = None) -> tuple[Stream, State | None]:
        h, x = norm_of_sum(stream, self.mixer_norm, self.narrow)
        if ctx.halo is None:
            y, state = self.mixer(x, ctx, state)
        else:
            y = self._mix_split_rows(x, ctx)
        stream = h, self.drop(y)
        if self.mlp is not None:
            h, y = self._feed_forward(stream)
            stream = h, self.drop(y)
        return stream, state

    def _mix_split_rows(self, x: Tensor, ctx: Context) -> Tensor:
        """Context parallelism: one exchange brings the tokens that the mixer reaches back to, from the rank before. It
        is their inputs that travel, not their keys, values and gates: any mixer of finite reach works, and mixing
        these few tokens a second time costs reach / T of the layer."""
        assert ctx.halo is not None
        reach = self.check_split_rows()
        tables = () if ctx.rotary is None else ctx.rotary
        assert ctx.positions is not None
        longer, positions, *rotary = ctx.halo(reach, x, ctx.positions, *tables)
        place = replace(ctx, positions=positions, rotary=(rotary[0], rotary[1]) if rotary else None, halo=None)
        y, _ = self.mixer(longer, place, None)
        return y[:, longer.shape[1] - x.shape[1] :]

    def check_split_rows(self) -> int:
        """The mixer's reach in tokens. Raises ValueError where it has none."""
        if self.mixer.reach is None:
            raise ValueError(
                f"a {type(self.mixer).__name__} layer sees the whole past, so its rows cannot be split between ranks: "
                "use windowed mixers (gatedfwa, swa), or train.parallel.context=1"
            )
        return self.mixer.reach

    def _feed_forward(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """h with its branch, and the MLP's."""
        assert self.mlp is not None
        assert self.mlp_norm is not None
        h, x = norm_of_sum(stream, self.mlp_norm, self.narrow)
        if isinstance(self.mlp, MLP) and self.mlp_chunk and self.training and x.shape[1] > self.mlp_chunk:
            return h, self.mlp(x, self.mlp_chunk)
        return h, self.mlp(x)


def to_whole(block: Block, h: Tensor, ctx: Context) -> Tensor:
    """The block with the sum at its end: what one recomputed block hands to the next is what is kept. A compiler that
    finds a sum between them would rather recompute it too, and with it the whole stack at once."""
    return whole(block((h, None), ctx)[0])


def residual_drop(dropout: float, drop_path: float) -> nn.Module:
    parts: list[nn.Module] = [nn.Dropout(dropout)] if dropout else []
    if drop_path:
        from timm.layers import DropPath  # imported where it is used: timm brings torchvision

        parts.append(DropPath(drop_path))
    return nn.Sequential(*parts)


class Backbone(nn.Module):
    """(B, T, C) -> (B, T, C)."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config = configs.build(BackboneConfig, config)
        dims, depth = config.dims, config.depth
        self.positions = nn.Embedding(config.max_len, config.width) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(
            Block(mixers.get(layer.name)(layer.config, dims), config, config.drop_path * i / max(1, depth - 1))
            for i, layer in enumerate(config.layers())
        )
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        init_normal((self.positions, *(block.mlp for block in self.blocks)), config.init_std)  # type: ignore[arg-type]

    def forward(self, h: Tensor, ctx: Context, cache: Any = None) -> tuple[Tensor, Any]:
        """With a cache (`init_cache`) the T tokens continue it; it is consumed and the next one returned."""
        ctx = self._place(h, ctx, cache)
        h = h.to(self.norm.weight.dtype)  # the sum of all layers is as wide as the weights, under autocast too
        if self.positions is not None:
            h = h + self.positions(ctx.positions)
        states = [None] * len(self.blocks) if cache is None else cache["blocks"]
        narrow = self.config.residual == "autocast"
        if narrow and torch.is_autocast_enabled(h.device.type):
            h = h.to(torch.get_autocast_dtype(h.device.type))
        stream: Stream = (h, None)
        for i, (block, state) in enumerate(zip(self.blocks, states, strict=True)):
            if self.config.checkpoint and self.training and state is None:
                stream = checkpoint(to_whole, block, stream[0], ctx, use_reentrant=False), None  # type: ignore[assignment]
            else:
                stream, states[i] = block(stream, ctx, state)
        if cache is not None:
            cache["position"] = cache["position"] + (h.shape[1] if ctx.lengths is None else ctx.lengths)
        return norm_of_sum(stream, self.norm, narrow)[1], cache

    def _place(self, h: Tensor, ctx: Context, cache: Any) -> Context:
        """The context with positions, start and rotary table filled in."""
        tokens = h.shape[1]
        if cache is not None and ctx.cu_seqlens is not None:
            raise ValueError(
                "cu_seqlens and a cache cannot be given together: a state continues one document a row; "
                "give the documents as rows, with ctx.lengths"
            )
        start = None if cache is None else cache["position"]
        positions = ctx.positions
        if positions is None:
            if ctx.cu_seqlens is not None:
                positions = document_positions(ctx.cu_seqlens, tokens).unsqueeze(0)
            else:
                positions = torch.arange(tokens, device=h.device).unsqueeze(0)
                if start is not None:
                    positions = positions + start.unsqueeze(1)
        if self.positions is not None:
            self._check_learned(tokens if start is None or not may_look(start) else int(start.max()) + tokens)
        rotary = None
        if self.config.positions == "rotary":
            rotary = rotary_table(positions, self.config.dims.head_dim, self.config.rope_base)
        return replace(ctx, positions=positions, start=start, rotary=rotary)

    def _check_learned(self, tokens: int) -> None:
        if tokens > self.config.max_len:
            raise ValueError(f"{tokens} tokens exceed max_len = {self.config.max_len} of the learned positions")

    def init_cache(self, batch: int, max_len: int, *, device: Any = None, dtype: Any = None) -> dict[str, Any]:
        """The state of `batch` rows before their first token: {"position": (B,) int64, "blocks": [State, …]}.

        max_len  the most tokens that a row will have, prompt and steps together; see Mixer.init_state for longer ones
        """
        if self.positions is not None:
            self._check_learned(max_len)
        weight = self.norm.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        return {
            "position": torch.zeros(batch, dtype=torch.int64, device=device),
            "blocks": [b.mixer.init_state(batch, max_len, device=device, dtype=dtype) for b in self.blocks],  # type: ignore[operator,union-attr]
        }

    def flops(self, tokens: int) -> int:
        """Forward FLOPs of one row, matmuls and exactly visible attention pairs."""
        per_block = (b.mixer.flops(tokens) + (b.mlp.flops(tokens) if b.mlp is not None else 0) for b in self.blocks)  # type: ignore[operator,union-attr]
        return sum(per_block)

    def state_bytes(self, tokens: int, element_size: int = 2) -> int:
        return sum(b.mixer.state_bytes(tokens, element_size) for b in self.blocks)  # type: ignore[operator,union-attr]
