"""Windows of series as rows of patches, for training and for evaluation.

A row's inputs are (T, C + K m, P): T patches of P steps; C values (one a row where channels are independent), NaN where
missing; then, of K known covariates, the m patches that are to be predicted from there. Whoever is nearer to the
beginning of a series than the look-back is filled up on the left with missing values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.series.data import Part
from zoo.model import Batch


@dataclass(frozen=True)
class Layout:
    """patch    P, steps of a token
    predict  steps that are predicted from a token, m P
    context  look-back, steps; a multiple of P
    ahead    patches that a training row has after the look-back
    mixed    all values of a step in one row, or one a row
    """

    patch: int
    predict: int
    context: int
    ahead: int
    mixed: bool

    @property
    def blocks(self) -> int:
        return self.predict // self.patch

    @property
    def training_steps(self) -> int:
        return self.context + self.ahead * self.patch + self.predict

    def rolled(self, horizon: int) -> int:
        """Steps that whole predictions need to cover `horizon`."""
        return -(-horizon // self.predict) * self.predict


def cut(values: np.ndarray, begin: int, end: int) -> np.ndarray:
    """values[begin:end] of (T, V) as (V, end - begin) float32, NaN before the beginning and past the end."""
    inside = values[max(0, begin) : max(0, end)]
    out = np.full((values.shape[1], end - begin), np.nan, dtype=np.float32)
    first = max(0, -begin)
    out[:, first : first + len(inside)] = inside.T
    return out


def cut_known(known: np.ndarray | None, begin: int, end: int) -> np.ndarray:
    if known is None:
        return np.zeros((0, end - begin), dtype=np.float32)
    return np.nan_to_num(cut(known, begin, end))


class TrainingWindows:
    """Every window of the training parts that has a whole look-back and a whole prediction; of a part that is too
    short for one, those with as much as there is. One example for each channel, or for all together."""

    def __init__(self, parts: Sequence[Part], layout: Layout):
        self.layout = layout
        self.rows: list[tuple[Part, int, int]] = []  # part, channel (-1: all), first origin
        counts = []
        for part in parts:
            first = part.begin + layout.context
            last = part.end - layout.predict
            if last < first:
                first, last = part.begin + min(layout.patch, (part.end - part.begin) // 2), max(last, part.begin)
                last = max(first, last)
            if part.end - part.begin < 2:
                continue
            for channel in [-1] if layout.mixed else range(part.panel.values.shape[1]):
                self.rows.append((part, channel, first))
                counts.append(last - first + 1)
        self.ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """values (C, steps), known (K, steps)."""
        place = int(np.searchsorted(self.ends, index, side="right"))
        part, channel, first = self.rows[place]
        origin = first + index - (int(self.ends[place - 1]) if place else 0)
        begin = origin - self.layout.context
        end = begin + self.layout.training_steps
        values = part.panel.values[: part.end]
        values = values if channel < 0 else values[:, channel : channel + 1]
        row = cut(values, begin, end)
        if begin < part.begin:
            row[:, : part.begin - begin] = np.nan
        return row, cut_known(part.panel.known, begin, end)

    def collate(self, items: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
        """targets (B, T, C, predict): the values after each patch."""
        values, known = (torch.from_numpy(np.stack(part)) for part in zip(*items, strict=True))
        layout = self.layout
        tokens = layout.context // layout.patch + layout.ahead
        following = values[..., layout.patch :].unfold(-1, layout.predict, layout.patch)
        targets = following[:, :, :tokens].transpose(1, 2).contiguous()
        return Batch(patches(values[..., : tokens * layout.patch], known, layout), targets)


def patches(values: Tensor, known: Tensor, layout: Layout) -> Tensor:
    """values (R, C, T P) and known (R, K, T P + predict or more) -> inputs (R, T, C + K m, P)."""
    tokens = values.shape[-1] // layout.patch
    rows = values.unflatten(-1, (tokens, layout.patch)).transpose(1, 2)
    if not known.shape[1]:
        return rows.contiguous()
    ahead = known[..., layout.patch :].unfold(-1, layout.predict, layout.patch)[:, :, :tokens]  # (R, K, T, m P)
    ahead = ahead.transpose(1, 2).unflatten(-1, (layout.blocks, layout.patch)).flatten(2, 3)
    return torch.cat((rows, ahead), dim=2).contiguous()


@dataclass(frozen=True)
class Window:
    """history (V, context), future (V, horizon) NaN past the end, fits: of these so many steps are within the part;
    known (K, context + rolled horizon), error (V,): in-sample error of the seasonal naive forecast, for MASE."""

    history: np.ndarray
    future: np.ndarray
    fits: int
    known: np.ndarray
    error: np.ndarray


class EvaluationWindows:
    """Every `stride`-th window of the parts in which the shortest horizon fits, in order; none left out at the end."""

    def __init__(
        self, parts: Sequence[Part], errors: Sequence[np.ndarray], layout: Layout, horizons: Sequence[int], stride: int
    ):
        self.layout, self.horizon = layout, max(horizons)
        self.parts, self.errors = list(parts), list(errors)
        self.places = [
            (index, origin)
            for index, part in enumerate(self.parts)
            for origin in range(part.begin, part.end - min(horizons) + 1, stride)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Window:
        which, origin = self.places[index]
        part = self.parts[which]
        fits = min(self.horizon, part.end - origin)
        begin, context = origin - self.layout.context, self.layout.context
        return Window(
            cut(part.panel.values[:origin], begin, origin),
            cut(part.panel.values[: origin + fits], origin, origin + self.horizon),
            fits,
            cut_known(part.panel.known, begin, begin + context + self.layout.rolled(self.horizon)),
            self.errors[which],
        )

    def collate(self, items: list[Window]) -> Batch:
        return prompt(items, self.layout)


def prompt(items: list[Window], layout: Layout) -> Batch:
    """Rows to forecast: inputs (R, T, C + K m, P), targets (R, C, horizon), condition with `known` (R, M, K, P), `fits`
    (R,) and `error` (R, C). Where channels are independent R = windows x channels, else R = windows."""
    history, future, known = (
        torch.from_numpy(np.stack([getattr(item, name) for item in items])) for name in ("history", "future", "known")
    )
    error = torch.from_numpy(np.stack([item.error for item in items]).astype(np.float32))
    fits = torch.tensor([item.fits for item in items])
    if not layout.mixed:
        channels = history.shape[1]
        history, future = (x.flatten(0, 1).unsqueeze(1) for x in (history, future))
        known, fits, error = known.repeat_interleave(channels, 0), fits.repeat_interleave(channels), error.view(-1, 1)
    later = known[..., layout.context :].unflatten(-1, (-1, layout.patch)).transpose(1, 2)  # (R, M, K, P)
    condition: dict[str, Any] = {"known": later.contiguous(), "fits": fits, "error": error}
    return Batch(patches(history, known, layout), future, condition=condition)
