"""What a user gets: the built wheel in an environment of its own, started where another `tasks` lies in the way."""

import zipfile
from pathlib import Path

import pytest

from tests.installed import build_wheel, make_environment, run

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory) -> Path:
    return build_wheel(repository, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel in it; returns its bin folder."""
    return make_environment(tmp_path_factory.mktemp("environment"), wheel)


@pytest.fixture
def in_the_way(tmp_path) -> Path:
    """A working directory whose `tasks` would win, if the working directory were on the path."""
    decoy = "raise RuntimeError('the decoy was imported')\n"
    (tmp_path / "tasks.py").write_text(decoy)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").write_text(decoy)
    return tmp_path


def test_the_wheel_holds_everything(wheel, repository):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for package in ("zoo", "tasks"):
        kept = [
            f
            for f in (repository / package).rglob("*")
            if f.suffix in (".py", ".yaml") and "__pycache__" not in f.parts
        ]
        missing = {f.relative_to(repository).as_posix() for f in kept} - inside
        assert kept
        assert not missing
    recipes = {
        f"zoo/_configs/{f.relative_to(repository / 'configs').as_posix()}"
        for f in (repository / "configs").rglob("*.yaml")
    }
    assert recipes
    assert recipes <= inside
    assert {name.split("/")[0] for name in inside if "dist-info" not in name} == {"zoo", "tasks"}
    assert any(name.endswith("licenses/LICENSE") for name in inside)


def test_the_installed_files_run_and_not_the_checkout(environment, in_the_way, repository):
    code = "import zoo, tasks, tasks.text; print(zoo.__file__); print(tasks.__file__); print(tasks.text.__file__)"
    shown = run(environment / "python", "-P", "-c", code, cwd=in_the_way).stdout.split()
    assert len(shown) == 3
    assert all(Path(file).is_relative_to(environment.parent) for file in shown), shown


def test_zoo_list_beside_another_tasks(environment, in_the_way):
    assert "text_" in run(environment / "zoo", "list", cwd=in_the_way).stdout


def test_every_shipped_recipe_loads(environment, in_the_way, repository):
    code = (
        "from zoo.config import build, configs_root, list_recipes, recipe_layers\n"
        "from zoo.train import Recipe\n"
        "assert configs_root().name == '_configs', configs_root()\n"
        "for name in list_recipes():\n"
        "    build(Recipe, *recipe_layers(name))\n"
        "    print(name)\n"
    )
    shown = run(environment / "python", "-P", "-c", code, cwd=in_the_way).stdout.split()
    files = [f.relative_to(repository / "configs") for f in (repository / "configs").rglob("*.yaml")]
    assert sorted(shown) == sorted(f.with_suffix("").as_posix() for f in files if f.parts[0] != "suites")


def test_a_hidden_tasks_package_is_named(environment, tmp_path):
    """`python -m` puts the working directory first, so a user's own `tasks` hides ours: the error says which one."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").write_text("DISTRIBUTION = 'mine'\n")
    shown = run(environment / "python", "-m", "zoo.cli", "list", cwd=tmp_path, ok=False)
    said = shown.stdout + shown.stderr
    assert "another package named 'tasks'" in said
    assert str(tmp_path) in said
