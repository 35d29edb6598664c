"""Every variant of scripts/bench_train.py changes something that is there, and its recipe is in order: what is mistyped
fails here and not on the GPU."""

import contextlib
import importlib.util
import sys
from pathlib import Path

import pytest
from torch._inductor import config as inductor

from zoo import registry
from zoo.config import ConfigError

pytest.importorskip("triton")  # some replace parts of kernels

FILE = Path(__file__).parents[1] / "scripts" / "bench_train.py"
SPEC = importlib.util.spec_from_file_location("bench_train", FILE)
bench_train = importlib.util.module_from_spec(SPEC)
sys.modules["bench_train"] = bench_train  # dataclasses look their module up
SPEC.loader.exec_module(bench_train)
SIZES = {"tokens": 4096, "budget": 65536, "micro": 8, "steps": 40}


@pytest.fixture(autouse=True)
def everything_is_put_back(monkeypatch):
    monkeypatch.setenv("ZOO_BACKEND", "")
    monkeypatch.setitem(registry.tasks._entries, "random", None)
    replaced = []

    with contextlib.ExitStack() as until_the_end:

        def put(owner, name, value):
            replaced.append(name)
            if owner is inductor:  # an attribute of it that is put back from outside is gone
                until_the_end.enter_context(inductor.patch(name, value))
            else:
                monkeypatch.setattr(owner, name, value)  # an AttributeError where there is none

        monkeypatch.setattr(bench_train, "put", put)
        yield replaced


@pytest.mark.parametrize("variant", bench_train.VARIANTS)
def test_a_variant_replaces_what_is_there(variant, everything_is_put_back, monkeypatch):
    assert bench_train.apply([variant]) == []
    assert everything_is_put_back or bench_train.os.environ["ZOO_BACKEND"] == variant


@pytest.mark.parametrize("arm", ["gatedfwa", "gatedfwa_nsa", "gatedfwa_nsa-wide"])
@pytest.mark.parametrize("variant", bench_train.CHANGES)
def test_a_change_is_one_of_the_recipe(variant, arm):
    plain = bench_train.recipe_of(arm, **SIZES, changes=[])
    changed = bench_train.recipe_of(arm, **SIZES, changes=bench_train.apply([variant]))
    assert changed != plain


def test_what_is_mistyped_fails(monkeypatch):
    with pytest.raises(SystemExit, match="narow: the variants are f32gates, .*, graph, narrow"):
        bench_train.apply(["narow"])
    with pytest.raises(ConfigError, match="residul"):
        bench_train.recipe_of("gatedfwa", **SIZES, changes=[{"model": {"backbone": {"residul": "autocast"}}}])
    monkeypatch.undo()
    with pytest.raises(AttributeError, match="Path has no 'nothing' to replace"):
        bench_train.put(Path, "nothing", 0)
