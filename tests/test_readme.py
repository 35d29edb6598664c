"""The README keeps its word: its tested blocks run, and every file, command, recipe and name in it exists.

A fenced block right under the line `<!-- tested -->` is run; it must take seconds. The others are read only.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")
BLOCK = re.compile(r"(?P<tested><!-- tested -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.M | re.S)
BLOCKS = [match.groupdict() for match in BLOCK.finditer(TEXT)]
FOLDERS = ("zoo", "tasks", "configs", "scripts", "docs", "tests", ".ci")


def marked(language: str) -> list[str]:
    return [block["body"] for block in BLOCKS if block["tested"] and block["language"] == language]


def bash_lines() -> list[str]:
    """Every command in every bash block, tested or not, without its comment; continued lines joined."""
    joined = "\n".join(block["body"].replace("\\\n", " ") for block in BLOCKS if block["language"] == "bash")
    return [words for line in joined.splitlines() if (words := re.sub(r"(^|\s)#.*", "", line).strip())]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("readme")


def run(*command: str, cwd: Path, stdin: str | None = None) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, input=stdin, cwd=cwd, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, f"{command}\n{stdin or ''}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_there_is_something_to_test():
    assert marked("bash")
    assert marked("python")
    assert TEXT.count("<!-- tested -->") == len(marked("bash")) + len(marked("python"))


@pytest.mark.parametrize("line", [line for body in marked("bash") for line in body.splitlines() if line.strip()])
def test_bash(line, elsewhere):
    assert run("bash", "-c", line, cwd=elsewhere).strip()


@pytest.mark.parametrize("body", marked("python"), ids=lambda body: body.splitlines()[0])
def test_python(body, elsewhere):
    run(sys.executable, "-P", "-", cwd=elsewhere, stdin=body)


def test_links_and_files_exist():
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", TEXT) if "://" not in link]
    prose = BLOCK.sub("", TEXT)
    named = [word for word in re.findall(r"`([^`\s]+)`", prose) if word.split("/")[0] in FOLDERS and "/" in word]
    scripts = [word for line in bash_lines() for word in line.split() if word.startswith("scripts/")]
    patterns = [re.sub(r"<\w+>|\{\w+\}", "*", path) for path in {*links, *named, *scripts} if path]
    missing = [path for path in patterns if not any(ROOT.glob(path.rstrip("/")))]
    assert not missing


def test_zoo_commands_and_their_options_exist():
    used: dict[str, set[str]] = {}
    for line in bash_lines():
        if line.startswith("zoo "):
            words = shlex.split(line)
            used.setdefault(words[1], set()).update(word.split("=")[0] for word in words[2:] if word.startswith("--"))
    assert used
    for verb, options in used.items():
        shown = run("zoo", verb, "--help", cwd=ROOT)
        assert not {option for option in options if option not in shown}, f"zoo {verb} --help does not name them"


def test_training_commands_fit_their_recipes():
    """The recipe is there, and every field=value beside it is a field of it that takes this value."""
    from zoo.config import build, recipe_layers
    from zoo.train import Recipe

    trained = [shlex.split(line)[2:] for line in bash_lines() if line.startswith("zoo train ")]
    assert trained
    for recipe, *words in trained:
        build(Recipe, *recipe_layers(recipe, [word for word in words if "=" in word and not word.startswith("-")]))


def test_it_says_which_weights_are_published():
    tables = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in (ROOT / "tasks").glob("*/weights.yaml")]
    names = [f"{row['model']}.{row['tag']}" for table in tables for row in table["rows"]]
    assert names
    assert all(f"`{name}`" in TEXT for name in names)
    domains = sorted(file.parent for file in (ROOT / "tasks").glob("*/task.py"))
    without = [folder.name for folder in domains if not (folder / "weights.yaml").is_file()]
    assert not without or f"None is published yet of: {', '.join(without)}." in TEXT


def test_recipes_mixers_and_domains_are_all_named():
    from zoo import registry
    from zoo.config import list_recipes

    there = {"recipe": list_recipes(), "mixer": registry.mixers.names(), "domain": registry.tasks.names()}
    unnamed = [f"{kind} {name}" for kind, names in there.items() for name in names if f"`{name}`" not in TEXT]
    assert not unnamed, "the README does not name them"
