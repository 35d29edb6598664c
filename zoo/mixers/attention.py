"""Causal softmax attention with every switch of the family: window, gate, rotary, QK norm, token shift, GQA.

Four registered mixers differ in two switches; `nsa` and `gatedfwa_nsa` (zoo/mixers/nsa.py) attend in branches of their
own:

    |            | sees everything | sees `window` keys |
    | no gate    | softmax         | swa                |
    | gate       | fox             | gatedfwa           |

Gate (SPEC.md 1.3): z = x W_g + b, u = x W_beta, log-decay = -softplus(-beta z) / (beta + 1e-3), beta = 1 + elu(u), one
per token and query head. Order (SPEC.md 3.1): project, shift k and v, normalise q and k, rotate, attend.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo import ops
from zoo.layers import Linear, apply_rotary, document_starts, init_normal, token_shift
from zoo.mixers.base import Context, Dims, Mixer, visible_pairs
from zoo.mixers.cache import cache_bytes, check_room, init_cache, past_in_order, put_chunk, put_token, start_of, take
from zoo.state import State


@dataclass
class AttentionConfig:
    """Switches common to the family.

    rotary       rotate q and k when the backbone's positions are rotary
    qk_norm      RMS norm of q and k over the whole projection (the authors' reference), over each head, or none
    token_shift  blend each key and value with the one before it, by a learned gate
    """

    rotary: bool = True
    qk_norm: Literal["full", "head", "none"] = "full"
    token_shift: bool = False


def check_window(window: int) -> None:
    if window < 1:
        raise ValueError(f"window = {window}; it is the number of visible keys, the token itself included: 1 or more")


class Gate(nn.Module):
    """x (B, T, C) -> pre-activations z, u, each (B, T, H) float32.

    bias       `gate_bias` in configs, z at the start: 0 forgets half a token's past at once (the paper), 2 remembers
               about 8 tokens, 4 to 6 suit recall (SPEC.md section 6, 3)
    amplitude  `gate_amplitude` in configs, u at the start: 0 makes beta 1
    """

    def __init__(self, dims: Dims, bias: float, amplitude: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2 * dims.heads, dims.width))  # rows: W_g, then W_beta (zero at start)
        self.bias = nn.Parameter(torch.zeros(2 * dims.heads))
        with torch.no_grad():
            self.weight[: dims.heads].normal_(std=0.02)
            self.bias[: dims.heads] = bias
            self.bias[dims.heads :] = amplitude

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, u = ops.precise_linear(x, self.weight, self.bias).chunk(2, dim=-1)
        return z, u


class Attention(Mixer):
    def __init__(self, config: AttentionConfig, dims: Dims, *, window: int | None, gate: Gate | None, kv_sets: int = 1):
        """kv_sets: how many sets of G key/value heads are projected, shifted, normalised and rotated side by side."""
        super().__init__()
        if window is not None:
            check_window(window)
        self.config, self.dims, self.window = config, dims, window
        self.prune: float | None = None
        self.reach = None if window is None else window - 1 + config.token_shift
        self.kv_heads = kv_sets * dims.kv_heads
        queries, keys = dims.heads * dims.head_dim, self.kv_heads * dims.head_dim
        self.qkv = nn.Linear(dims.width, queries + 2 * keys, bias=False)
        self.out = Linear(queries, dims.width)
        self.shift = nn.Linear(dims.width, 2 * self.kv_heads, bias=False) if config.token_shift else None
        per_head = config.qk_norm == "head"
        self.q_norm = None if config.qk_norm == "none" else nn.RMSNorm(dims.head_dim if per_head else queries, eps=1e-6)
        self.k_norm = None if config.qk_norm == "none" else nn.RMSNorm(dims.head_dim if per_head else keys, eps=1e-6)
        self.gate = gate
        init_normal((self.qkv, self.out, self.shift), dims.init_std)

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        if self.shift is not None and state is None and self.dims.head_dim % 2 == 0:
            q, k, v, gate = self._prepare(x, ctx)
            return self.out(self._attend(q, k, v, gate, x, ctx).flatten(2)), None
        q, k, v = self._project(x)  # (B, T, H|G|G, D)
        if self.shift is not None:
            k, v = self._shift(x, k, v, ctx, state)
        q, k = self._normalise(q, self.q_norm), self._normalise(k, self.k_norm)
        if self.config.rotary and ctx.rotary is not None:
            q, k = apply_rotary(q, ctx.rotary), apply_rotary(k, ctx.rotary)
        q, k = q.to(v.dtype), k.to(v.dtype)  # rounded once, after norm and rotation
        if state is None:
            y = self._attend(q, k, v, None if self.gate is None else self.gate(x), x, ctx)
        else:
            y = self._continue(q, k, v, x, ctx, state)
        return self.out(y.flatten(2)), state

    # -- projections ---------------------------------------------------------------------------------------------------

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        packed = self.qkv(x).unflatten(-1, (self.dims.heads + 2 * self.kv_heads, self.dims.head_dim))
        q, k, v = packed.split((self.dims.heads, self.kv_heads, self.kv_heads), dim=2)
        return q, k, v

    def _prepare(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Whole rows, projected, shifted, normalised and rotated in one operator, and the gate."""
        assert self.shift is not None
        q, k, v, pre = ops.attention_inputs(
            x,
            self.qkv.weight,
            self.shift.weight,
            self.dims.heads,
            gates=None if self.gate is None else self.gate.weight,
            bias=None if self.gate is None else self.gate.bias,
            norms=None if self.q_norm is None or self.k_norm is None else (self.q_norm.weight, self.k_norm.weight),
            table=ctx.rotary if self.config.rotary else None,
            starts=None if ctx.cu_seqlens is None else document_starts(ctx.cu_seqlens, x.shape[1]),
        )
        if self.gate is None:
            return q, k, v, None
        z, u = pre.chunk(2, dim=-1)
        return q, k, v, (z, u)

    def _shift(self, x: Tensor, k: Tensor, v: Tensor, ctx: Context, state: Any) -> tuple[Tensor, Tensor]:
        assert self.shift is not None
        keep_k, keep_v = ops.precise_linear(x, self.shift.weight).sigmoid().chunk(2, dim=-1)
        starts = None if ctx.cu_seqlens is None else document_starts(ctx.cu_seqlens, x.shape[1])
        tails = (None, None) if state is None else (state["tail_k"], state["tail_v"])
        shifted = tuple(
            token_shift(y, keep, tail, starts) for y, keep, tail in ((k, keep_k, tails[0]), (v, keep_v, tails[1]))
        )
        if state is not None:
            for name, y in (("tail_k", k), ("tail_v", v)):
                state[name].copy_(self._last(y, state[name], ctx))
        return shifted[0], shifted[1]

    @staticmethod
    def _last(y: Tensor, before: Tensor, ctx: Context) -> Tensor:
        """Each row's last valid token of y (B, T, G, D); `before` (B, G, D) where the row has none in this call."""
        if ctx.lengths is None:
            return y[:, -1].to(before.dtype)
        last = take(y, (ctx.lengths - 1).clamp(min=0).unsqueeze(1))[:, 0].to(before.dtype)
        return torch.where((ctx.lengths > 0)[:, None, None], last, before)

    def _normalise(self, x: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        if norm is None:
            return x
        x = x.to(norm.weight.dtype)
        return norm(x) if self.config.qk_norm == "head" else norm(x.flatten(2)).view(x.shape)

    # -- attention -----------------------------------------------------------------------------------------------------

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, gate: tuple[Tensor, Tensor] | None, x: Tensor, ctx: Context
    ) -> Tensor:
        """gate: the pre-activations z and u of x, where there is one."""
        if gate is None:
            return ops.window_attention(q, k, v, window=self.window, cu_seqlens=ctx.cu_seqlens)
        z, u = gate
        return ops.gated_window_attention(
            q, k, v, z, u, window=self.window, cu_seqlens=ctx.cu_seqlens, prune=self.prune
        )

    def _continue(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: Context, state: Any) -> Tensor:
        """Attend to the cached past and to the call's own tokens, and add them to the cache."""
        tokens, start, slots = x.shape[1], start_of(ctx, x), state["k"].shape[1]
        if self.window is None or slots < self.window:
            check_room(slots, start, tokens if ctx.lengths is None else ctx.lengths)
        log_decay = None if self.gate is None else ops.log_decay(*self.gate(x))
        if tokens == 1 and ctx.lengths is None:
            live = put_token(state, k, v, log_decay, start)
            held = state["k"].dtype  # the cache may be kept in another dtype than the call computes in
            return ops.ring_attention(q.to(held), state["k"], state["v"], state.get("decay"), live).to(v.dtype)
        past = slots if self.window is None else min(self.window - 1, slots)
        past_k, past_v, past_decay, key_start = past_in_order(state, start, past)
        y = ops.window_attention(
            q,
            torch.cat((past_k.to(k.dtype), k), dim=1),
            torch.cat((past_v.to(v.dtype), v), dim=1),
            None if log_decay is None or past_decay is None else torch.cat((past_decay, log_decay), dim=1),
            window=self.window,
            key_start=key_start,
        )
        put_chunk(state, k, v, log_decay, start, ctx.lengths)
        return y

    # -- state and cost ------------------------------------------------------------------------------------------------

    def init_state(self, batch: int, max_len: int, *, device: Any, dtype: Any) -> State:
        slots = max_len if self.window is None else min(self.window, max_len)
        state = init_cache(batch, slots, self.dims, self.gate is not None, device=device, dtype=dtype)
        return state | self._init_tails(batch, device=device, dtype=dtype)

    def _init_tails(self, batch: int, *, device: Any, dtype: Any) -> dict[str, Any]:
        """What the token shift remembers: the last token's keys and values as projected."""
        names = () if self.shift is None else ("tail_k", "tail_v")
        shape = (batch, self.kv_heads, self.dims.head_dim)
        return {name: torch.zeros(shape, device=device, dtype=dtype) for name in names}

    def _tail_bytes(self, element_size: int) -> int:
        return 0 if self.shift is None else 2 * self.kv_heads * self.dims.head_dim * element_size

    def flops(self, tokens: int) -> int:
        pairs = visible_pairs(tokens, self.window)
        return 2 * tokens * self._weights() + 4 * self.dims.heads * self.dims.head_dim * pairs

    def _weights(self) -> int:
        """Elements of the matrices that every token is multiplied with."""
        parts = (self.qkv, self.out, self.gate, self.shift)
        return sum(part.weight.numel() for part in parts if part is not None)

    def state_bytes(self, tokens: int, element_size: int = 2) -> int:
        slots = tokens if self.window is None else min(self.window, tokens)
        return cache_bytes(slots, self.dims, self.gate is not None, element_size) + self._tail_bytes(element_size)
