"""What a decode state is: a tree of dicts, lists and tensors, batch first, owned by the caller.

    State = dict[str, State] | list[State] | Tensor          every tensor (B, …)

A state holds everything that a mixer, head or backbone must remember between calls, on the device, in fixed shapes,
so that a decoding step can be one CUDA graph. A call consumes the state passed to it (it may write in place) and
returns the state to use next; `clone` first to keep the old one.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

State: TypeAlias = dict[str, "State"] | list["State"] | Tensor


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """Apply `function` to every tensor of the tree."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        return {name: map_state(function, part) for name, part in state.items()}
    if isinstance(state, list):
        return [map_state(function, part) for part in state]
    raise TypeError(f"a state holds dicts, lists and tensors, not {type(state).__name__}")


def leaves(state: State) -> list[Tensor]:
    """All tensors of the tree, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_state(note, state)
    return found


def index(state: State, rows: Tensor) -> State:
    """The rows (N,) int64 of a state: reorder, drop or repeat sequences (beam search, finished rows)."""
    return map_state(lambda tensor: tensor.index_select(0, rows), state)


def repeat(state: State, times: int) -> State:
    """Each row `times` times, neighbours together: one prompt, many samples."""
    return map_state(lambda tensor: tensor.repeat_interleave(times, dim=0), state)


def clone(state: State) -> State:
    return map_state(torch.clone, state)


def state_bytes(state: State) -> int:
    """Bytes held by the whole tree (all rows)."""
    return sum(tensor.numel() * tensor.element_size() for tensor in leaves(state))
