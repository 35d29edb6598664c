"""The example package as a stranger would use it: installed beside the zoo in a clean environment, trained, sampled."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.installed import build_wheel, make_environment, run

pytestmark = pytest.mark.timeout(900)
NAME = "strokes_gatedfwa_24k.outlines"


@pytest.fixture(scope="module")
def environment(repository, tmp_path_factory) -> Path:
    """The bin folder of an environment with the zoo and the package."""
    projects = {"zoo": repository, "strokes": repository / "examples" / "strokes"}
    wheels = [build_wheel(project, tmp_path_factory.mktemp(name)) for name, project in projects.items()]
    return make_environment(tmp_path_factory.mktemp("environment"), *wheels)


def zoo(environment: Path, cwd: Path, *words: str) -> str:
    return run(environment / "zoo", *words, cwd=cwd).stdout


def test_zoo_lists_what_it_adds(environment, tmp_path):
    listed = {
        "models": "strokes_gatedfwa_24k",
        "tasks": "strokes",
        "datasets": "strokes/outlines",
        "recipes": "strokes/outlines",
    }
    for kind, name in listed.items():
        assert name in zoo(environment, tmp_path, "list", "strokes*", "--kind", kind).split()
    assert re.search(f"{NAME} +0.1 MiB here", zoo(environment, tmp_path, "list", "--pretrained"))


def test_its_weights_come_with_it(environment, tmp_path):
    """The numbers of their card come back, and what they draw is a picture."""
    said = zoo(environment, tmp_path, "evaluate", NAME, "--pretrained", "--device", "cpu")
    assert said.count("holds") == 2
    words = ["sample", NAME, "--prompt", "000", "--count", "3", "--seed", "0", "--device", "cpu", "--out", "three.svg"]
    zoo(environment, tmp_path, *words)
    lines = ElementTree.parse(tmp_path / "three.svg").getroot()
    assert len(lines) == 3
    for number, line in enumerate(lines):
        points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        x, y = points[0]
        assert points[1:4] == [(x + 1, y), (x + 2, y), (x + 3, y)], number  # the prompt: three moves to the east


def test_it_trains_resumes_and_evaluates(environment, tmp_path):
    """Its recipe as it stands, in two sessions; the metric is the package's own."""
    zoo(environment, tmp_path, "train", "strokes/outlines", "train.steps=300")
    zoo(environment, tmp_path, "train", "strokes/outlines", "--resume")
    zoo(environment, tmp_path, "evaluate", "runs/strokes-outlines", "--device", "cpu")
    rows = [json.loads(line) for line in (tmp_path / "runs/strokes-outlines/results.jsonl").read_text().splitlines()]
    values = {row["name"]: row["value"] for row in rows}
    assert values["loss"] < 0.7 < values["loss_of_pairs"]
    assert values["closed"] > 0.8
    assert rows[0]["data"]["dataset"] == "strokes/outlines"
    assert list((tmp_path / "runs/strokes-outlines/samples").glob("*drawings.png"))


def test_it_publishes_what_it_trained(environment, tmp_path, repository):
    zoo(environment, tmp_path, "train", "strokes/outlines", "train.steps=20", "train.save_every=20")
    about = repository / "examples" / "strokes" / "about.yaml"
    place = ["--out", "weights", "--table", "weights.yaml"]
    zoo(environment, tmp_path, "publish", "runs/strokes-outlines", "--tag", "mine", "--about", str(about), *place)
    card = json.loads((tmp_path / "weights" / "strokes_gatedfwa_24k.mine" / "card.json").read_text())
    assert {number["name"] for number in card["numbers"]} == {"loss", "closed"}
    assert "tag: mine" in (tmp_path / "weights.yaml").read_text()
