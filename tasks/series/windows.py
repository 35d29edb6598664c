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


def too_short(what: str, lengths: dict[str, int], wanted: int) -> str | None:
    """A sentence on the series whose `what` has fewer steps than are wanted; None where none has."""
    few = {name: steps for name, steps in lengths.items() if steps < wanted}
    if not few:
        return None
    name = min(few, key=few.__getitem__)
    which = f" of series {name!r}, the shortest of {len(few)} such," if name else ""
    return f"{what}{which} has {few[name]} of {wanted} steps: the others count as missing"


class Strip:
    """All parts one after another, float32, so that any windows are one gather: values (V, N) and known (K, N).

    Of each part the steps from `first` (its begin, or 0) to its end, with `before` steps of NaN in front of them and
    `after` behind; covariates are 0 there and go on past the part's end as far as they are known.
    """

    def __init__(self, parts: Sequence[Part], *, before: int, after: int, whole: bool):
        values, known, self.shift, place = [], [], [], 0  # shift: of a part's steps to their columns
        for part in parts:
            first = 0 if whole else part.begin
            values.append(cut(part.panel.values[: part.end], first - before, part.end + after))
            if not whole:
                values[-1][:, :before] = np.nan
            known.append(cut_known(part.panel.known, first - before, part.end + after))
            self.shift.append(place + before - first)
            place += values[-1].shape[1]
        self.values, self.known = (torch.from_numpy(np.concatenate(rows, axis=1)) for rows in (values, known))

    def take(self, starts: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Columns (B,) -> values (B, V, steps), known (B, K, steps)."""
        values, known = (rows.unfold(1, steps, 1)[:, starts].transpose(0, 1) for rows in (self.values, self.known))
        return values, known


class TrainingWindows:
    """Every window of the training parts that has a whole look-back and a whole prediction; of a part that is too
    short for one, those with as much as there is. One example for each channel, or for all together.

    short  in words, of which parts that is so; None: of none
    """

    def __init__(self, parts: Sequence[Part], layout: Layout):
        self.layout = layout
        lengths = {part.panel.id: part.end - part.begin for part in parts}
        self.short = too_short("training part", lengths, layout.context + layout.predict)
        self.strip = Strip(parts, before=layout.context, after=layout.training_steps, whole=False)
        starts, channels, counts = [], [], []  # of a run of windows: column of the first, channel (-1: all), how many
        for part, shift in zip(parts, self.strip.shift, strict=True):
            first = part.begin + layout.context
            last = part.end - layout.predict
            if last < first:
                first, last = part.begin + min(layout.patch, (part.end - part.begin) // 2), max(last, part.begin)
                last = max(first, last)
            if part.end - part.begin < 2:
                continue
            for channel in [-1] if layout.mixed else range(part.panel.values.shape[1]):
                starts.append(first - layout.context + shift)
                channels.append(channel)
                counts.append(last - first + 1)
        self.ends = np.cumsum(counts)
        self.starts, self.channels, self.counts = (np.array(x, dtype=np.int64) for x in (starts, channels, counts))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> int:
        return index

    def rows(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """values (B, C, steps), known (B, K, steps)."""
        index = np.asarray(indices, dtype=np.int64)
        run = np.searchsorted(self.ends, index, side="right")
        starts = torch.from_numpy(self.starts[run] + index - (self.ends[run] - self.counts[run]))
        values, known = self.strip.take(starts, self.layout.training_steps)
        if not self.layout.mixed:
            values = values[torch.arange(len(index)), torch.from_numpy(self.channels[run])].unsqueeze(1)
        return values, known

    def collate(self, items: Sequence[int]) -> Batch:
        """targets (B, T, C, predict): the values after each patch."""
        values, known = self.rows(items)
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


class EvaluationWindows:
    """Every `stride`-th window of the parts in which the shortest horizon fits, in order; none left out at the end."""

    def __init__(
        self, parts: Sequence[Part], errors: Sequence[np.ndarray], layout: Layout, horizons: Sequence[int], stride: int
    ):
        self.layout, self.horizon = layout, max(horizons)
        self.parts = list(parts)
        self.strip = Strip(parts, before=layout.context, after=layout.rolled(self.horizon), whole=True)
        origins = [np.arange(part.begin, part.end - min(horizons) + 1, stride) for part in self.parts]
        self.which = torch.from_numpy(np.repeat(np.arange(len(origins)), [len(o) for o in origins]))
        self.origins = torch.from_numpy(np.concatenate(origins).astype(np.int64))
        self.errors = torch.from_numpy(np.stack(errors).astype(np.float32))
        ends, begins = (torch.tensor([getattr(part, name) for part in self.parts]) for name in ("end", "begin"))
        self.since = self.origins - begins[self.which]
        self.fits = (ends[self.which] - self.origins).clamp(max=self.horizon)
        self.columns = self.origins + torch.tensor(self.strip.shift)[self.which] - layout.context

    def __len__(self) -> int:
        return len(self.origins)

    def __getitem__(self, index: int) -> int:
        return index

    def raw(self, items: Sequence[int] | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """history (B, V, context), future (B, V, horizon) NaN past the end of the part, known (B, K, context + rolled
        horizon)."""
        context = self.layout.context
        values, known = self.strip.take(
            self.columns[torch.as_tensor(items)], context + self.layout.rolled(self.horizon)
        )
        return values[..., :context], values[..., context : context + self.horizon], known

    def collate(self, items: Sequence[int] | Tensor) -> Batch:
        """prompt's rows; in the condition, too, "part" (R,), which one, and "since" (R,), steps from its beginning."""
        history, future, known = self.raw(items)
        places = torch.as_tensor(items)
        which = self.which[places]
        batch = prompt(history, future, known, self.fits[places], self.errors[which], self.layout)
        each = len(batch.inputs) // len(places)
        batch.condition |= {
            "part": which.repeat_interleave(each),
            "since": self.since[places].repeat_interleave(each),
        }
        return batch


def prompt(history: Tensor, future: Tensor, known: Tensor, fits: Tensor, error: Tensor, layout: Layout) -> Batch:
    """Rows to forecast: inputs (R, T, C + K m, P), targets (R, C, horizon), condition with `known` (R, M, K, P), `fits`
    (R,) and `error` (R, C). Where channels are independent R = windows x channels, else R = windows.

    history (B, V, context), future (B, V, horizon) NaN past the end, known (B, K, context + rolled horizon); fits (B,):
    of the future so many steps are within the part; error (B, V): in-sample error of the seasonal naive, for MASE.
    """
    if not layout.mixed:
        channels = history.shape[1]
        history, future = (x.flatten(0, 1).unsqueeze(1) for x in (history, future))
        known, fits, error = known.repeat_interleave(channels, 0), fits.repeat_interleave(channels), error.view(-1, 1)
    later = known[..., layout.context :].unflatten(-1, (-1, layout.patch)).transpose(1, 2)  # (R, M, K, P)
    condition: dict[str, Any] = {"known": later.contiguous(), "fits": fits, "error": error}
    return Batch(patches(history, known, layout), future.contiguous(), condition=condition)
