"""Native Sparse Attention (Yuan et al., arXiv 2502.11089): compressed blocks for the gist, selected blocks for the
detail, a window for the neighbourhood.

    o_t = g_cmp Attn(q_t, compressed blocks) + g_slc Attn(q_t, chosen blocks) + g_win Attn(q_t, last `window` keys)

with g = sigmoid(x W + b), three per query head, and b = 0 at the start (SPEC.md 5). The default form is the GatedFWA
authors': blocks are means over `block` tokens and the branches share keys and values. The paper's form is

    block 64, compressed_block 32, stride 16, compression mlp, separate_kv true

While a sequence has at most top * block tokens every block is chosen, and the branch runs as the dense causal attention
that it then is (ops.runs_dense). The state holds all keys and values, the compressed blocks and the window's decays: a
step reads the compressed blocks, top * block keys and the window.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo import ops
from zoo.layers import init_normal
from zoo.mixers.attention import Attention, AttentionConfig, Gate, check_window
from zoo.mixers.base import Context, Dims, visible_pairs
from zoo.mixers.cache import check_room, past_in_order, put, start_of, take
from zoo.mixers.nsa_blocks import BlockMLP, compressed_pairs, mean_of_blocks, put_blocks, selected_pairs
from zoo.registry import mixers
from zoo.state import State


@mixers.register("nsa")
class NSA(Attention):
    @dataclass
    class Config(AttentionConfig):
        """A 0 stands for 'derived': compressed_block = block, stride = compressed_block.

        block             tokens of a block that is selected
        top               selected blocks per query, the first, the previous and the own included
        window            visible keys of the window branch, the token itself included
        compressed_block  tokens of a compressed block; it holds `stride` tokens that the next one doesn't
        compression       a compressed key or value is the mean over its block, or that plus an MLP of the whole block
        importance        of a block that holds several compressed ones: what overlaps it, or Eq. 9's sign as printed
        separate_kv       each branch has keys and values of its own
        """

        block: int = 64
        top: int = 16
        window: int = 512
        compressed_block: int = 0
        stride: int = 0
        compression: Literal["mean", "mlp"] = "mean"
        importance: Literal["spatial", "printed"] = "spatial"
        separate_kv: bool = False

        def __post_init__(self):
            check_window(self.window)
            length, step = self.compressed_length, self.compressed_step
            if min(self.block, length, step) < 1 or self.block % step or length % step or length > self.block:
                raise ValueError(
                    f"block = {self.block}, compressed_block = {length}, stride = {step}: the stride must divide both, "
                    "and compressed_block be at most block"
                )
            if self.top < 3:
                raise ValueError(f"top = {self.top}; it takes 3 or more: the first, the previous and the own block")

        @property
        def compressed_length(self) -> int:
            return self.compressed_block or self.block

        @property
        def compressed_step(self) -> int:
            return self.stride or self.compressed_length

        def compressed_blocks(self, tokens: int) -> int:
            """Complete ones among `tokens` tokens."""
            return max(0, (tokens - self.compressed_length) // self.compressed_step + 1)

    config: Config
    window: int

    def __init__(self, config: Config, dims: Dims, gate: Gate | None = None):
        super().__init__(config, dims, window=config.window, gate=gate, kv_sets=3 if config.separate_kv else 1)
        self.reach = None  # blocks of all the past are chosen
        self.branch_gates = nn.Linear(dims.width, 3 * dims.heads)
        nn.init.zeros_(self.branch_gates.bias)
        learned = config.compression == "mlp"
        self.compress_k = BlockMLP(config.compressed_length, dims.head_dim) if learned else None
        self.compress_v = BlockMLP(config.compressed_length, dims.head_dim) if learned else None
        init_normal((self.branch_gates, self.compress_k, self.compress_v), dims.init_std)

    # -- attention -----------------------------------------------------------------------------------------------------

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, gate: tuple[Tensor, Tensor] | None, x: Tensor, ctx: Context
    ) -> Tensor:
        config, packed = self.config, ctx.cu_seqlens
        log_decay = None if gate is None else ops.log_decay(*gate)
        gates = self._branch_gates(x)
        if not self._own_form():
            return ops.nsa_attention(
                q, k, v, gates, log_decay, block=config.block, top=config.top, window=self.window, cu_seqlens=packed
            )
        (blocks_k, select_k, near_k), (blocks_v, select_v, near_v) = self._sets(k), self._sets(v)
        blocks_k, blocks_v = (
            ops.gather_blocks(
                y, config.compressed_length, config.compressed_step, select=config.block, cu_seqlens=packed
            )
            for y in (blocks_k, blocks_v)
        )
        dense = ops.runs_dense(x.shape[1], config.block, config.top)
        gist, chosen = self._gist(q, *self._compress(blocks_k, blocks_v), 0 if dense else config.top, cu_seqlens=packed)
        if dense:
            detail = ops.window_attention(q, select_k, select_v, cu_seqlens=packed)
        else:
            detail = ops.selected_attention(q, select_k, select_v, chosen, block=config.block, cu_seqlens=packed)
        near = ops.window_attention(q, near_k, near_v, log_decay, window=self.window, cu_seqlens=packed)
        return ops.mix_branches(gates, gist, detail, near)

    def _continue(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: Context, state: Any) -> Tensor:
        start = start_of(ctx, x)
        check_room(state["selected"]["k"].shape[1], start, x.shape[1] if ctx.lengths is None else ctx.lengths)
        log_decay = None if self.gate is None else ops.log_decay(*self.gate(x))
        k_sets, v_sets = self._sets(k), self._sets(v)
        block, step = self.config.compressed_length, self.config.compressed_step
        past_k, past_v, _, _ = past_in_order(state.get("raw", state["selected"]), start, block - 1)
        new = (k_sets[0], v_sets[0])
        put_blocks(state["blocks"], (past_k, past_v), new, start, ctx.lengths, step, self._compress)
        for cache, i in ((state["selected"], 1), (state.get("raw"), 0)):
            if cache is not None:
                put(cache, k_sets[i], v_sets[i], None, start, ctx.lengths)
        near = self._near(q, k_sets[2], v_sets[2], log_decay, start, ctx.lengths, state)
        where: dict[str, Any] = {"query_start": start.to(torch.int32)}
        selected, blocks = state["selected"], state["blocks"]
        query = q.to(selected["k"].dtype)  # the cache may be kept in another dtype than the call computes in
        gist, chosen = self._gist(query, blocks["k"], blocks["v"], self.config.top, **where)
        detail = ops.selected_attention(query, selected["k"], selected["v"], chosen, block=self.config.block, **where)
        return ops.mix_branches(self._branch_gates(x), gist.to(v.dtype), detail.to(v.dtype), near)

    def _near(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        start: Tensor,
        lengths: Tensor | None,
        state: Any,
    ) -> Tensor:
        """The window branch with a state: shared keys and values are read where the selected branch keeps them."""
        tokens, own = q.shape[1], state.get("window", {})
        cache = state["selected"] | own
        if tokens > 1 or lengths is not None:
            past_k, past_v, past_decay, key_start = past_in_order(cache, start, self.window - 1)
            k, v = torch.cat((past_k.to(k.dtype), k), dim=1), torch.cat((past_v.to(v.dtype), v), dim=1)
            decay = None if log_decay is None or past_decay is None else torch.cat((past_decay, log_decay), dim=1)
            near = ops.window_attention(q, k, v, decay, window=self.window, key_start=key_start)
            put(own, k[:, -tokens:], v[:, -tokens:], log_decay, start, lengths)
            return near
        put(own, k, v, log_decay, start, lengths)
        slots = min(self.window, state["selected"]["k"].shape[1])
        newest = start.unsqueeze(1)
        place = (newest - (newest - torch.arange(slots, device=q.device)) % slots).clamp(min=0)
        k, v = (take(cache[name], place % cache[name].shape[1]) for name in ("k", "v"))
        live = (start + 1).clamp(max=slots).to(torch.int32)
        return ops.ring_attention(q.to(k.dtype), k, v, cache.get("decay"), live).to(q.dtype)

    def _branch_gates(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.branch_gates(x)).unflatten(-1, (self.dims.heads, 3))

    def _own_form(self) -> bool:
        config = self.config
        return config.separate_kv or config.compression != "mean" or config.compressed_step != config.block

    def _sets(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys or values of the compressed, selected and window branch."""
        if not self.config.separate_kv:
            return x, x, x
        compressed, selected, near = x.chunk(3, dim=2)
        return compressed, selected, near

    def _compress(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks of keys and values (B, M, block, G, D) to one each (B, M, G, D)."""
        if self.compress_k is not None and self.compress_v is not None:
            return self.compress_k(k).to(v.dtype), self.compress_v(v).to(v.dtype)
        return mean_of_blocks(k), mean_of_blocks(v)

    def _gist(self, q: Tensor, k: Tensor, v: Tensor, top: int, **where: Any) -> tuple[Tensor, Tensor]:
        config = self.config
        out, _, chosen = ops.compressed_attention(
            q, k, v, block=config.compressed_length, stride=config.compressed_step,
            select=config.block, top=top, importance=config.importance, **where,
        )  # fmt: skip
        return out, chosen

    # -- state and cost ------------------------------------------------------------------------------------------------

    def init_state(self, batch: int, max_len: int, *, device: Any, dtype: Any) -> State:
        config, dims = self.config, self.dims
        near = min(self.window, max_len)

        def pair(slots: int) -> dict[str, Any]:
            shape = (batch, slots, dims.kv_heads, dims.head_dim)
            return {name: torch.zeros(shape, device=device, dtype=dtype) for name in ("k", "v")}

        state: dict[str, Any] = {"selected": pair(max_len), "blocks": pair(config.compressed_blocks(max_len))}
        if config.separate_kv:
            state |= {"raw": pair(config.compressed_length), "window": pair(near)}
        if self.gate is not None:
            wide = torch.promote_types(dtype, torch.float32)
            decay = torch.zeros(batch, near, dims.heads, device=device, dtype=wide)
            state["window"] = state.get("window", {}) | {"decay": decay}
        return state | self._init_tails(batch, device=device, dtype=dtype)

    def state_bytes(self, tokens: int, element_size: int = 2) -> int:
        config, near = self.config, min(self.window, tokens)
        slots = tokens + config.compressed_blocks(tokens)
        if config.separate_kv:
            slots += near + config.compressed_length
        decay = 0 if self.gate is None else max(4, element_size) * near * self.dims.heads
        return (
            2 * slots * self.dims.kv_heads * self.dims.head_dim * element_size + decay + self._tail_bytes(element_size)
        )

    def flops(self, tokens: int) -> int:
        config, dims = self.config, self.dims
        weights = self._weights() + self.branch_gates.weight.numel()
        compress = 0
        if self.compress_k is not None:
            per_block = self.compress_k.up.weight.numel() + self.compress_k.down.weight.numel()
            compress = 4 * config.compressed_blocks(tokens) * dims.kv_heads * per_block  # keys and values
        pairs = visible_pairs(tokens, self.window) + selected_pairs(tokens, config.block, config.top)
        pairs += compressed_pairs(tokens, config.compressed_length, config.compressed_step)
        return 2 * tokens * weights + compress + 4 * dims.heads * dims.head_dim * pairs
