"""docs/extending.md keeps its word: its package is installed and used, its mixer passes the tests of ours."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.installed import build_wheel, make_environment, run

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text("utf-8")
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", PAGE, re.M | re.S))


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """The page's package, as its blocks say."""
    home = tmp_path_factory.mktemp("mine")
    for name, text in FILES.items():
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(text)
    return home


def test_the_page_says_how_long_they_are():
    lines = {name: len([line for line in text.splitlines() if line.strip()]) for name, text in FILES.items()}
    assert set(lines) == {"pyproject.toml", "mine/__init__.py", "mine/mingru.py", "mine/mbox.py"}
    assert lines["mine/mingru.py"] <= 60
    assert lines["mine/mbox.py"] <= 20


def test_the_mixer_passes_the_tests_of_ours(package, tmp_path):
    """With the page's entry point, as after `pip install -e .`: -p imports the mixer before the package declares it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "mine.mingru", "-k", "mingru", "-p", "no:cacheprovider"]
    (tmp_path / "mine-0.1.dist-info").mkdir()
    (tmp_path / "mine-0.1.dist-info" / "METADATA").write_text("Name: mine\nVersion: 0.1\n")
    (tmp_path / "mine-0.1.dist-info" / "entry_points.txt").write_text("[zoo.tasks]\nmine = mine\n")
    path = os.pathsep.join(filter(None, [str(ROOT), str(package), str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "test_mixers.py")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 8


def test_the_package_is_installed_and_trained(package, tmp_path):
    wheels = []
    for name, project in (("zoo", ROOT), ("mine", package)):
        (tmp_path / name).mkdir()
        wheels.append(build_wheel(project, tmp_path / name))
    zoo = make_environment(tmp_path / "environment", *wheels) / "zoo"

    def said(*words: str) -> str:
        return run(zoo, *words, cwd=tmp_path).stdout

    assert "mingru" in said("list", "--kind", "mixers").split()
    assert "text/mbox" in said("list", "--kind", "datasets").split()
    mails = [f"From me Mon Jan  1 00:00:00 2024\nSubject: {i}\n\n{'some words ' * 30}{i}\n\n" for i in range(60)]
    (tmp_path / "archive.mbox").write_text("".join(mails))
    small = ["train.steps=4", "train.batch_size=2", "task.context=32", "task.sample_tokens=3", "--run", "runs/mail"]
    words = ["task.dataset.name=text/mbox", "task.dataset.path=archive.mbox", "model.backbone.mixer.name=mingru"]
    run(zoo, "train", "text/smoke", *words, *small, cwd=tmp_path)
    assert "bits_per_byte" in said("evaluate", "runs/mail", "--device", "cpu")
    assert said("sample", "runs/mail", "--prompt", "some", "--max-new", "4", "--device", "cpu").startswith("some")


def test_links_of_the_documents_exist():
    for page in (ROOT / "docs").glob("*.md"):
        links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))]
        missing = [link for link in links if link and "://" not in link and not (page.parent / link).exists()]
        assert not missing, f"{page.name}: {missing}"
