"""Draws forecasts of a series run on windows of the test split, one below the other, for docs.

    python scripts/draw_forecasts.py runs/series-etth1 --count 2 --channel HUFL OT --out docs/series/etth1.png
    python scripts/draw_forecasts.py runs/series-m4_hourly --count 4 --out docs/series/m4_hourly.png

Windows are spread evenly over the split, in its order, and are chosen by nothing else.
"""

import argparse
import itertools
from pathlib import Path

import torch
from PIL import Image

from tasks.series import plots
from tasks.series.conformal import spread
from tasks.series.rolling import roll
from tasks.series.task import SeriesTask
from zoo.model import Model
from zoo.train import load_run


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--channel", nargs="+", help="default: the first")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    recipe, task, model = load_run(args.run)
    assert isinstance(task, SeriesTask)
    assert isinstance(model, Model)
    names = task.card["names"]
    channels = [0] if args.channel is None else [names.index(name) for name in args.channel]
    windows, levels = task.windows("test"), task.config.levels
    whole = (windows.fits == windows.horizon).nonzero().flatten()
    chosen = whole[torch.linspace(0, len(whole) - 1, args.count + 2).long()[1:-1]]
    batch = windows.collate(chosen)
    forecast = roll(model, batch, windows.horizon, levels=levels, mode=task.config.roll, samples=task.config.samples)
    factors = task.metrics("test")["forecast"].factors
    forecast = spread(forecast, factors(batch) if factors else None)
    history, future, _ = windows.raw(chosen)
    pictures = []
    for (number, window), channel in itertools.product(enumerate(chosen.tolist()), channels):
        panel, at = windows.parts[windows.which[window]].panel, int(windows.origins[window])
        row, place = (number, channel) if task.layout.mixed else (number * len(names) + channel, 0)
        origin = f"step {at}" if panel.times is None else panel.times[at]
        picture = plots.draw(
            history[number, channel].numpy(),
            forecast.mean[row, place].numpy(),
            None if forecast.quantiles is None else forecast.quantiles[row, place].numpy(),
            levels,
            truth=future[number, channel].numpy(),
            title=f"{panel.id} {names[channel]} from {origin}: {recipe.model.name}",
        )
        pictures.append((255 * plots.as_image(picture)).round().byte())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(torch.cat(pictures, dim=1).permute(1, 2, 0).numpy()).quantize(64).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
