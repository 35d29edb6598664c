"""The protocol of a token mixer, and what it is told about the tokens that it mixes.

Shapes: B batch, T tokens, H query heads, G key/value heads (H a multiple of G), D head dim, C model width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from zoo.state import State


@dataclass
class Context:
    """Where the tokens of a call stand. All fields but `positions` may be None.

    positions   (B, T) int64, or (B, T, A) for A rotary axes: coordinates for rotary or learned positions. None: counted
                from the start of the row, or of the document when packed.
    cu_seqlens  (N + 1,) int32 boundaries of N documents packed in one row (B = 1): 0 first, T last, empty ones allowed.
    lengths     (B,) int64 valid tokens of each right-padded row. Needed only with a state, which advances by them.
    start       (B,) int64 tokens each row's state has seen; set by the backbone when it runs with a cache.
    rotary      (cos, sin), each (B, T, D/2) float32; set by the backbone.
    halo        None, or, where rows are split between ranks: halo(count, *tensors (B, T, …)) -> the same with the last
                `count` tokens of the rank before in front (on the first rank as they are). The backbone calls it.
    """

    positions: Tensor | None = None
    cu_seqlens: Tensor | None = None
    lengths: Tensor | None = None
    start: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    halo: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Dims:
    """The widths that all mixers of a backbone share, and the spread that their matrices begin with unless they know
    better: a mixer initialises itself, and the backbone leaves it as it is."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    init_std: float = 0.02


class Mixer(nn.Module):
    """Mixes tokens along T; knows no domain. `__init__(config: Config, dims: Dims)`."""

    Config: ClassVar[type]
    # How many tokens before its own an output depends on; None: all of them. Rows can be split between ranks where
    # it is a number.
    reach: int | None = None

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """(B, T, C) -> (B, T, C). With a state the T tokens continue it: T > 1 is a chunk, T = 1 a step, one call.

        The state passed in is consumed; the one returned is the one to use next.
        """
        raise NotImplementedError

    def init_state(self, batch: int, max_len: int, *, device: Any, dtype: Any) -> State:
        """The state before the first token, for rows of at most `max_len` tokens.

        A longer row is a ValueError where its length is at hand (ops.may_look: on a CPU; on a GPU under ZOO_DEBUG=1, or
        the oldest tokens are lost without a word). A mixer whose window is at most `max_len` may go on for ever.
        """
        raise NotImplementedError

    def flops(self, tokens: int) -> int:
        """Multiply-adds times two of a forward over one row of `tokens` tokens, counting exactly the visible pairs."""
        raise NotImplementedError

    def state_bytes(self, tokens: int, element_size: int = 2) -> int:
        """Bytes of one row's state once it has seen `tokens` tokens, keys and values of `element_size` bytes each."""
        raise NotImplementedError


def visible_pairs(tokens: int, window: int | None) -> int:
    """Query-key pairs of causal attention over `tokens` tokens where each query sees `window` keys, itself included."""
    w = tokens if window is None else min(window, tokens)
    return w * (w + 1) // 2 + (tokens - w) * w
