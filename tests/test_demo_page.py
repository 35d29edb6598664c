"""The demo page shows each kind of artefact, from weights and runs alone, and refers only to files that are there."""

import json
import os
import subprocess
import sys
import wave
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from zoo import config
from zoo.task import Media
from zoo.train import Recipe, train

ROOT = Path(__file__).resolve().parent.parent


class Elements(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name == "src"]


def test_a_run_is_shown(tmp_path):
    words = ["train.steps=2", "train.batch_size=2", "train.eval_every=0", "train.sample_every=0", "task.context=32"]
    words += ["task.sample_tokens=8", "task.prompts=[a <b> &]"]
    train(config.build(Recipe, *config.recipe_layers("text/smoke", words)), tmp_path / "smoke")
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "demo_page.py"), "page", "smoke"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page" / "index.html").read_text()
    assert "text: smoke" in page
    assert "<pre>a &lt;b&gt; &amp;" in page


@pytest.fixture
def demo_page():
    import importlib.util

    spec = importlib.util.spec_from_file_location("demo_page", ROOT / "scripts" / "demo_page.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_page"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["demo_page"]


def test_no_published_weights_is_said(demo_page, tmp_path, monkeypatch):
    class Table:
        held: tuple[str, ...] = ()

        def names(self):
            return list(self.held)

    monkeypatch.setattr(demo_page.weights, "weights", Table())
    assert "No weights are published here yet" in demo_page.render([], tmp_path)
    Table.held = ("a.b",)
    assert "No weights" not in demo_page.render([], tmp_path)


def test_every_kind_of_artefact_has_its_element(demo_page, tmp_path):
    class Toy:
        domain = "toy"

        def show(self, model):
            sound = torch.sin(torch.arange(8000) / 20)
            return Media({"sample/0": "words"}, {"forecast": torch.rand(3, 4, 9)}, {"tone": (sound, 8000)})

    part = demo_page.show(tmp_path, "toy.weights", (None, Toy(), torch.nn.Linear(2, 2)), "A toy.")
    assert part.facts.startswith("6 parameters, drawn in ")
    page = Elements(demo_page.render([part], tmp_path))
    assert {"pre", "img", "audio"} <= set(page.tags)
    assert len(page.sources) == 2
    assert 'class="small"' in demo_page.element(part.files[1], tmp_path)  # nine pixels wide
    assert all((tmp_path / source).stat().st_size > 50 for source in page.sources)
    with wave.open(str(tmp_path / next(source for source in page.sources if source.endswith(".wav")))) as file:
        assert file.getnframes() == 8000


def test_a_task_that_shows_nothing_has_the_samples_of_its_card(demo_page, tmp_path):
    import hashlib

    from zoo.weights.published import read_card

    folder = tmp_path / "a.b"
    (folder / "samples").mkdir(parents=True)
    (folder / "samples" / "one.txt").write_text("words")
    entry = {"sha256": hashlib.sha256(b"words").hexdigest(), "size": 5}
    facts = {"name": "a.b", "files": {"samples/one.txt": entry}, "samples": ["samples/one.txt"]}
    (folder / "card.json").write_text(json.dumps(facts))
    (copied,) = demo_page.copied(read_card(folder), tmp_path / "page")
    assert copied.read_text() == "words"


def test_series_and_images_are_shown_without_their_data(tmp_path, monkeypatch):
    """`show` of tasks whose data set is not on this machine, from the assets of a run."""
    from zoo.train.recipe import make_model, make_task

    monkeypatch.delenv("ZOO_DATA", raising=False)
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "empty"))
    (tmp_path / "assets").mkdir()
    card = {"names": ["load"], "mean": [0.0], "deviation": [1.0], "known": 0, "known_mean": [], "known_deviation": []}
    (tmp_path / "assets" / "series.json").write_text(json.dumps(card))
    (tmp_path / "assets" / "classes.txt").write_text("\n".join("0123456789"))
    for name, words, wide in (("series/smoke", [], 300), ("image/smoke", ["task.grid=2"], 10)):
        recipe = config.build(Recipe, *config.recipe_layers(name, words))
        task = make_task(recipe, tmp_path / "assets")
        torch.manual_seed(0)
        (image,) = task.show(make_model(recipe, task).eval()).images.values()
        assert image.shape[0] == 3
        assert image.shape[2] > wide
        assert image.std() > 0
