"""A page of what trained models make on this machine, without a data set: `demo_page.py OUT [RUN …]`, OUT/index.html.

Shown are all published weights that lie here, and the runs that are named: continued texts, grids of images, sounds to
play, forecasts, whatever the domain's task shows; for a task that shows nothing, the samples of the model card.
"""

import argparse
import html
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from zoo import weights
from zoo.train import load_published, load_run
from zoo.train.log import write_media

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
section { border-top: 1px solid #ccc; margin-top: 2rem }
pre { background: #f5f5f3; padding: 1rem; white-space: pre-wrap; overflow-wrap: anywhere }
img { display: block; max-width: 100%; margin: 1rem 0 }
img.small { width: 24rem; max-height: 16rem; object-fit: contain; object-position: left; image-rendering: pixelated }
audio { display: block; margin: 1rem 0 }
.facts { color: #666; font-size: 0.9rem }
"""
SMALL = 300  # pixels; an image that is not as wide is magnified


@dataclass
class Shown:
    """One model's part of the page; `files` lie below the page's folder."""

    name: str
    domain: str
    facts: str
    files: list[Path]


def main() -> int:
    parser = argparse.ArgumentParser(description="A page of what the published weights and runs of this machine make")
    parser.add_argument("out", type=Path, help="folder for index.html and what it shows")
    parser.add_argument("runs", nargs="*", type=Path, help="run folders to show as well")
    args = parser.parse_args()
    names = [name for name in weights.weights.names() if weights.find(name).here()]
    args.out.mkdir(parents=True, exist_ok=True)
    parts = [show(args.out, run.name, load_run(run), f"trained here, in {run}") for run in args.runs]
    for name in names:
        card = weights.open_card(name)
        about = card.facts["about"]
        part = show(args.out, name, load_published(name), f"{about['summary']} Data: {about['data']}.")
        part.files = part.files or copied(card, args.out)
        parts.append(part)
    for part in parts:
        print(f"{part.name}: {part.facts}")
    page = args.out / "index.html"
    page.write_text(render(parts, args.out), encoding="utf-8")
    print(page)
    return 0


def show(out: Path, name: str, loaded: tuple[Any, Any, torch.nn.Module], about: str) -> Shown:
    """What the task shows of the model, drawn now on the CPU, below `out`/<name>."""
    _, task, model = loaded
    began = time.perf_counter()
    with torch.no_grad():
        media = task.show(model)
    seconds = time.perf_counter() - began
    shutil.rmtree(out / name, ignore_errors=True)
    files = write_media(media, out / name)
    size = sum(parameter.numel() for parameter in model.parameters())
    drawn = f", drawn in {seconds:.1f} s on the CPU" if files else ""
    return Shown(name, task.domain, f"{size:,} parameters{drawn}. {about}", files)


def copied(card: weights.Card, out: Path) -> list[Path]:
    """The card's own samples."""
    card.check("samples/")
    files = []
    for sample in card.facts["samples"]:
        files.append(out / card.name / Path(sample).name)
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(card.folder / sample, files[-1])
    return files


def render(parts: list[Shown], out: Path) -> str:
    sections = []
    for part in parts:
        sections += [f"<section><h2>{html.escape(part.domain)}: {html.escape(part.name)}</h2>"]
        sections += [f'<p class="facts">{html.escape(part.facts)}</p>']
        sections += [*(element(file, out) for file in part.files), "</section>"]
    if not weights.weights.names():
        sections += ["<p>No weights are published here yet. <code>zoo publish</code> makes them out of a run: "]
        sections += ["docs/weights.md.</p>"]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>GatedFWA zoo</title><style>{STYLE}</style>'
    return "\n".join([head, "<h1>GatedFWA zoo</h1><p>What the models on this machine make.</p>", *sections, "</html>"])


def element(file: Path, out: Path) -> str:
    place = html.escape(file.relative_to(out).as_posix(), quote=True)
    if file.suffix == ".txt":
        return f"<pre>{html.escape(file.read_text(encoding='utf-8'))}</pre>"
    if file.suffix == ".wav":
        return f'<audio controls src="{place}"></audio>'
    with Image.open(file) as image:
        size = ' class="small"' if image.width < SMALL else ""
    return f'<img{size} src="{place}" alt="{html.escape(file.stem)}">'


if __name__ == "__main__":
    raise SystemExit(main())
