"""What a generator is trained on: recordings as rows of tokens, packed whole or one to a row."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.audio.data import Recordings
from tasks.audio.sample_head import START
from tasks.audio.waves import to_levels
from zoo.data import IGNORED, PackedDocuments, Shuffled, SourceStream
from zoo.model import Batch, Context


def with_start(recordings: Recordings) -> list[np.ndarray]:
    """Each recording's levels, the start token first: (T + 1,) int16."""
    return [np.concatenate(([START], to_levels(sound))).astype(np.int16) for sound in recordings.sounds]


def packed_stream(recordings: Recordings, context: int, *, seed: int, **place: Any) -> SourceStream:
    """Training rows of `context` samples: recordings one after another, nothing padded, nothing leaking between them.
    What does not fit into a row goes on in the next, without what was before it."""
    return SourceStream(PackedDocuments(with_start(recordings), context, seed=seed), **place)


def whole_stream(recordings: Recordings, **place: Any) -> SourceStream:
    """Evaluation: every recording whole, those of a batch packed into one row."""
    return SourceStream(Shuffled(with_start(recordings), collate_packed, seed=None), endless=False, **place)


def collate_packed(rows: list[np.ndarray]) -> Batch:
    inputs = torch.from_numpy(np.concatenate([row[:-1] for row in rows]).astype(np.int64))
    targets = torch.from_numpy(np.concatenate([row[1:] for row in rows]).astype(np.int64))
    ends = np.cumsum([0, *(len(row) - 1 for row in rows)])
    ctx = Context(cu_seqlens=torch.from_numpy(ends.astype(np.int32)))
    return Batch(inputs[None], targets[None], ctx=ctx)


def row_stream(
    split: str, views: list[np.ndarray], labels: np.ndarray, collate: Callable[..., Batch], *, seed: int, **place: Any
) -> SourceStream:
    """One recording to a row. `views`: arrays (N, …) of the same recordings, the first as it is and others varied."""
    training = split == "train"
    items = [
        (row, label) for view in (views if training else views[:1]) for row, label in zip(view, labels, strict=True)
    ]
    return SourceStream(Shuffled(items, collate, seed=seed if training else None), endless=training, **place)


def shifted(targets: Tensor, empty: int) -> Tensor:
    """(B, T, …) -> the same length: a step of `empty`, then all but the last."""
    return torch.cat((torch.full_like(targets[:, :1], empty), targets[:, :-1]), dim=1)


def scored(targets: Tensor, empty: int) -> Tensor:
    """Where nothing stands nothing is scored."""
    return torch.where(targets == empty, IGNORED, targets)
