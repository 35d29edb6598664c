"""Resumable streams: source, shuffle, window or pack, batch.

Order is a function of (seed, position): a stream's whole state is how many examples all ranks together have consumed,
so a run resumes exactly, on any number of ranks.
"""

from collections.abc import Iterator
from typing import Any, Protocol

from zoo.model import Batch


class Stream(Protocol):
    """Yields batches; `state_dict` names the position after the last batch handed out, as plain JSON values."""

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
