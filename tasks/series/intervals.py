"""The intervals of a trained model: what they are spread by, fitted to how they held on windows (conformal.py)."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tasks.series.conformal import extended, fit, follow, pairs, scores
from tasks.series.data import Panel, Part, overlap
from tasks.series.rolling import Forecast
from tasks.series.windows import EvaluationWindows, Layout
from zoo import config as configs
from zoo import weights
from zoo.model import Batch, Model

if TYPE_CHECKING:
    from tasks.series.task import SeriesTask

log = logging.getLogger(__name__)

ROWS = 1024  # that a forecast of many series rolls at once
FOLLOWED = 256  # patches of a table's past that its intervals follow at the most
ROLLED = ("dataset", "patch", "context", "channels", "calendar", "horizons", "roll", "samples", "levels", "predict")
Roll = Callable[[Model, Batch, int], Forecast]  # of a batch, over so many steps


class Intervals:
    """What the intervals of one trained model are spread by, and the file that keeps it.

    task    whose windows it is fitted to, and which rolls them
    kept    a folder of these very weights, which need not exist yet; None: nothing is kept
    sealed  it is read and not written to
    """

    def __init__(self, task: "SeriesTask", model: Model, kept: Path | None = None, *, sealed: bool = False):
        self.task, self.model, self.kept, self.sealed = task, model, kept, sealed

    @cached_property
    def factors(self) -> Tensor | None:
        """(horizon, pairs): fitted to the validation split when first asked for, then read from where it is kept.
        None where there is nothing to spread, where the validation split was trained on, or without the data."""
        config = self.task.config
        if not config.calibrate or not pairs(config.levels):
            return None
        name = configs.fingerprint({field: getattr(config, field) for field in (*ROLLED, "calibrate")})
        file = None if self.kept is None else self.kept / f"intervals-{name}.safetensors"
        if file is not None and file.is_file():
            return weights.read(file)["factors"]
        factors = self._fit()
        if file is not None and factors is not None and not self.sealed:
            file.parent.mkdir(parents=True, exist_ok=True)
            weights.save({"factors": factors}, file)
        return factors

    @property
    def fitted(self) -> bool:
        """Whether anybody has asked for factors, and there are some."""
        return vars(self).get("factors") is not None

    def _fit(self) -> Tensor | None:
        task = self.task
        try:
            if overlap(task.source.parts("train"), task.source.parts("valid")):
                log.warning("intervals stay as they were predicted: the validation split was trained on")
                return None
            windows = task.windows("valid")
            count = min(task.config.calibrate, len(windows))
            chosen = torch.linspace(0, len(windows) - 1, count).long()
            found = scored(self.model, windows, chosen, task.roll) if count else None
        except OSError as error:
            log.warning("intervals stay as they were predicted: the validation split cannot be read (%s)", error)
            return None
        return None if found is None else fit(found, task.config.levels).cpu()

    def follow(self, parts: Sequence[Part], factors: Tensor, horizon: int) -> list[Tensor]:
        """Of each part the factors (N, horizon, pairs) at its patches, and at its end: `followed`."""
        task, config = self.task, self.task.config
        model, layout, roll, levels, rate = self.model, task.layout, task.roll, config.levels, config.follow
        return followed(model, parts, factors, horizon, layout=layout, roll=roll, levels=levels, rate=rate)

    def of_test(self) -> Callable[[Batch], Tensor | None] | None:
        """What rows of windows of the test split are spread by; where factors follow, from the validation split on."""
        factors, task = self.factors, self.task
        if factors is None:
            return None
        if not task.config.follow:
            return lambda batch: factors
        parts, patch = task.parts("test"), task.layout.patch
        first = {part.panel.id: part.begin for part in task.parts("valid")}
        whole = [replace(part, begin=min(part.begin, first.get(part.panel.id, part.begin))) for part in parts]
        tables = self.follow(whole, factors, max(task.config.horizons))
        lengths = torch.tensor([0] + [len(table) for table in tables[:-1]]).cumsum(0)
        before = torch.tensor([part.begin - longer.begin for part, longer in zip(parts, whole, strict=True)])
        joined = torch.cat(tables)

        def of(batch: Batch) -> Tensor:
            part, since = batch.condition["part"].cpu(), batch.condition["since"].cpu()
            return joined[lengths[part] + (before[part] + since) // patch]

        return of

    def at_end(self, panels: Sequence[Panel], horizon: int) -> Tensor | None:
        """What forecasts from the ends of the panels, prepared as the task's parts are, are spread by: (H, P), or where
        factors follow (R, H, P) of each row."""
        factors, layout = self.factors, self.task.layout
        if factors is None or not self.task.config.follow:
            return factors
        parts = []
        for panel in panels:
            steps = len(panel.values)
            origins = min(FOLLOWED, max(0, steps - layout.context) // layout.patch)
            parts.append(Part(panel, steps - origins * layout.patch, steps))
        tables = self.follow(parts, factors, horizon)
        each = [1 if layout.mixed else len(panel.names) for panel in panels]
        return torch.cat([table[-1:].expand(rows, -1, -1) for table, rows in zip(tables, each, strict=True)])


@torch.no_grad()
def scored(model: Model, windows: EvaluationWindows, chosen: Tensor, roll: Roll) -> Tensor | None:
    """Scores (N, C, H, P) of the N chosen windows with all their channels; None from a model of points."""
    device, channels = next(model.parameters()).device, len(windows.parts[0].panel.names)
    found = []
    for some in chosen.split(max(1, ROWS // (1 if windows.layout.mixed else channels))):
        batch = windows.collate(some).to(device)
        forecast = roll(model, batch, windows.horizon)
        if forecast.quantiles is None:
            return None
        own = scores(batch.targets.float(), forecast.quantiles.float(), forecast.levels)
        found.append(own.reshape(len(some), channels, *own.shape[2:]))
    return torch.cat(found)


def followed(
    model: Model,
    parts: Sequence[Part],
    factors: Tensor,
    horizon: int,
    *,
    layout: Layout,
    roll: Roll,
    levels: Sequence[float],
    rate: float,
) -> list[Tensor]:
    """Of each part the factors (N, horizon, P), on the CPU, of forecasts from the beginning of each of its patches, and
    the last ones of those from its end, where a patch ends there. At the beginning they are `factors` (H', P)."""
    nothing = [np.zeros(len(part.panel.names)) for part in parts]
    steps = -(-horizon // layout.patch) * layout.patch  # whole patches: a shorter horizon is their beginning
    windows = EvaluationWindows(parts, nothing, layout, sorted({layout.patch, steps}), layout.patch)
    found = scored(model, windows, torch.arange(len(windows)), roll) if len(windows) else None
    if found is None:
        return [extended(factors, horizon).unsqueeze(0) for _ in parts]
    found = found[:, :, :steps].cpu()
    each = [found[windows.which == number] for number in range(len(parts))]
    return [follow(factors, own, levels, layout.patch, rate)[:, :horizon] for own in each]
