"""Names: listing loads nothing, a wrong name names the nearest, a hidden `tasks` package is found out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import zoo
from zoo.registry import Registry, UnknownName


def test_names_are_listed_in_natural_order_without_loading():
    registry = Registry("model")
    for name in ("text_125m", "text_8m", "image_8m"):
        registry.add(name, "no.such.module:nothing")
    assert registry.names("text_*") == ["text_8m", "text_125m"]
    with pytest.raises(ImportError, match=r"no\.such\.module"):
        registry.get("text_8m")


def test_a_wrong_name_names_the_nearest():
    registry = Registry("mixer")
    registry.add("gatedfwa", object())
    with pytest.raises(UnknownName, match="unknown mixer 'gatedfwaa'; did you mean 'gatedfwa'"):
        registry.get("gatedfwaa")


def test_a_name_is_given_once():
    registry = Registry("mixer")
    registry.add("a", 1)
    with pytest.raises(ValueError, match="registered already"):
        registry.add("a", 2)
    registry.add("a", 2, replace=True)
    assert registry.get("a") == 2


def test_a_lazy_entry_and_its_decorator_are_one():
    from zoo.registry import mixers

    assert mixers.get("swa").__name__ == "SWA"  # declared as a string, then registered by its module's decorator


@pytest.mark.parametrize("string_first", [True, False])
def test_a_string_and_the_object_that_it_names_come_in_either_order(string_first):
    """`pytest -p mine.mingru` imports the module before the entry point of its package declares it."""
    registry = Registry("mixer")
    pair = [f"{__name__}:Thing", Thing]
    for entry in pair if string_first else pair[::-1]:
        registry.add("thing", entry)
    assert registry.get("thing") is Thing
    with pytest.raises(ValueError, match="registered already"):
        registry.add("thing", f"{__name__}:Other")


class Thing:
    pass


def test_import_zoo_is_light():
    code = "import sys, zoo; zoo.__version__; print([m for m in ('torch', 'triton', 'omegaconf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("form", ["package", "module"])
def test_a_foreign_tasks_package_is_named(tmp_path, form):
    if form == "package":
        (tmp_path / "tasks").mkdir()
        (tmp_path / "tasks" / "__init__.py").write_text("")
    else:
        (tmp_path / "tasks.py").write_text("")
    code = "import sys; sys.path.insert(0, '.'); from zoo import registry; registry.tasks.names()"
    environment = {**os.environ, "PYTHONPATH": str(Path(zoo.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert "another package named 'tasks'" in done.stderr
    assert str(tmp_path) in done.stderr
    assert "zoo" in done.stderr.splitlines()[-1]
